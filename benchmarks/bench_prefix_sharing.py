"""Subnetworks measured together, sharing their first blocks, against one after another.

Run: python benchmarks/bench_prefix_sharing.py
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import timm
import torch

from lightning_nas.space import Architecture, SearchSpace
from lightning_nas.supernet import Supernet, SupernetEvaluator

REPEATS = 5


def crossed(space: SearchSpace, rng: np.random.Generator, count: int, points: int) -> list[Architecture]:
    """Children of ten parents, by crossover at as many points and one mutation."""
    parents = [space.sample(rng) for _ in range(10)]
    children = []
    for _ in range(count):
        one, other = (dict(parents[i]) for i in rng.choice(10, 2, replace=False))
        cuts = sorted(rng.choice(len(space.names) + 1, points, replace=False))
        taken = {name: other[name] for name in space.names[cuts[0] : cuts[-1]]}
        name = rng.choice(space.names)
        children.append(space.architecture({**one, **taken, name: rng.choice(space[name].values).item()}))
    return children


def main() -> None:
    """Print one row a population."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    supernet = Supernet(timm.create_model("vit_tiny_patch16_224", depth=12, img_size=96).eval())
    space, rng = supernet.space, np.random.default_rng(0)
    batches = [(torch.randn(16, 3, 96, 96),) for _ in range(1)]
    late = [  # neighbours of one network that differ in the last third
        space.architecture({**space.largest, f"layers.{i}.{kind}": space[f"layers.{i}.{kind}"].values[value]})
        for i in (8, 9, 10, 11) for kind in ("heads", "mlp") for value in (0, 1)
    ]  # fmt: skip
    populations = {
        "random": [space.sample(rng) for _ in range(16)],
        "two-point crossover": crossed(space, rng, 16, 2),
        "changes in the last third": late,
    }
    columns = "".join(f"{column:>14}" for column in ("blocks saved", "ideal ratio", "time ratio", "noise"))
    print(f"{'population of 16, 12 blocks':<30}{columns}")
    for name, members in populations.items():
        shared, alone, same = (
            SupernetEvaluator(supernet, batches, lambda output, _: output.argmax(1), share_prefixes=shares)
            for shares in (True, False, False)
        )
        ratios, noise = [], []
        for repeat in range(REPEATS + 1):
            times = []
            for evaluate in (shared, alone, same):
                start = time.process_time()
                evaluate.many(members)
                times.append(time.process_time() - start)
            if repeat:
                ratios.append(times[1] / times[0])
                noise.append(times[1] / times[2])
        ran, saved = shared.prefixes.executed, shared.prefixes.skipped
        ideal = (ran + saved) / ran
        ratio = "".join(f"{value:>14.2f}" for value in (ideal, median(ratios), median(noise)))
        print(f"{name:<30}{saved / (ran + saved):>14.1%}{ratio}")


if __name__ == "__main__":
    main()
