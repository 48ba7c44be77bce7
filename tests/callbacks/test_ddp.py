"""Two processes (gloo) compute what one process does with the joined batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks import ddp_program
from tests.callbacks.test_supernet_training import assert_same, weights

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ddp, pytest.mark.slow]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder in which two processes wrote what their runs ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.ddp_program", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    "name", ["teacher", "both", "at the start", "itself", "binary", "blocks of students alone"]
)
def test_two_processes_agree_and_equal_one_with_the_joined_batch(ended, name):
    first, second = (torch.load(ended / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second, rtol=0, atol=0)
    single = ddp_program.run(name, ended, devices=1).lightning_module
    assert_same(dict(first), weights(single), rtol=0, atol=1e-10)


def test_a_search_on_two_processes_gives_both_the_same_front(ended):
    first, second = (torch.load(ended / f"search{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second, rtol=0, atol=0)
    fronts = [json.loads((ended / f"front{rank}.json").read_text()) for rank in (0, 1)]
    assert fronts[0] == fronts[1]
    assert fronts[0]
    assert (ended / "found" / "front.png").exists()


def test_two_processes_stop_the_same_candidates_by_the_batches_of_both(ended):
    first, second = (torch.load(ended / f"race{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second, rtol=0, atol=0)
    raced = [json.loads((ended / f"race{rank}.json").read_text()) for rank in (0, 1)]
    assert raced[0] == raced[1]
    shares = [values["share"] for _, values in raced[0]]
    assert {1.0} < set(shares)
    assert all(round(share * 45) == pytest.approx(share * 45) for share in shares)  # batches of both
