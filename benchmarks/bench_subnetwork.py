"""A subnetwork inside its supernet against its extracted copy, and architectures counted a second.

Run: python benchmarks/bench_subnetwork.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import timm
import torch

from lightning_nas.costs import MACs
from lightning_nas.supernet import Supernet

REPEATS = 15


def interleaved(*calls: Callable[[], object]) -> list[list[float]]:
    """Processor seconds of each call, taken in turn: a slow moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 2):
        for call, record in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if repeat >= 2:
                record.append(time.process_time() - start)
    return times


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios of calls that ran next to each other."""
    return median(one / other for one, other in zip(times, others, strict=True))


def step(network: torch.nn.Module, images: torch.Tensor, is_training: bool) -> None:
    """One forward pass, and a backward one where asked."""
    with torch.set_grad_enabled(is_training):
        output = network(images)
    if is_training:
        output.sum().backward()
        network.zero_grad()


def main() -> None:
    """Print one row a measure."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("vit_small_patch16_224", depth=4).eval()
    supernet = Supernet(model)
    rng = np.random.default_rng(0)
    print(f"{'measure':<52} {'value':>10} {'noise':>7}   bound")
    for name, architecture in (("smallest", supernet.space.smallest), ("random", supernet.space.sample(rng))):
        networks = [model, supernet.extract(architecture), supernet.extract(architecture)]
        supernet.activate(architecture)
        for batch, is_training in ((1, False), (8, False), (8, True)):
            images = torch.randn(batch, 3, 224, 224)
            inside, plain, same = interleaved(*(partial(step, n, images, is_training) for n in networks))
            row = f"{name}, inside / extracted, {'step' if is_training else 'forward'}, batch {batch}"
            print(f"{row:<52} {ratio(inside, plain):>10.3f} {ratio(same, plain):>7.3f}   <= 1.03")
    (spent,) = interleaved(lambda: supernet.activate(supernet.space.smallest))
    print(f"{'activate, milliseconds':<52} {median(spent) * 1e3:>10.3f}")
    macs = MACs(supernet, torch.zeros(1, 3, 224, 224))
    drawn = [supernet.space.sample(rng) for _ in range(20_000)]
    (spent,) = interleaved(lambda: macs.many(drawn))
    print(
        f"{'architectures a second, macs.many':<52} {len(drawn) / median(spent):>10,.0f} {'':>7}   >= 100,000"
    )


if __name__ == "__main__":
    main()
