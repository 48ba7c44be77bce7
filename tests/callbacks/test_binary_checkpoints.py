"""Checkpoints of float and binary runs in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks import binary_program
from tests.callbacks.test_supernet_training import assert_same

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_float_binary_and_resumed_checkpoints_go_on_in_a_fresh_process(tmp_path):
    binary_program.run(tmp_path, None, epochs=1, keep="float", is_binary=False)
    whole, metrics = binary_program.run(tmp_path, None, keep="{epoch}")
    from_float, _ = binary_program.run(tmp_path, "float")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.binary_program", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh = torch.load(tmp_path / "fresh.pt", weights_only=True)
    assert_same(fresh["float"], from_float, rtol=0, atol=0)
    assert_same(fresh["resumed"], whole, rtol=0, atol=0)
    assert fresh["validated"] == pytest.approx({name: metrics[name] for name in fresh["validated"]}, rel=1e-6)
