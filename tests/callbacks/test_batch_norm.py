"""Batch norm in a run: statistics of each candidate's own, and not a bit changed for the largest network."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune, SupernetTraining
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities import CombinedLoader
from sklearn.datasets import load_digits
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import BasicBlock, ResNet
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.supernet import Supernet, add_kernel_transforms
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, assert_same

# Few steps, of which the averages that training keeps lag behind, and statistics from data do not.
pytestmark = pytest.mark.filterwarnings("ignore:.* of the smallest network .* is better than of the largest")


def tiny_resnet(**changes) -> ResNet:
    torch.manual_seed(0)
    settings = {
        "in_chans": 1,
        "num_classes": 10,
        "channels": (16, 16, 16, 16),
        "drop_path_rate": 0.1,
        **changes,
    }
    return ResNet(BasicBlock, (1, 2, 1, 1), **settings)


def digits(first: int, last: int) -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    pictures = torch.tensor(pixels[first:last] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    return TensorDataset(F.interpolate(pictures, scale_factor=2), torch.tensor(labels[first:last]))


class Digits(pl.LightningDataModule):
    def __init__(self, prepares_for: tuple[str, ...] = ("fit", "validate")) -> None:
        super().__init__()
        self.prepares_for = prepares_for

    def setup(self, stage):
        self.validation = digits(1000, 1200)
        if stage in self.prepares_for:
            self.training = digits(0, 400)

    def train_dataloader(self):
        return DataLoader(self.training, 50, shuffle=True, generator=torch.Generator().manual_seed(3))

    def val_dataloader(self):
        return DataLoader(self.validation, 64)


def measured(network) -> dict[str, float]:
    """What the user's validation says about a plain network, with no callback of ours."""
    (logged,) = pl.Trainer(**QUIET).validate(
        users.PlainClassifier(network), datamodule=Digits(), verbose=False
    )
    return logged


def assert_extracted_networks_reproduce(instatune: InstaTune) -> None:
    assert len(instatune.result.candidates) == instatune.budget
    for candidate in instatune.result.candidates:
        logged = measured(instatune.extract(candidate))
        assert {name: candidate.values[name] for name in ("val_loss", "val_acc")} == logged


def test_extracted_networks_reproduce_what_was_measured_in_the_supernet_to_the_last_digit():
    module = users.PlainClassifier(tiny_resnet())
    instatune = InstaTune(budget=5, warmup=4, folder="found", calibration_samples=200)
    pl.Trainer(callbacks=[instatune], max_epochs=3, **QUIET).fit(module, datamodule=Digits())
    assert_extracted_networks_reproduce(instatune)
    smallest = instatune.supernet.space.smallest
    own = measured(instatune.extract(smallest))
    instatune.supernet.forget_statistics()
    with pytest.warns(UserWarning, match="of the extracted network are the largest network's"):
        borrowed = measured(instatune.extract(smallest))
    assert own["val_acc"] > 0.3  # of ten classes
    assert own["val_loss"] < borrowed["val_loss"]


def test_a_module_trained_earlier_is_searched_with_statistics_from_its_datamodule():
    module = users.PlainClassifier(tiny_resnet())
    pl.Trainer(max_epochs=1, **QUIET).fit(module, datamodule=Digits())
    instatune = InstaTune(budget=3, folder="found", order=None, calibration_samples=100)
    instatune.search(pl.Trainer(**QUIET), module, datamodule=Digits())
    assert_extracted_networks_reproduce(instatune)


class WithLoaders(users.PlainClassifier):
    def train_dataloader(self):
        return DataLoader(digits(0, 100), 50)

    def val_dataloader(self):
        return DataLoader(digits(1000, 1200), 64)


def test_training_data_of_the_module_itself_serve_too():
    instatune = InstaTune(budget=2, folder="found", order=None)
    instatune.search(pl.Trainer(**QUIET), WithLoaders(tiny_resnet()))
    assert_extracted_networks_reproduce(instatune)


def test_a_search_without_training_data_says_what_is_missing():
    instatune = InstaTune(budget=2, folder="found", order=None)
    validation = DataLoader(digits(1000, 1100), 64)
    with pytest.raises(NASError, match="this Trainer has none: give it a datamodule"):
        instatune.search(pl.Trainer(**QUIET), users.PlainClassifier(tiny_resnet()), dataloaders=validation)
    with pytest.raises(NASError, match=r"Digits failed outside fit \(AttributeError: .*stage='validate' too"):
        instatune.search(
            pl.Trainer(**QUIET), users.PlainClassifier(tiny_resnet()), datamodule=Digits(("fit",))
        )


# --- neutrality


class Still(users.PlainClassifier):
    """Its weights never move: what differs after a run is what the passes left."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_students_leave_the_largest_networks_statistics_as_plain_training_does():
    states = []
    for callbacks in ([], [SupernetTraining(warmup=1, order=None, validate=("smallest", "random"))]):
        module = Still(tiny_resnet())
        torch.manual_seed(1)
        pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(module, datamodule=Digits())
        states.append(module.state_dict())
    assert_same(*states)


class Order(pl.Callback):
    """The batches that the run trains on, and none that only give statistics."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch[0].double().sum().item())


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator()},
        {"shuffle": True, "generator": torch.Generator(), "num_workers": 1, "persistent_workers": True},
    ],
    ids=["global generator", "own generator", "workers that stay"],
)
def test_the_run_sees_its_batches_in_the_order_it_would_see_without_statistics(settings):
    data, orders = digits(0, 64), []
    for validate in ((), ("smallest", "random")):
        if "generator" in settings:
            settings["generator"].manual_seed(5)
        order = Order()
        ours = SupernetTraining(warmup=1, order=None, validate=validate, calibration_samples=20)
        torch.manual_seed(2)
        pl.Trainer(
            max_epochs=2,
            callbacks=[ours, order],
            **{**QUIET, "val_check_interval": 2, "limit_val_batches": 1},
        ).fit(users.PlainClassifier(tiny_resnet()), DataLoader(data, 16, **settings), DataLoader(data, 32))
        orders.append(order.seen)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 8


PASSES: list[int] = []  # where no copy of the module's own attributes reaches


class Counted(users.PlainClassifier):
    def training_step(self, batch, batch_idx):
        PASSES.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def test_statistics_come_from_as_many_samples_as_were_asked_for():
    module, trainer = Counted(tiny_resnet()), pl.Trainer(max_epochs=1, **QUIET)
    ours = SupernetTraining(warmup=0, order=None, validate=(), calibration_samples=101)
    trainer.callbacks = [ours]
    trainer.fit(module, datamodule=Digits())
    PASSES.clear()
    ours.evaluate(trainer, module, ours.supernet.space.largest)
    assert PASSES == []
    ours.evaluate(trainer, module, ours.supernet.space.smallest)
    ours.evaluate(trainer, module, ours.supernet.space.smallest)  # known by now
    assert PASSES == [50, 50, 50]


class OfTwoLoaders(Counted):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["one"], batch_idx)


def test_loaders_are_combined_for_statistics_as_they_are_for_training():
    loaders = {"one": DataLoader(digits(0, 32), 16), "other": DataLoader(digits(0, 64), 16)}
    ours, trainer = SupernetTraining(warmup=0, order=None, validate=()), pl.Trainer(max_epochs=1, **QUIET)
    trainer.callbacks = [ours]
    module = OfTwoLoaders(tiny_resnet())
    trainer.fit(module, CombinedLoader(loaders, "min_size"), DataLoader(digits(1000, 1064), 64))
    PASSES.clear()
    ours.evaluate(trainer, module, ours.supernet.space.smallest)
    assert PASSES == [16, 16]  # the shorter one ends, and is not begun again


# --- order, and what is refused


def test_the_averaged_network_computes_the_same_after_channels_are_put_in_order():
    outputs = []
    for order in (None, "magnitude"):
        averaging = WeightAveraging(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))
        kept = Keep(averaging)
        ours = SupernetTraining(warmup=2, order=order, validate=())
        torch.manual_seed(1)
        pl.Trainer(max_epochs=1, callbacks=[averaging, ours, kept], **QUIET).fit(
            Still(tiny_resnet().double()), DataLoader(doubled(digits(0, 200)), 50)
        )
        outputs.append(kept.output)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


def doubled(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


class Keep(pl.Callback):
    """What the averaged network makes of some images before the run hands its weights over."""

    def __init__(self, averaging: WeightAveraging) -> None:
        self.averaging = averaging

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            average = self.averaging._average_model.module.net
            self.output = average.eval()(digits(1000, 1010).tensors[0].double())


def test_sync_batchnorm_is_refused_before_anything_changes():
    trainer = pl.Trainer(strategy="ddp", sync_batchnorm=True, **QUIET)
    module = users.PlainClassifier(tiny_resnet())
    with pytest.raises(UnsupportedError, match="sync_batchnorm=True replaces the batch norms"):
        SupernetTraining().setup(trainer, module, "fit")
    assert type(module.net) is ResNet
    SupernetTraining().setup(trainer, users.PlainClassifier(), "fit")  # has no batch norm


def test_kernel_matrices_are_trained_with_the_rest():
    arch = decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r2_k5_s2_e2_c16_se0.25"]])
    torch.manual_seed(0)
    network = MobileNetV3(arch, 10, 1, 8, num_features=16, round_chs_fn=partial(round_channels))
    module = users.PlainClassifier(add_kernel_transforms(network))
    ours = SupernetTraining(warmup=0)
    pl.Trainer(max_epochs=1, callbacks=[ours], **QUIET).fit(module, datamodule=Digits())
    assert not torch.equal(network.blocks[1][1].conv_dw.kernel_5to3, torch.eye(9))
    assert isinstance(ours.supernet, Supernet)
