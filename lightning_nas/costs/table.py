"""A table of what each option of each layer costs, measured on a device and used anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_nas.costs.additive import Additive
from lightning_nas.costs.inputs import shapes_of
from lightning_nas.objectives import Cost
from lightning_nas.space import Architecture, SearchSpace, Value
from lightning_nas.supernet import Supernet

__all__ = ["LatencyTable", "Measured", "TableError"]

FORMAT, FORMAT_VERSION = "lightning-nas cost table", 1


class Measured(Cost, Protocol):
    """A cost that a table can be made of: it says of which supernet, and under which conditions."""

    supernet: Supernet

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Plain values that JSON can write; ``"device"`` and ``"shapes"`` are compared on loading."""


@dataclass(frozen=True)
class TableError:
    """How far a table's sums are from measurements of whole networks that it was not made from.

    Args:
        networks: how many random ones were compared.
        spearman: rank correlation.
        mape: mean of the absolute relative errors.
        drift: by what share networks took longer at the end than at the start: of a device that became warm,
            or busy, while it was measured.
    """

    networks: int
    spearman: float
    mape: float
    drift: float


class LatencyTable:
    """Predicts the latency of a subnetwork as the sum of what each of its layers takes; states its own error.

    There is an entry for each option of each layer, shared by blocks that are built alike. They are
    found by measuring whole networks: some that together contain every option, chosen so that each
    tells as much as it can, in random order; the entries are the least-squares solution for relative errors.
    (Layers measured alone miss caches and fusion, and their sum has to be corrected by whole networks after
    all.) Further random networks, not used for that, give :attr:`error`.

    Example:
        >>> import timm, torch
        >>> from lightning_nas.costs import Device, Roofline
        >>> supernet = Supernet(timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32))
        >>> device = Device(1e11, 1e10, name="phone")
        >>> table = LatencyTable.measure(Roofline(supernet, torch.zeros(1, 3, 32, 32), device))
        >>> "blocks.0 embed=192 layers.0.mlp=384" in table.entries
        True

    Made by :meth:`measure` and :meth:`load`.

    Attributes:
        supernet: whose architectures it predicts.
        entries: what each option of each layer takes; only their sums over a network mean something.
        error: against whole networks.
        conditions: what was measured, where and how.
    """

    def __init__(
        self,
        supernet: Supernet,
        entries: Mapping[str, float],
        error: TableError,
        conditions: Mapping[str, Any],
        name: str = "latency",
        unit: str = "ms",
    ) -> None:
        self.supernet, self.entries, self.error = supernet, dict(entries), error
        self.conditions, self.name, self.unit = dict(conditions), name, unit
        layers = Additive(supernet)
        self._sums = layers.sums(np.array([self.entries[entry] for entry in layers.entries]))

    @classmethod
    def measure(
        cls,
        cost: Measured,
        networks: int | None = None,
        check: int = 50,
        seed: int = 0,
        progress: bool = False,
    ) -> LatencyTable:
        """Measure whole networks and make a table of them.

        Args:
            cost: what measures one: a :class:`~lightning_nas.costs.Latency`, or any cost with ``.supernet``
                and ``.conditions``, such as one that asks a phone for its time.
            networks: how many the entries are found from; None: 20 more than twice the least that can do.
            check: how many further random ones its error is told from.
            seed: of the random choice.
            progress: whether to show a progress bar.

        Raises:
            ValueError: for too few networks or too many, a space too small, or a cost that is not positive.
        """
        if check < 2:
            raise ValueError(f"LatencyTable: check must be at least 2, to tell an error, got {check}.")
        space, layers, rng = cost.supernet.space, Additive(cost.supernet), np.random.default_rng(seed)
        draws = (space.sample(rng) for _ in range(2_000 + 20 * len(layers.entries)))
        pool = list(dict.fromkeys([space.largest, space.smallest, *draws]))
        counts = layers.counts(pool)
        needed = int(np.linalg.matrix_rank(counts))
        if len(pool) < needed + 2:
            raise ValueError(
                f"LatencyTable: a space of {space.size} architectures is too small for a table and its "
                "error; measure them all, one by one."
            )
        if networks is None:
            networks = max(needed, min(2 * needed + 20, len(pool) - check))
        if not needed <= networks <= len(pool) - 2:
            raise ValueError(
                f"LatencyTable: networks must be from {needed}, to tell the options of this space apart, to "
                f"{len(pool) - 2}, got {networks}. Leave it out for a good number."
            )
        order = _most_telling(counts, networks)
        order += np.setdiff1d(np.arange(len(pool)), order)[:check].tolist()  # random, as they were drawn
        measured, place = _measured(cost, [pool[i] for i in order], rng, progress)
        counts, is_check = counts[order], np.arange(len(order)) >= networks
        weighted = counts[~is_check] / measured[~is_check, None]
        values = np.linalg.lstsq(weighted, np.ones(networks))[0]
        predicted = counts @ values
        error = TableError(
            networks=int(is_check.sum()),
            spearman=_spearman(predicted[is_check], measured[is_check]),
            mape=float(np.mean(np.abs(predicted / measured - 1)[is_check])),
            drift=float(np.polyfit(place / len(place), measured / predicted, 1)[0]),
        )
        entries = dict(zip(layers.entries, map(float, values), strict=True))
        return cls(cost.supernet, entries, error, cost.conditions, cost.name, cost.unit)

    def __repr__(self) -> str:
        network, device = type(self.supernet.model).__name__, self.conditions.get("device")
        return f"LatencyTable({network}, {device!r}, {self.error})"

    def __call__(self, architecture: Mapping[str, Value]) -> float:
        """The prediction for one architecture."""
        return float(self._sums([architecture])[0])

    def many(self, architectures: Iterable[Mapping[str, Value]]) -> NDArray[np.float64]:
        """The prediction for each of many architectures."""
        return np.asarray(self._sums(architectures), dtype=np.float64)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON, for :meth:`load` on any machine."""
        text = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "network": _network(self.supernet),
            "space": json.loads(self.supernet.space.to_json()),
            "name": self.name,
            "unit": self.unit,
            "conditions": self.conditions,
            "error": asdict(self.error),
            "entries": self.entries,
        }
        Path(path).write_text(json.dumps(text, indent=1))
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, supernet: Supernet, *, example_inputs: Any = None, device: str | None = None
    ) -> LatencyTable:
        """Read what :meth:`save` wrote, for the same network, and the same space or a part of it.

        Args:
            path: of the file.
            supernet: whose architectures are predicted.
            example_inputs: what the network is called with; if given, its shape must be that of the table,
                whatever the batch.
            device: the name of the device meant; if given, the table must be of it.

        Raises:
            ValueError: for a file that is no table, or one of another network, space, shape or device.
        """
        try:
            table = json.loads(Path(path).read_text())
            if (table["format"], table["version"]) != (FORMAT, FORMAT_VERSION):
                raise KeyError("format")
            entries, conditions, stated = table["entries"], table["conditions"], TableError(**table["error"])
            space = SearchSpace.from_json(json.dumps(table["space"]))
            name, unit, network = table["name"], table["unit"], table["network"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"LatencyTable.load: {path} is no table of this version ({type(error).__name__}: {error}). "
                "Measure it again: python -m lightning_nas.costs.measure --help."
            ) from error
        fault = f"LatencyTable.load: {path} was measured"
        remedy = "Load the table that was measured for this, or measure one: lightning_nas.costs.measure."
        if device is not None and device != conditions.get("device"):
            raise ValueError(f"{fault} on {conditions.get('device')!r}, not on {device!r}. {remedy}")
        if network != (here := _network(supernet)):
            raise ValueError(
                f"{fault} for a network {_said(network)}, and this supernet's is {_said(here)}. {remedy}"
            )
        if example_inputs is not None:
            there, shapes = conditions.get("shapes", []), shapes_of(example_inputs)
            if [shape[1:] for shape in there] != [shape[1:] for shape in shapes]:
                raise ValueError(
                    f"{fault} on inputs of shape {there}, and example_inputs are of {shapes}; all but the "
                    f"batch must agree. {remedy}"
                )
        if missing := [entry for entry in Additive(supernet).entries if entry not in entries]:
            raise ValueError(
                f"{fault} for the space {space}, which lacks {len(missing)} options of this one, "
                f"{supernet.space}: {', '.join(missing[:3])}. {remedy}"
            )
        return cls(supernet, entries, stated, conditions, name, unit)


def _network(supernet: Supernet) -> dict[str, Any]:
    """What a table's network must share: its class, and the names and shapes of its tensors."""
    with supernet.paused() as model:
        shapes = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
        digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"class": type(model).__name__, "parameters": parameters, "shapes": digest}


def _said(network: Mapping[str, Any]) -> str:
    return f"{network['class']} of {network['parameters']:,} parameters (shapes {network['shapes']})"


def _most_telling(counts: NDArray[np.float64], number: int) -> list[int]:
    """Rows that determine the entries best: each in turn the least certain one (greedy D-optimal)."""
    spread = 1e6 * np.eye(counts.shape[1])  # covariance of the entries, before anything is measured
    chosen: list[int] = []
    for _ in range(number):
        variances = np.einsum("ij,jk,ik->i", counts, spread, counts, optimize=True)
        variances[chosen] = -1
        chosen.append(int(variances.argmax()))
        along = spread @ counts[chosen[-1]]
        spread -= np.outer(along, along) / (1 + variances[chosen[-1]])
    return chosen


def _measured(
    cost: Cost, architectures: list[Architecture], rng: np.random.Generator, progress: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each one's cost, and its place in the random order they were measured in."""
    costs, place = np.empty(len(architectures)), np.empty(len(architectures), dtype=np.int64)
    for n, i in enumerate(tqdm(rng.permutation(len(architectures)), "measuring", disable=not progress)):
        costs[i], place[i] = cost(architectures[i]), n
        if not costs[i] > 0:
            raise ValueError(
                f"LatencyTable: {cost.name} must be positive, got {costs[i]} for {architectures[i].key}."
            )
    return costs, place


def _spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    ranks = pd.DataFrame({"one": one, "other": other}).rank()
    return float(ranks["one"].corr(ranks["other"]))
