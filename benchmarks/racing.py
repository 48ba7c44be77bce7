"""How much of the evaluations racing needs, and how often the front stays, in simulated searches.

Run: PYTHONPATH=. python benchmarks/racing.py
"""

from __future__ import annotations

import numpy as np

from lightning_nas import Racing
from tests.test_racing import Family, front, raced

SEARCHES = 40
SETTINGS = {  # name -> samples, candidates, proposed, samples a part, bounds
    "at random": (4000, 100, "drawn", 200, (0.0, 1.0)),
    "at random, 2,000 samples": (2000, 100, "drawn", 100, (0.0, 1.0)),
    "at random, 500 samples": (500, 60, "drawn", 25, (0.0, 1.0)),
    "at random, true front first": (4000, 100, "first", 200, (0.0, 1.0)),
    "at random, true front last": (4000, 100, "last", 200, (0.0, 1.0)),
    "30 at random, then evolved": (4000, 100, "evolved", 200, (0.0, 1.0)),
    "at random, batches of 32": (4000, 100, "drawn", 32, None),
    "at random, batches of 128": (4000, 100, "drawn", 128, None),
}


def main() -> None:
    """Print one row a setting."""
    print(f"{'proposed':<30} {'share, median':>14} {'share, least possible':>22} {'same front':>11}")
    for name, (samples, candidates, proposed, part, bounds) in SETTINGS.items():
        shares, least, same = [], [], 0
        for seed in range(SEARCHES):
            family = Family(seed, samples)
            members = family.evolved(candidates) if proposed == "evolved" else family.drawn(candidates)
            costs, scores = family.cost(members), family.correct(members)
            true = front(costs, scores.mean(1))
            if proposed in ("first", "last"):
                order = sorted(range(candidates), key=lambda i: (i in true) == (proposed == "last"))
                costs, scores = costs[order], scores[order]
                true = front(costs, scores.mean(1))
            values, share = raced(costs, scores, Racing(bounds=bounds), part)
            enters = [i in front(costs[: i + 1], scores[: i + 1].mean(1)) for i in range(candidates)]
            shares.append(share.mean())
            least.append(np.mean(enters))
            same += front(costs, values) == true
        print(
            f"{name:<30} {np.median(shares):>14.2f} {np.median(least):>22.2f} {same:>8}/{SEARCHES}",
            flush=True,
        )


if __name__ == "__main__":
    main()
