"""NAS-Bench-Macro: a space of 6,561 networks whose accuracies are all known (see its README)."""

import csv
import gzip
from functools import cache
from pathlib import Path

from lightning_nas.space import Choice, SearchSpace

SPACE = SearchSpace([Choice(f"layer{i}", (0, 1, 2)) for i in range(8)])


@cache
def table():
    path = Path(__file__).parent / "data" / "nas_bench_macro" / "networks.csv.gz"
    with gzip.open(path, "rt", newline="") as file:
        return {row["key"]: (float(row["mean_acc"]), int(row["flops"])) for row in csv.DictReader(file)}


def digits(architecture):
    return "".join(str(architecture[f"layer{i}"]) for i in range(8))


class MegaFlops:
    """Multiply-adds in millions."""

    name, unit = "mflops", "M"

    def __call__(self, architecture):
        return table()[digits(architecture)][1] / 1e6


def accuracy(architecture):
    return {"accuracy": table()[digits(architecture)][0]}
