"""Every strategy on problems whose exact fronts are known: hypervolume against evaluations, ten seeds.

Run: PYTHONPATH=. python benchmarks/search_strategies.py

It takes about 20 minutes on one core. The tables go into docs/compare-strategies.md, the plot beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import lightning_nas as nas
from tests.tables import TABLES, Table

NAMES = ["linas", "gbdt", "nsga2", "nsga3", "evolution", "tpe", "coarse-to-fine", "grid"]
BUDGET, LONG, SEEDS = 250, 1_000, 10
PAGE = Path(__file__).parents[1] / "docs" / "compare-strategies.md"
BEGIN, END = "<!-- benchmarks/search_strategies.py -->\n", "<!-- end -->\n"


def compared(table: Table, names: list[str], budget: int, objectives: list[nas.Objective]) -> nas.Comparison:
    """Of all seeds, counted from the table's reference."""
    return nas.compare(
        names, table.space, table.evaluate, objectives, budget=budget, seeds=SEEDS, storage="memory",
        reference={o.name: table.reference[o.name] for o in objectives}, progress=sys.stderr.isatty(),
    )  # fmt: skip


def until(curves: np.ndarray, enough: float) -> float:
    """Evaluations to a quality, in the median over seeds; infinite where half of them never have it."""
    reached = curves >= enough
    counts = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, np.inf)
    return float(np.quantile(counts, 0.5, method="higher"))


def shares(table: Table, short: nas.Comparison, long: nas.Comparison) -> dict[str, str]:
    """What each strategy reaches, in words."""
    gains = short.summary()
    cells = {}
    for name, curves in short.curves.items():
        low, median, high = np.quantile(curves[:, -1] / table.exact, (0.25, 0.5, 0.75))
        beats = name == "random" or gains.loc[name, "gain from"] > 0
        cells[name] = f"{median:.3f} ({low:.3f} to {high:.3f}){'' if beats else ' *'}"
    final = np.median(long.curves["nsga2"][:, -1])
    cells["`nsga2` after 1,000"] = f"{final / table.exact:.3f}"
    cells["`linas` has that after"] = f"{until(short.curves['linas'], final):.0f}"
    return cells


def first_of_the_best(table: Table) -> dict[str, str]:
    """Evaluations that one objective needs to the top 0.1 %, and what chance needs in the mean."""
    least, count = table.top(0.001)
    found = compared(table, ["gbdt"], BUDGET, [nas.Maximize("accuracy")])
    chance = (len(table.accuracies) + 1) / (count + 1)
    return {"gbdt": f"{until(found.curves['gbdt'], least):.0f}", "chance": f"{chance:.0f}"}


def rows(columns: dict[str, dict[str, str]]) -> str:
    """A table with a column a problem."""
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name in next(iter(columns.values())):
        label = f"`{name}`" if name in (*NAMES, "random") else name
        lines.append(f"| {label} | {' | '.join(column[name] for column in columns.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both tables and the plot."""
    fronts, best = {}, {}
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (name, table) in zip(
        figure.subplots(2, 2).flat, ((n, make()) for n, make in TABLES.items()), strict=True
    ):
        short = compared(table, NAMES, BUDGET, table.objectives)
        long = compared(table, ["nsga2"], LONG, table.objectives)
        fronts[name], best[name] = shares(table, short, long), first_of_the_best(table)
        print(rows({name: fronts[name] | {f"top 0.1 %: {k}": v for k, v in best[name].items()}}), flush=True)
        for strategy, curves in short.curves.items():
            style = {"color": "0.5", "linestyle": "--"} if strategy == "random" else {}
            axes.plot(
                np.arange(1, BUDGET + 1), np.median(curves, axis=0) / table.exact, label=strategy, **style
            )
        axes.set(title=name, xlabel="evaluations", ylabel="share of the exact hypervolume", ylim=(0.7, 1.005))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(PAGE.parent / "images" / "strategies.png", dpi=110)
    before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = after.partition(END)[2]
    caption = "\nEvaluations to the best 0.1 % in accuracy alone, in the median; chance in the mean:\n\n"
    PAGE.write_text(f"{before}{BEGIN}\n{rows(fronts)}{caption}{rows(best)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
