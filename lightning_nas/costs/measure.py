"""A command that measures a latency table on the machine it runs on; the search may run elsewhere.

python -m lightning_nas.costs.measure --network saved/ --shape [1,3,224,224] --out phone.json
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_nas.costs.latency import Latency
from lightning_nas.costs.table import LatencyTable
from lightning_nas.saving import load
from lightning_nas.space import SearchSpace
from lightning_nas.supernet import Supernet

__all__ = ["main", "measure"]


def measure(
    network: str,
    out: str,
    shape: list[int] | None = None,
    example: str | None = None,
    space: str | None = None,
    batch_size: int = 1,
    threads: int = 1,
    warmup: int = 10,
    repeats: int = 50,
    device: str = "cpu",
    cores: list[int] | None = None,
    networks: int | None = None,
    check: int = 50,
) -> LatencyTable:
    """Measure a latency table and write it as JSON.

    Args:
        network: a folder that nas.save wrote, or "package.module:function" that returns the network.
        out: the file to write.
        shape: of the input, with its batch, for a network that takes one tensor of floats.
        example: for others "package.module:function" that returns what the network is called with: a tensor,
            a tuple, or a dict of keywords.
        space: a file with the search space, as space.to_json() gives it; left out: the family's default.
        batch_size: samples in one pass.
        threads: of PyTorch within one operation, on a CPU.
        warmup: passes before those that count.
        repeats: passes that count, of each network.
        device: where, as PyTorch names it.
        cores: the processors that may be used (Linux).
        networks: how many the table is made from; left out: as many as its options need.
        check: how many further random ones its error is told from.

    Raises:
        ValueError: unless exactly one of shape and example is given, or for a name that leads to nothing.
    """
    if (shape is None) == (example is None):
        raise ValueError(
            "measure: give either shape, as [1,3,224,224], or example, as package.module:function, "
            f"got {shape=} and {example=}."
        )
    model = load(network) if Path(network).is_dir() else _called(network)
    if not isinstance(model, nn.Module):
        raise ValueError(f"measure: {network} must return a torch.nn.Module, got {type(model).__name__}.")
    chosen = None if space is None else SearchSpace.from_json(Path(space).read_text())
    latency = Latency(
        Supernet(model, chosen),
        torch.randn(shape) if shape is not None else _called(str(example)),
        batch_size,
        threads=threads,
        warmup=warmup,
        repeats=repeats,
        device=device,
        cores=cores,
        isolated=False,
    )
    table = LatencyTable.measure(latency, networks, check, progress=True)
    table.save(out)
    return table


def _called(name: str) -> Any:
    """What a function of that name returns."""
    module, _, function = name.partition(":")
    try:
        made = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"measure: {name!r} is neither a folder nor a package.module:function to import ({error})."
        ) from error
    return made()


def main(args: list[str] | None = None) -> None:
    """Run :func:`measure` from the command line.

    Args:
        args: in place of those of the command line.

    Raises:
        ImportError: without jsonargparse.
    """
    try:
        from jsonargparse import auto_cli
    except ImportError as error:
        raise ImportError(
            "The command needs jsonargparse: pip install lightning-nas[cli]. Without it call "
            "lightning_nas.costs.measure.measure(...)."
        ) from error
    table = auto_cli(measure, args=args, as_positional=False)
    print(f"{table.conditions['device']}: {table.error}")


if __name__ == "__main__":
    main()
