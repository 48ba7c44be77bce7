"""What the callback is for, made small: over three seeds its subnetworks against slices of the plain network.

The whole study is benchmarks/worth_it.py; its figures are in docs/worth-it.md.
"""

import copy
from statistics import mean

import pytest
import pytorch_lightning as pl
import timm
import torch
from lightning_nas.callbacks import SupernetTraining
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_nas as nas
from lightning_nas.modules import ImageClassifier

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is better than of the largest")]
TINY = {
    "img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 4,
    "weight_init": "jax",  # timm's default is made for wide networks and learns slowly here
}  # fmt: skip
SHAPES = [(4, 3, 96), (4, 2, 64), (3, 3, 32)]  # blocks, heads, MLP units: 75, 50, 31 % of the blocks' MACs


def digits(seed):
    """597 of scikit-learn's digits to train on, 1,200 to measure on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images[order[1200:]], labels[order[1200:]]), (
        images[order[:1200]],
        labels[order[:1200]],
    )


def trained(network, data, seed, *callbacks):
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=10, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    module = ImageClassifier(network, num_classes=10, lr=3e-3, layer_decay=1.0)
    trainer.fit(module, DataLoader(data, 32, shuffle=True, drop_last=True))
    return network


def accuracy(network, test):
    images, labels = test
    with torch.inference_mode():
        return (network.eval()(images).argmax(-1) == labels).float().mean().item()


def family(supernet, test):
    found = []
    for depth, heads, mlp in SHAPES:
        sizes = {"depth": depth, "heads": heads, "mlp": mlp}
        space = supernet.space
        shape = space.canonical({name: sizes[name.rpartition(".")[2]] for name in space.names})
        found.append(accuracy(supernet.extract(shape), test))
    return found


@pytest.fixture(scope="module")
def arms():
    """By seed, accuracies of (full, shapes): trained with the callback, plainly, and then put in order."""
    found = []
    for seed in range(3):
        train, test = digits(seed)
        torch.manual_seed(seed)
        start = timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY)
        callback = SupernetTraining(validate=(), seed=seed)
        together = trained(copy.deepcopy(start), train, seed, callback)
        plain = trained(copy.deepcopy(start), train, seed)
        ordered = nas.Supernet(
            copy.deepcopy(plain), order="importance", calibration=list(DataLoader(train, 64)),
            loss=lambda logits, batch: F.cross_entropy(logits, batch[1]),
        )  # fmt: skip
        found.append(
            {
                "together": (accuracy(together, test), family(callback.supernet, test)),
                "plain": (accuracy(plain, test), family(nas.Supernet(plain), test)),
                "ordered": (accuracy(ordered.model, test), family(ordered, test)),
            }
        )
    return found


@pytest.mark.parametrize("rival", ["plain", "ordered"])
def test_subnetworks_beat_the_plain_network_sliced_the_same_way(arms, rival):
    # Means of the three sizes, measured by seed: 0.20, 0.22, 0.28 ahead of plain slices and 0.20, 0.11, 0.18
    # of ordered ones: 0.17 +- 0.03 (standard error) for the nearer rival. The bound is three of them below.
    ahead = [
        mean(mine - other for mine, other in zip(arm["together"][1], arm[rival][1], strict=True))
        for arm in arms
    ]
    assert min(ahead) > 0
    assert mean(ahead) > 0.08


def test_the_full_network_loses_little_to_its_family(arms):
    # Measured: -0.003, -0.003, -0.020. An accuracy of 0.94 on 1,200 images has a standard error of 0.007, the
    # mean of three differences one of 0.007 * sqrt(2 / 3) = 0.006. The bound is four of them below the mean.
    assert mean(arm["together"][0] - arm["plain"][0] for arm in arms) > -0.032
