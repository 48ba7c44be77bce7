"""LINAS here and in DyNAS-T (dynast 1.6.0): evaluations and seconds to equal hypervolume on the same tables.

Run: DYNAST_PYTHON=/other/venv/bin/python PYTHONPATH=. python benchmarks/bench_against_dynast.py

The other environment: `pip install --no-deps dynast==1.6.0` and pymoo, scikit-learn, pandas, numba, torch,
torchvision, torchprofile, requests. dynast can't be imported whole by Python 3.11: its fairseq can't, and
current transformers lack what its BERT reads. The modules of its own transformers are therefore left out,
which a search of another network doesn't use. The network searched is given as dynast takes one from outside:
by BootstrapNAS, with evaluation functions of one's own.

Both have one thread, populations of 50 and the values of an architecture at once. dynast's inner search has
its 5,000 evaluations of such networks, ours its default of 10,000. What dynast measures again isn't counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

PROBLEMS, SEEDS, BUDGET, LEVELS = ("NAS-Bench-MACRO", "interacting"), 5, 250, (0.97, 0.98, 0.99)
EVENTS = "events.json"
Event = tuple[float, list[int]]
"""Seconds since the search began, and the positions of what was evaluated."""


def ours(problem: str, seed: int) -> list[Event]:
    """With the default storage."""
    import lightning_nas as nas
    from tests.tables import TABLES

    table, events = TABLES[problem](), list[Event]()

    def evaluate(architecture: nas.Architecture) -> dict[str, float]:
        events.append((time.perf_counter() - began, table.space.indices([architecture])[0].tolist()))
        return table.evaluate(architecture)

    began = time.perf_counter()
    nas.search(
        table.space, evaluate, table.objectives, strategy="linas", budget=BUDGET, seed=seed, progress=False
    )
    return events


def theirs(grids: str, seed: int) -> list[Event]:
    """In their environment, which need not hold this package."""

    class Absent(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in (
        "machine_translation.transformer_interface",
        "machine_translation.transformer_encoding",
        "text_classification.bert_interface",
        "image_classification.vit.vit_interface",
    ):
        sys.modules[f"dynast.supernetwork.{name}"] = Absent(name)
    from dynast.search.search_tactic import LINAS, BootstrapNASEncoding

    # It writes what it found as BootstrapNAS's own classes, which only nncf has: after the search.
    BootstrapNASEncoding.convert_subnet_config_to_bootstrapnas = staticmethod(lambda found: found)
    accuracy, cost = np.load(grids)
    events: list[Event] = []

    class Network:
        """A point of the table that dynast takes for a supernetwork of BootstrapNAS."""

        def get_search_space(self) -> dict[str, dict[int, list[int]]]:
            return {"width": {i: list(range(options)) for i, options in enumerate(accuracy.shape)}}

        def get_config_from_pymoo(self, vector: list[int]) -> list[int]:
            return vector

        def activate_config(self, vector: list[int]) -> None:
            self.active = tuple(int(position) for position in vector)

        def get_active_subnet(self) -> Network:
            return self

        def to(self, device: str) -> Network:
            return self

    def measured(network: Network) -> float:
        events.append((time.perf_counter() - began, list(network.active)))
        return float(accuracy[network.active])

    metrics = {
        "accuracy_top1": measured,
        "macs": lambda network: float(cost[network.active]),
        "params": lambda network: 0.0,
    }
    began = time.perf_counter()
    LINAS(
        supernet="bootstrapnas_image_classification", optimization_metrics=["accuracy_top1", "macs"],
        measurements=["accuracy_top1", "macs"], num_evals=BUDGET, results_path="results.csv", population=50,
        seed=seed, metric_eval_fns=metrics, bootstrapnas_supernetwork=Network(),
    ).search()  # fmt: skip
    return events


def run(python: str, *arguments: str) -> list[Event]:
    """One of both, in a process and folder of its own, with one thread."""
    script = Path(__file__).resolve()
    threads = {"OMP_NUM_THREADS": "1", "LOKY_MAX_CPU_COUNT": "1", "PYTHONPATH": str(script.parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(script), *arguments]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **threads}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{python} failed:\n{done.stderr[-3000:]}")
        events: list[Event] = json.loads((Path(folder) / EVENTS).read_text())
    return events


def reached(events: list[Event], problem: str) -> list[tuple[float, float]]:
    """Distinct evaluations and seconds to each level; infinite where it isn't reached."""
    from lightning_nas.results import hypervolume
    from tests.tables import TABLES

    table = TABLES[problem]()
    accuracy, cost = table.reference.values()
    points: dict[tuple[int, ...], tuple[float, float]] = {}
    result: list[tuple[float, float]] = []
    for seconds, row in events:
        at = tuple(row)
        if at in points:
            continue
        points[at] = (-float(table.grids[0][at]), float(table.grids[1][at]))
        share = hypervolume(np.array(list(points.values())), np.array([-accuracy, cost])) / table.exact
        while len(result) < len(LEVELS) and share >= LEVELS[len(result)]:
            result.append((len(points), seconds))
    return result + [(np.inf, np.inf)] * (len(LEVELS) - len(result))


def main() -> None:
    """Print one row a problem, level and package: medians over seeds."""
    python = os.environ.get("DYNAST_PYTHON")
    if not python:
        print(f"skipped: set DYNAST_PYTHON to a Python that has dynast 1.6.0; see {Path(__file__).name}")
        return
    from tests.tables import TABLES

    print(f"{f'median of {SEEDS} seeds':<18} {'share':>5} {'evaluations, s: here':>22} {'dynast':>16}")
    for problem in PROBLEMS:
        with tempfile.TemporaryDirectory() as folder:
            grids = str(Path(folder) / "grids.npy")
            np.save(grids, TABLES[problem]().grids)
            runs = [
                [
                    reached(run(sys.executable, "ours", problem, str(seed)), problem),
                    reached(run(python, "theirs", grids, str(seed)), problem),
                ]
                for seed in range(SEEDS)
            ]
        median = np.quantile(np.array(runs), 0.5, axis=0, method="higher")  # (package, level, what)
        for level, (here, there) in zip(LEVELS, zip(*median, strict=True), strict=True):
            print(
                f"{problem:<18} {level:>5} {here[0]:>12.0f} {here[1]:>9.1f} {there[0]:>9.0f} {there[1]:>6.1f}"
            )


if __name__ == "__main__":
    if len(sys.argv) == 4:  # in a process of its own
        search = {"ours": ours, "theirs": theirs}[sys.argv[1]]
        Path(EVENTS).write_text(json.dumps(search(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
