"""Learning rates over a run against the formulas of their papers."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_nas.modules import (
    ImageClassifier,
    exponential_constant_ending,
    warmup_cosine,
    warmup_linear,
)


def test_constant_ending_is_bignas_decay_until_its_floor():
    """0.97 every 2.4 epochs meets 5 % at epoch 236.05, as computed from the formula."""
    met = 2.4 * math.log(0.05) / math.log(0.97)
    assert met == pytest.approx(236.05, abs=0.01)
    steps = 1_000  # an epoch
    total, ending = 360 * steps, 1 - met / 360
    for epoch in (0, 1, 2.4, 100, 236, 237, 300, 360):
        factor = exponential_constant_ending(int(epoch * steps), 0, total, ending=ending)
        assert factor == pytest.approx(max(0.05, 0.97 ** (epoch / 2.4)), rel=1e-6)


def test_every_schedule_rises_in_a_line_and_stays_within_zero_and_one():
    for schedule in (warmup_cosine, warmup_linear, exponential_constant_ending):
        assert [schedule(step, 4, 50) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
        for warmup, total in [(0, 1), (3, 3), (5, 3), (2, 50)]:
            assert all(0 <= schedule(step, warmup, total) <= 1 for step in range(60))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*The number of training batches")
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
        ("constant-ending", [1.0, 0.05 ** (0.25 / 0.7), 0.05 ** (0.5 / 0.7), 0.05]),
    ],
)
def test_a_module_trains_at_the_rates_of_the_schedule_that_it_was_given(schedule, expected):
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    module = ImageClassifier(
        num_classes=3, model_kwargs=tiny, lr=0.5, layer_decay=1.0, warmup=0, schedule=schedule
    )
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))
    pl.Trainer(
        max_epochs=1, callbacks=[Watch()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(data, 2))  # fmt: skip
    assert rates == pytest.approx([0.5 * factor for factor in expected])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(
        ValueError, match="schedule must be one of cosine, linear, constant-ending, got 'step'"
    ):
        ImageClassifier(num_classes=3, schedule="step")
