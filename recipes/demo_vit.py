"""One callback turns the fine-tuning of a ViT into a family of smaller ViTs.

Run it as it is, on 5,000 handwritten digits (MNIST) and a small ViT that was pretrained on other digits; it
takes three to four minutes on a CPU:

    python -m lightning_nas.recipes.demo_vit

or on a timm model and a folder with one sub-folder of images a class:

    python -m lightning_nas.recipes.demo_vit --model vit_small_patch16_224 --pretrained true \
        --images photos/ --epochs 10 --lr 1e-4 --layer_decay 0.75

Written to --output: the front as a picture, tables, the study, three networks, W&B's files.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import timm
import torch
import wandb
from lightning_nas.callbacks import InstaTune
from lightning_nas.recipes.digits import handwritten_digits, parts, standardized
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import override

import lightning_nas as nas
from lightning_nas.modules import ImageClassifier

SMALL_VIT = {
    "img_size": 20, "patch_size": 5, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 4,
}  # fmt: skip
SHARES = {"small": 0.35, "medium": 0.6, "best": 1.0}  # of the full network's MACs, at most
FORMATS = {
    "accuracy": "{:.3f}".format, "MMACs": "{:.2f}".format, "parameters": "{:,}".format,
    "latency [ms]": "{:.2f}".format, "random subnetwork": "{:.3f}".format, "first blocks": "{:.3f}".format,
}  # fmt: skip
OFFLINE: dict[str, Any] = {"mode": "offline", "settings": wandb.Settings(silent=True)}
QUIET: dict[str, Any] = {
    "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False,
}  # fmt: skip


def main(
    model: str | None = None,
    pretrained: bool = False,
    images: str | None = None,
    epochs: int = 16,
    batch_size: int = 32,
    lr: float = 2e-3,
    layer_decay: float = 1.0,
    budget: int = 40,
    output: str = "demo_output",
    seed: int = 0,
) -> None:
    """Fine-tune a ViT with InstaTune, search its subnetworks, extract three of them and compare.

    Args:
        model: a timm name; by default a small ViT that is pretrained here, in a quarter of a minute.
        pretrained: start from timm's weights.
        images: folder with one sub-folder of images a class; by default MNIST.
        epochs: of pretraining (the small ViT only), and of fine-tuning, subnetworks included.
        batch_size: images a step.
        lr: peak learning rate; about 1e-4 for a large pretrained model.
        layer_decay: factor of the learning rate for each earlier layer; 0.75 for a large pretrained model.
        budget: candidates that the search evaluates.
        output: folder to write to.
        seed: of everything.
    """
    started, folder = time.perf_counter(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with only_our_messages():
        pl.seed_everything(seed, verbose=False)
        network: Any = (
            pretrained_vit(epochs) if model is None else timm.create_model(model, pretrained=pretrained)
        )
        data = mnist() if images is None else image_folder(images, network)
        network.reset_classifier(data.classes)
        pretrained_network = copy.deepcopy(network)  # for the comparison below

        # --- a Lightning user's script, and one callback
        say(f"Fine-tuning on {len(data.train):,} images:")
        module = ImageClassifier(network, num_classes=data.classes, lr=lr, layer_decay=layer_decay)
        instatune = InstaTune(monitor="val_acc", budget=budget, seed=seed, folder=folder)
        logger = WandbLogger(experiment=wandb.init(project="lightning-nas-demo", dir=folder, **OFFLINE))
        trainer = pl.Trainer(max_epochs=epochs, logger=logger, callbacks=[instatune, EpochLine()], **QUIET)
        trainer.fit(
            module, DataLoader(data.train, batch_size, shuffle=True), DataLoader(data.validation, 250)
        )
        logger.experiment.finish()

        # --- three networks of the family, and the full one
        result = instatune.result
        assert result is not None
        assert result.reference is not None  # the full network, which every search evaluates first
        chosen = three_of(result, result.reference.values["macs"])
        networks = {name: instatune.extract(candidate) for name, candidate in chosen.items()}
        for name, network in networks.items():
            nas.save(network, folder / name, architecture=chosen[name].architecture)
        chosen["full"], networks["full"] = result.reference, instatune.extract(result.reference)

        # --- two reference lines at equal cost
        say(f"For comparison: {budget} random subnetworks, and shallower networks trained alone ...")
        random = random_search(instatune, data, budget, seed)
        shallow: dict[int, nn.Module] = {}  # by their number of blocks
        rows = []
        for name, candidate in chosen.items():
            macs = candidate.values["macs"]
            peer = instatune.extract(random.best("val_acc", where={"macs": ("<=", macs)}))
            plain: Any = shallower(pretrained_network, macs, data.example)
            blocks = len(plain.blocks)
            if blocks not in shallow:
                pl.seed_everything(seed, verbose=False)
                alone = ImageClassifier(plain, num_classes=data.classes, lr=lr, layer_decay=layer_decay)
                batches = DataLoader(data.train, batch_size, shuffle=True)
                pl.Trainer(max_epochs=epochs, logger=False, **QUIET).fit(alone, batches)
                shallow[blocks] = plain
            rows.append(
                {
                    "network": name,
                    "accuracy": accuracy(networks[name], data.test),
                    "MMACs": macs / 1e6,
                    "parameters": sum(p.numel() for p in networks[name].parameters()),
                    "random subnetwork": accuracy(peer, data.test),
                    "first blocks": accuracy(shallow[blocks], data.test),
                    "of them": blocks,
                }
            )
        table = pd.DataFrame(rows).set_index("network")
        draw(result, random, shallow.values(), data, folder / "front.png")
        table.insert(3, "latency [ms]", pd.Series(latency_ms(networks, data.example)))

    table.to_csv(folder / "networks.csv")
    say(f"\nAccuracy on {len(data.test):,} images that neither training nor search has seen:\n")
    say(table.reset_index().to_string(index=False, formatters=FORMATS))
    say(
        f"\nrandom subnetwork: of {budget} random ones the best on the validation images at no higher cost."
        "\nfirst blocks: as many of the pretrained network's as reach that cost, trained alone as long;"
        "\n    all of them, in the last row, are plain fine-tuning without the callback."
        f"\n\nFront: {folder / 'front.png'}; networks: {', '.join(str(folder / name) for name in SHARES)}."
        f"\n{time.perf_counter() - started:.0f} s in all."
    )


# --- data


@dataclass(frozen=True)
class Images:
    """Labelled images in three parts: training, the search, and a test that neither of them sees."""

    train: Subset[Any]
    validation: Subset[Any]
    test: Subset[Any]
    classes: int

    @property
    def example(self) -> Tensor:
        """One image, as a batch."""
        image: Tensor = self.test[0][0]
        return image[None]


def mnist() -> Images:
    """5,000 images of MNIST."""
    data = handwritten_digits()
    train, validation, test = (Subset(data, part) for part in parts(len(data)))
    return Images(train, validation, test, classes=10)


def scanned_digits() -> TensorDataset:
    """1,797 other digits by other hands, 8 x 8 pixels, from scikit-learn; enlarged to 20 x 20."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = nn.functional.interpolate(images, size=(20, 20), mode="bicubic")
    return TensorDataset(standardized(images), torch.tensor(labels))


def image_folder(folder: str, network: nn.Module) -> Images:
    """A folder with one sub-folder of images a class, transformed as the network was pretrained."""
    config = timm.data.resolve_data_config(model=network)
    augmented, plain = (
        timm.data.create_dataset(
            "", folder, search_split=False,
            transform=timm.data.create_transform(**config, is_training=is_training),
        )
        for is_training in (True, False)
    )  # fmt: skip
    train, validation, test = parts(len(plain))
    classes = len(plain.reader.class_to_idx)
    return Images(Subset(augmented, train), Subset(plain, validation), Subset(plain, test), classes)


# --- networks


def pretrained_vit(epochs: int) -> nn.Module:
    """The small ViT, trained on scikit-learn's digits."""
    say("Pretraining a small ViT on scikit-learn's digits ...")
    module = ImageClassifier(num_classes=10, model_kwargs=SMALL_VIT, lr=2e-3, layer_decay=1.0)
    batches = DataLoader(scanned_digits(), 32, shuffle=True)
    pl.Trainer(max_epochs=epochs, logger=False, **QUIET).fit(module, batches)
    return module.model


def shallower(network: nn.Module, macs: float, example: Tensor) -> nn.Module:
    """The plain way to a cheaper network: its first blocks, as many as reach that cost."""
    network = copy.deepcopy(network)
    depths = range(1, len(network.get_submodule("blocks")) + 1)  # type: ignore[arg-type]
    space = nas.supernet.default_space(network, heads=None, mlp=None, depth=depths, keep="first")
    supernet = nas.Supernet(network, space=space)
    cost = nas.costs.MACs(supernet, example)
    architectures = [space.architecture({"depth": depth}) for depth in depths]
    return supernet.extract(next(a for a in architectures if cost(a) >= macs))


def macs_of(network: nn.Module, example: Tensor) -> float:
    """Of one image, of a plain network."""
    supernet = nas.Supernet(copy.deepcopy(network))
    return nas.costs.MACs(supernet, example)(supernet.space.largest)


def random_search(instatune: InstaTune, data: Images, budget: int, seed: int) -> nas.SearchResult:
    """As many subnetworks of the same supernet, drawn blindly."""
    supernet = instatune.supernet
    assert supernet is not None  # made by fit

    def evaluate(architecture: nas.Architecture) -> dict[str, float]:
        with supernet.using(architecture):
            return {"val_acc": accuracy(supernet.model, data.validation)}

    return nas.search(
        supernet.space,
        evaluate,
        [nas.Maximize("val_acc"), nas.Minimize(nas.costs.MACs(supernet, data.example))],
        strategy="random", budget=budget, storage="memory", seed=seed, progress=False,
        initial=[supernet.space.smallest],
    )  # fmt: skip


def three_of(result: nas.SearchResult, whole: float) -> dict[str, nas.Candidate]:
    """The best candidates at three costs, as shares of the full network's."""
    least = min(candidate.values["macs"] for candidate in result.candidates)
    return {
        name: result.best("val_acc", where={"macs": ("<=", max(share * whole, least))})
        for name, share in SHARES.items()
    }


# --- measurements


def accuracy(network: nn.Module, data: Dataset[Any]) -> float:
    """Share of images that the network gets right."""
    network.eval()
    with torch.inference_mode():
        right = [network(images).argmax(-1) == labels for images, labels in DataLoader(data, 250)]
    return torch.cat(right).float().mean().item()


def latency_ms(
    networks: Mapping[str, nn.Module], example: Tensor | Mapping[str, Tensor], repeats: int = 50
) -> dict[str, float]:
    """Median time of one example, in milliseconds, measured in turns so that all meet the same conditions."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, network in networks.items():
                start = time.perf_counter()
                network.eval()
                network(example) if isinstance(example, Tensor) else network(**example)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


# --- what is shown


def draw(
    result: nas.SearchResult, random: nas.SearchResult, shallow: Iterable[nn.Module], data: Images, path: Path
) -> None:
    """The front, with both references beside it, all measured on the validation images."""
    figure = result.plot()
    (axes,) = figure.axes
    lines = {
        "random subnetworks": [(c.values["macs"], c.values["val_acc"]) for c in random.front],
        "first blocks, trained alone": [
            (macs_of(network, data.example), accuracy(network, data.validation)) for network in shallow
        ],
    }
    for (label, points), style in zip(lines.items(), ("C1.--", "C2s:"), strict=True):
        axes.plot(*zip(*sorted(points), strict=True), style, label=label, zorder=1)
    axes.legend()
    figure.savefig(path, dpi=110)


class EpochLine(pl.Callback):
    """Says after each epoch how the full network fares."""

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done, accuracy = trainer.current_epoch + 1, float(trainer.callback_metrics["val_acc"])
        say(f"  epoch {done} of {trainer.max_epochs}: validation accuracy of the full network {accuracy:.3f}")


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


@contextmanager
def only_our_messages() -> Iterator[None]:
    """Leave Lightning's tips and warnings out, keep what the callback says."""

    def is_ours(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.getMessage().startswith("InstaTune:")

    handlers = logging.getLogger("pytorch_lightning").handlers
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        for handler in handlers:
            handler.addFilter(is_ours)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(is_ours)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
