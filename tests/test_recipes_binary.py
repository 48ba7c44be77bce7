"""The recipes of binary networks reach the module and the callback, and the small one runs its schedule."""

from importlib import resources

import pytest
import torch
import torchvision

import lightning_nas as nas
from lightning_nas import callbacks
from lightning_nas.estimators import BiPer, ReSTE

cli = pytest.importorskip("pytorch_lightning.cli")
pytest.importorskip("jsonargparse")
if not hasattr(callbacks, "Binarization"):
    pytest.skip("needs the callback Binarization", allow_module_level=True)

RECIPES = resources.files("lightning_nas.recipes")
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


class NoImages(torch.utils.data.Dataset):
    """CIFAR-10 where nothing is downloaded."""

    def __init__(self, root: str, train: bool = True, transform=None, download: bool = False):
        self.transform, self.train = transform, train

    def __len__(self):
        return 8

    def __getitem__(self, index):
        pixels = torchvision.transforms.functional.to_pil_image(torch.rand(3, 32, 32))
        return self.transform(pixels), index


def built(recipe, *arguments):
    arguments = ["--config", str(RECIPES / recipe), *QUIET, "--data.num_workers=0", *arguments]
    return cli.LightningCLI(args=arguments, run=False, save_config_callback=None)


def binarization(of):
    (callback,) = [c for c in of.trainer.callbacks if isinstance(c, callbacks.Binarization)]
    return callback


@pytest.fixture
def cifar10(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", NoImages)


def test_restes_recipe_is_the_papers(cifar10):
    made = built("reste_resnet20_cifar10.yaml")
    callback = binarization(made)
    assert isinstance(callback.estimator, ReSTE)
    assert (callback.estimator.power, callback.estimator.clip, callback.estimator.chord) == (3.0, 1.5, 0.1)
    assert (callback.weights.bits, callback.weights.scale, callback.weights.grad_through_scale) == (
        1,
        "layer",
        True,
    )
    assert (callback.activations.bits, callback.activations.scale) == (1, None)
    assert (made.model.optimizer, made.model.lr, made.model.weight_decay) == ("sgd", 0.1, 1e-4)
    assert made.trainer.max_epochs * made.model.warmup == 5
    assert sum(parameter.numel() for parameter in made.model.model.parameters()) == 269722
    images, _ = next(iter(made.datamodule.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert images.min() < -1


def test_bipers_recipe_has_its_stages_and_numbers(cifar10):
    made = built("biper_resnet18_cifar10.yaml")
    callback = binarization(made)
    assert isinstance(callback.estimator, BiPer)
    assert callback.estimator.frequency == 20
    (first, _), (second, _) = callback.stages
    assert [round(900 * start) for start in (first, second)] == [0, 600]
    assert (made.model.optimizer, made.model.lr, made.model.weight_decay) == ("sgd", 0.021, 1.6e-3)


@pytest.mark.slow
def test_the_recipe_on_digits_runs_its_schedule_to_the_end():
    short = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"]
    made = built("binary_digits.yaml", *short)
    callback = binarization(made)
    made.trainer.fit(made.model, made.datamodule)
    layers = nas.binary.layers(made.model.model)
    assert len(layers) == 18
    for layer in layers.values():
        assert layer.input_is_nonnegative is False
        assert {*layer.binary_weight.unique().tolist()} == {-1.0, 1.0}
        assert layer.weight_estimator.current > 2.4  # of 3, seven eighths on the way
    assert callback.progress >= 7 / 8
    assert made.trainer.callback_metrics["val_acc"].isfinite()
    model = made.model.model.eval()
    images = torch.randn(2, 1, 10, 10)
    assert torch.equal(nas.load(nas.save(model, "it"))(images), model(images))
