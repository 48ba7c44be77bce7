"""What Binarization logs of its layers, and when it warns."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import Binarization
from torch import nn

import lightning_nas as nas
from lightning_nas.binary import Weights
from tests import user_modules as users
from tests.callbacks.test_binarization import fit
from tests.callbacks.test_user_modules import Memory


class Noting(pl.Callback):
    """Keeps the latent weights and the gradients of a layer, seen before they are clipped."""

    def __init__(self, name):
        self.name, self.weights, self.gradients = name, [], []

    def layer(self, module):
        return module.net.get_submodule(self.name)

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append(self.layer(pl_module).weight.grad.clone())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(self.layer(pl_module).weight.detach().clone())


def test_what_is_logged_equals_what_is_counted_by_hand():
    name, memory = "blocks.1.mlp.fc1", Memory()
    noting, module = Noting(name), users.PlainClassifier()
    fit(
        module,
        Binarization(nas.estimators.ReSTE(power=1.0), log_every=2),
        noting,
        logger=memory,
        gradient_clip_val=1e-3,
    )
    looks = [metrics for metrics, _ in memory.lines if f"binary/scale/{name}" in metrics]
    assert len(looks) == 3  # of 6 steps every second
    for k, look in enumerate(looks):
        w, gradient = noting.weights[2 * k + 1], noting.gradients[2 * k + 1]
        assert look[f"binary/scale/{name}"] == pytest.approx(w.abs().mean().item(), rel=1e-5)
        sizes = gradient.abs().flatten()
        variance = ((sizes - sizes.mean()) ** 2).sum() / (len(sizes) - 1)
        assert look[f"binary/gradient_stability/{name}"] == pytest.approx(variance.item(), rel=1e-4)
        signs = torch.where(w < 0, -1.0, 1.0)
        error = (w.clamp(-1.5, 1.5) - signs).square().sum().sqrt()  # of a power of 1, the clipped identity
        assert look[f"binary/estimating_error/{name}"] == pytest.approx(error.item(), rel=1e-5)
        if k:
            before = noting.weights[2 * k - 1]
            flipped = ((w >= 0) != (before >= 0)).float().mean().item()
            assert look[f"binary/flip_rate/{name}"] == pytest.approx(flipped)
        else:
            assert f"binary/flip_rate/{name}" not in look


def mlp(*before):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *before, nn.Linear(8, 8), nn.Linear(8, 3))


class Still(users.PlainClassifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Positive(nn.Module):
    def forward(self, x):
        return x.abs() + 10


class Unused(nn.Sequential):
    """Calls all of its layers but the third."""

    def forward(self, x):
        return self[3](self[1](self[0](x)))


class Zero(Still):
    def on_train_batch_end(self, *args):
        with torch.no_grad():
            self.net[2].weight_scale.zero_()


class NotANumber(users.PlainClassifier):
    def on_train_batch_end(self, *args):
        with torch.no_grad():
            self.net[2].weight_scale.fill_(math.nan)


LEARNED = {"weights": Weights(scale="learned")}
DEAD = {
    "no learning": (lambda: Still(mlp()), {}, "layers 2 have a gradient, but no sign .*raise it"),
    "beyond the clip": (
        lambda: Still(mlp()),
        {"estimator": nas.estimators.STE(clip=1e-9)},
        "layers 2 have a gradient of zero.*larger clip",
    ),
    "not used": (
        lambda: users.PlainClassifier(Unused(*mlp())),
        {"include": "2"},
        "layers 2 got no gradient at all",
    ),
    "a sign of one sign": (
        lambda: users.PlainClassifier(mlp(Positive())),
        {"activations": 1},
        "layers 3 see inputs whose codes are all the same.*exclude=",
    ),
    "no scale": (lambda: Zero(mlp()), LEARNED, "layers 2 have a scale of zero.*is not learned"),
    "NaN": (lambda: NotANumber(mlp()), LEARNED, "layers 2 have a scale that is not finite.*diverged"),
}


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_layer_is_named_once_with_what_to_do(name):
    make, settings, message = DEAD[name]
    callback, data = (
        Binarization(**{"estimator": "ste", **settings}, log_every=10),
        users.loader(users.images(8 * 130)),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make(), callback, epochs=1, data=data)
    said = [str(w.message) for w in caught if str(w.message).startswith("Binarization: binary layers")]
    assert len(said) == 1
    assert re.search(message, said[0])


def test_a_layer_that_learns_is_left_in_peace():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Binarization")
        data = users.loader(users.images(8 * 110))
        fit(users.PlainClassifier(lr=1e-3), Binarization(activations=1, log_every=5), epochs=1, data=data)
        fit(Still(mlp()), Binarization(log_every=0), epochs=1, data=data)
