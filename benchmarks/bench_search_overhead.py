"""What a search costs beside its evaluations: seconds of free trials, and their share of evaluations of 1 s.

Run: python benchmarks/bench_search_overhead.py

Evaluations here return at once, so that all the time is the search's own: the strategy, the storage (the
default journal file, one transaction a trial) and, in the first row, what is imported on the way. It is the
same whatever an evaluation takes. Processor seconds tell what is left of it where others use the machine.
"""

from __future__ import annotations

import os
import tempfile
import time

import lightning_nas as nas

STRATEGIES = ("linas", "nsga2")
BUDGETS = (200, 1_000)
SPACE = nas.SearchSpace(
    nas.Choice(f"layers.{i}.{kind}", (1, 2, 3, 4)) for i in range(12) for kind in ("heads", "mlp")
)
SPACE = nas.SearchSpace([nas.Choice("depth", (8, 10, 12)), *SPACE])


class Units:
    """The sum of all choices."""

    name, unit = "units", ""

    def __call__(self, architecture: nas.Architecture) -> float:
        return float(sum(architecture.values()))


def evaluate(architecture: nas.Architecture) -> dict[str, float]:
    """More is better, the less so the more there is."""
    return {"accuracy": sum(value**0.5 * (1 + i % 5) for i, value in enumerate(architecture.values()))}


def main() -> None:
    """Print one row a strategy and budget."""
    print(f"{'free trials, 25 choices':<24} {'wall':>8} {'processor':>10} {'share of 1 s each':>18}   load")
    for budget in BUDGETS:
        for strategy in STRATEGIES:
            with tempfile.TemporaryDirectory() as folder:
                wall, processor = time.perf_counter(), time.process_time()
                nas.search(
                    SPACE, evaluate, [nas.Maximize("accuracy"), nas.Minimize(Units())], strategy=strategy,
                    budget=budget, storage=f"{folder}/search.log", progress=False,
                )  # fmt: skip
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
            print(
                f"{f'{strategy}, {budget:,}':<24} {wall:>6.1f} s {processor:>8.1f} s "
                f"{wall / budget:>17.1%}   {os.getloadavg()[0]:.1f}"
            )
    print("(1,000 in under 60 s; share at most 5 %)")


if __name__ == "__main__":
    main()
