"""A latency table's error on random subnetworks it was not made from, beside that of MACs.

Run: python benchmarks/bench_latency_table.py [--processor-time]

With --processor-time passes are timed by processor seconds of this process: for a machine that others use.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import pandas as pd
import timm
import torch

from lightning_nas.costs import Latency, LatencyTable, MACs
from lightning_nas.supernet import Supernet

PIXELS = (96, 160)
NETWORKS = 50


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    return float(pd.Series(one).rank().corr(pd.Series(other).rank()))


def main() -> None:
    """Print one row a network."""
    if is_processor_time := "--processor-time" in sys.argv:
        time.perf_counter = time.process_time  # type: ignore[assignment]  # the isolated process keeps its own
    torch.manual_seed(0)
    print(f"{'ViT-Tiny, one thread':<24} {'Spearman':>9} {'MAPE':>7} {'MACs':>7}   load   (Spearman >= 0.95)")
    for pixels in PIXELS:
        supernet = Supernet(timm.create_model("vit_tiny_patch16_224", img_size=pixels))
        images = torch.randn(1, 3, pixels, pixels)
        latency = Latency(supernet, images, isolated=not is_processor_time)
        table = LatencyTable.measure(latency, check=2)
        rng = np.random.default_rng(1)
        architectures = [supernet.space.sample(rng) for _ in range(NETWORKS)]
        measured = np.array([latency(architecture) for architecture in architectures])
        predicted = table.many(architectures)
        error = np.abs(predicted / measured - 1).mean()
        macs = MACs(supernet, images).many(architectures)
        print(
            f"{f'{pixels} pixels':<24} {spearman(predicted, measured):>9.3f} {error:>7.1%} "
            f"{spearman(macs, measured):>7.3f} {os.getloadavg()[0]:>6.1f}"
        )


if __name__ == "__main__":
    main()
