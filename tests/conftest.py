import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Nothing that a test writes lands in the repository, and no test moves another's random numbers.

    Nor the environment: Lightning leaves MASTER_PORT, WORLD_SIZE and others behind, and a process that
    inherits them takes itself for one of several.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    if "torch._dynamo.eval_frame" in sys.modules:  # a callback that lets graphs run eagerly must end it
        assert sys.modules["torch._dynamo.eval_frame"]._stance.stance == "default"
