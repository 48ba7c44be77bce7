"""One callback turns the fine-tuning of a pretrained BERT into a family of smaller BERTs.

MiniLM (6 layers, 384 wide) learns the sentiment of film-review sentences; six to ten minutes on a CPU:

    python -m lightning_nas.recipes.demo_bert

or all 8,000 sentences, and any other encoder in a folder or on the hub:

    python -m lightning_nas.recipes.demo_bert --model bert-base-uncased --sentences 8000 --budget 60

Written to --output: the front as a picture, tables, the study, three networks, W&B's files.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
import wandb
from lightning_nas.callbacks import InstaTune
from lightning_nas.recipes.demo_vit import (
    FORMATS,
    OFFLINE,
    QUIET,
    SHARES,
    EpochLine,
    latency_ms,
    only_our_messages,
    say,
    three_of,
)
from lightning_nas.recipes.sentiment import SentimentData, minilm_folder
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_nas as nas
from lightning_nas.modules import SequenceClassifier

HELD_OUT = 1600  # of 2,043 validation sentences, unseen by training and search


def main(
    model: str | None = None,
    sentences: int = 1600,
    epochs: int = 2,
    lr: float = 5e-5,
    lr_factor: float = 6.0,
    budget: int = 24,
    output: str = "demo_bert_output",
    seed: int = 0,
) -> None:
    """Fine-tune a BERT with InstaTune, search its subnetworks, extract three of them and compare.

    Args:
        model: a Hugging Face name or folder of an encoder; by default MiniLM.
        sentences: how many to train on, at most 8,000.
        epochs: of fine-tuning, the first half plain, the second with subnetworks.
        lr: peak learning rate.
        lr_factor: what it is multiplied with while subnetworks train.
        budget: candidates that the search evaluates.
        output: folder to write to.
        seed: of everything.
    """
    started, folder = time.perf_counter(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with only_our_messages():
        pl.seed_everything(seed, verbose=False)
        source = minilm_folder() if model is None else model
        data = SentimentData(source, train=sentences, test=HELD_OUT, seed=seed)
        settings: dict[str, Any] = {"num_labels": 2, "pooling": "mean", "lr": lr}

        # --- a Lightning user's script, and one callback
        say(f"Fine-tuning on {sentences:,} sentences:")
        module = SequenceClassifier(source, **settings)
        pretrained = copy.deepcopy(module)  # for the comparison below
        instatune = InstaTune(
            monitor="val_acc", budget=budget, seed=seed, folder=folder,
            warmup=0.5, lr_factor=lr_factor, head="head", validate=(),
        )  # fmt: skip
        logger = WandbLogger(experiment=wandb.init(project="lightning-nas-demo", dir=folder, **OFFLINE))
        trainer = pl.Trainer(
            max_epochs=epochs, logger=logger, gradient_clip_val=1.0, num_sanity_val_steps=0,
            callbacks=[instatune, EpochLine()], **QUIET,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
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
        example = {name: tensor[:1] for name, tensor in data.parts["test"].items() if name != "labels"}
        random = random_search(instatune, module, data, example, budget, seed)
        shallow: dict[int, float] = {}  # number of layers -> accuracy
        rows = []
        for name, candidate in chosen.items():
            macs = candidate.values["macs"]
            peer = instatune.extract(random.best("val_acc", where={"macs": ("<=", macs)}))
            first = shallower(pretrained.model, macs, example)
            depth = first.config.num_hidden_layers
            if depth not in shallow:
                pl.seed_everything(seed, verbose=False)
                alone = with_network(pretrained, first)
                plain = pl.Trainer(
                    max_epochs=epochs, logger=False, gradient_clip_val=1.0, limit_val_batches=0, **QUIET
                )
                plain.fit(alone, datamodule=data)
                shallow[depth] = accuracy(alone, data.test_dataloader())
            test = data.test_dataloader()
            rows.append(
                {
                    "network": name,
                    "accuracy": accuracy(with_network(module, networks[name]), test),
                    "MMACs": macs / 1e6,
                    "parameters": sum(p.numel() for p in networks[name].parameters()),
                    "random subnetwork": accuracy(with_network(module, peer), test),
                    "first blocks": shallow[depth],
                    "of them": depth,
                }
            )
        table = pd.DataFrame(rows).set_index("network")
        table.insert(3, "latency [ms]", pd.Series(latency_ms(networks, example, repeats=30)))

    table.to_csv(folder / "networks.csv")
    say(f"\nAccuracy on {HELD_OUT:,} sentences that neither training nor search has seen:\n")
    say(table.reset_index().to_string(index=False, formatters=FORMATS))
    say(
        f"\nrandom subnetwork: of {budget} random ones the best on validation sentences at no higher cost."
        "\nfirst blocks: as many of the pretrained network's as reach that cost, trained alone as long;"
        "\n    all of them, in the last row, are plain fine-tuning without the callback."
        f"\n\nFront: {folder / 'front.png'}; networks: {', '.join(str(folder / name) for name in SHARES)}."
        f"\n{time.perf_counter() - started:.0f} s in all."
    )


def with_network(module: SequenceClassifier, network: nn.Module) -> SequenceClassifier:
    """A copy of the module, its head included, around another network."""
    return copy.deepcopy(module, {id(module.model): network})


def shallower(network: Any, macs: float, example: dict[str, Tensor]) -> Any:
    """The plain way to a cheaper network: its first layers, as many as reach that cost."""
    network = copy.deepcopy(network)
    depths = range(1, network.config.num_hidden_layers + 1)
    space = nas.supernet.default_space(network, heads=None, mlp=None, depth=depths, keep="first")
    supernet = nas.Supernet(network, space=space)
    cost = nas.costs.MACs(supernet, example)
    architectures = [space.architecture({"depth": depth}) for depth in depths]
    return supernet.extract(next(a for a in architectures if cost(a) >= macs))


def random_search(
    instatune: InstaTune,
    module: SequenceClassifier,
    data: SentimentData,
    example: dict[str, Tensor],
    budget: int,
    seed: int,
) -> nas.SearchResult:
    """As many subnetworks of the same supernet, drawn blindly."""
    supernet = instatune.supernet
    assert supernet is not None  # made by fit

    def evaluate(architecture: nas.Architecture) -> dict[str, float]:
        with supernet.using(architecture):
            return {"val_acc": accuracy(module, data.val_dataloader())}

    return nas.search(
        supernet.space,
        evaluate,
        [nas.Maximize("val_acc"), nas.Minimize(nas.costs.MACs(supernet, example))],
        strategy="random", budget=budget, storage="memory", seed=seed, progress=False,
        initial=[supernet.space.smallest],
    )  # fmt: skip


def accuracy(module: SequenceClassifier, batches: DataLoader[Any]) -> float:
    """Share of sentences that the module gets right."""
    module.eval()
    with torch.inference_mode():
        right = []
        for batch in batches:
            logits = module(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            right.append(logits.argmax(-1) == batch["labels"])
    return torch.cat(right).float().mean().item()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
