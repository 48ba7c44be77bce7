"""A run with a network of the user's own, whose layers are marked."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune, SupernetTraining
from torch import nn

import lightning_nas as nas
from lightning_nas.errors import NoMatchError, UnsupportedError
from tests import user_modules as users
from tests.callbacks.test_supernet_training import (
    AT_ONCE,
    QUIET,
    SANDWICH,
    assert_same,
    by_hand,
    fit,
    sandwich,
    weights,
)


class Block(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.up, self.down = nas.elastic(nn.Conv2d(6, 8, 1), out=(0.5, 1.0)), nn.Conv2d(8, 6, 1)
        self.mix, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), norm(8)

    def forward(self, x):
        return x + self.down(self.norm(self.mix(self.up(x).relu())).relu())


def network(norm=nn.Identity) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nas.elastic(nn.Sequential(*(Block(norm) for _ in range(3))), depth=(2, 3))
    return nn.Sequential(nn.Conv2d(1, 6, 3), blocks, nn.Flatten(), nn.Linear(216, users.CLASSES))


def test_a_run_equals_the_loop_written_by_hand():
    ours, hand = (users.PlainClassifier(network()).double() for _ in range(2))
    callback = SupernetTraining(sampler=SANDWICH, students_learn_from="both", **AT_ONCE)
    fit(ours, callback, max_epochs=2, precision="64-true")
    by_hand(hand, hand.configure_optimizers(), sandwich, task_share=0.5, epochs=2)
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.* of the smallest network .* is better than of the largest")
def test_extracted_networks_reproduce_what_the_run_measured():
    module = users.PlainClassifier(network(nn.BatchNorm2d))
    instatune = InstaTune(budget=4, warmup=1, folder="found", calibration_samples=24)
    pl.Trainer(callbacks=[instatune], max_epochs=4, **QUIET).fit(module, users.loader(), users.loader())
    assert len(instatune.result.candidates) == 4
    for candidate in instatune.result.candidates:
        plain = users.PlainClassifier(instatune.extract(candidate))
        (logged,) = pl.Trainer(**QUIET).validate(plain, users.loader(), verbose=False)
        assert logged == {name: candidate.values[name] for name in ("val_loss", "val_acc")}


class Whole(users.PlainClassifier):
    """A module that is its own network."""

    def __init__(self):
        super().__init__(nn.Flatten())
        self.up, self.down = nas.elastic(nn.Linear(64, 8), out=(4, 8)), nn.Linear(8, users.CLASSES)

    def forward(self, x):
        return self.down(self.up(self.net(x)).relu())


def test_marked_layers_of_the_module_itself_are_not_a_network():
    with pytest.raises(
        NoMatchError, match=r"no supported network in Whole.*with layers marked by nas\.elastic"
    ):
        fit(Whole(), SupernetTraining(**AT_ONCE), max_epochs=1)


def test_of_two_marked_networks_one_is_named():
    module = users.PlainClassifier(network())
    module.other = network()
    with pytest.raises(UnsupportedError, match=r"several networks could be made elastic: net, other"):
        fit(module, SupernetTraining(**AT_ONCE), max_epochs=1)
    callback = SupernetTraining(network="net", **AT_ONCE)
    fit(module, callback, max_epochs=1)
    assert callback.supernet.model is module.net
