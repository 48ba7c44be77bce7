"""The demo, made tiny: it prints its table, and what it leaves behind is what it printed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from lightning_nas.recipes import demo_vit
from PIL import Image

import lightning_nas as nas

pytest.importorskip("wandb")
pytest.importorskip("mlxtend")
pytest.importorskip("jsonargparse")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is better than of the largest")]
NETWORKS = ["small", "medium", "best", "full"]


def right_answers(network, images, labels):
    with torch.inference_mode():
        return (network.eval()(images).argmax(-1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder that one run with tiny settings wrote, and what it printed, errors included."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lightning_nas.recipes.demo_vit", "--epochs=2", "--budget=4"]
    ran = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ran.returncode == 0, ran.stdout
    return folder / "demo_output", ran.stdout


def test_the_demo_prints_its_networks_beside_two_references(demo):
    folder, printed = demo
    table = pd.read_csv(folder / "networks.csv", index_col="network")
    assert list(table.index) == NETWORKS
    for name in NETWORKS:
        (line,) = re.findall(rf"^ *{name} +\d.*$", printed, re.MULTILINE)
        assert f" {table.accuracy[name]:.3f} " in line
    assert table.MMACs.is_monotonic_increasing
    assert table.MMACs["small"] <= 0.35 * table.MMACs["full"]
    assert table.MMACs["medium"] <= 0.6 * table.MMACs["full"]
    assert (table["latency [ms]"] > 0).all()
    assert table[["random subnetwork", "first blocks"]].notna().all(axis=None)


def test_the_saved_networks_have_the_printed_accuracy_and_size(demo):
    folder, _ = demo
    table = pd.read_csv(folder / "networks.csv", index_col="network")
    test = demo_vit.mnist().test
    images, labels = (torch.stack(tuple(map(torch.as_tensor, column))) for column in zip(*test, strict=True))
    for name in NETWORKS[:-1]:
        network = nas.load(folder / name)
        assert isinstance(network, timm.models.VisionTransformer)
        assert right_answers(network, images, labels) == pytest.approx(table.accuracy[name], abs=1e-6)
        assert sum(p.numel() for p in network.parameters()) == table.parameters[name]


def test_the_demo_leaves_a_picture_a_study_and_an_offline_run(demo):
    folder, _ = demo
    with Image.open(folder / "front.png") as picture:
        assert min(picture.size) > 300
    assert (folder / "front.png").stat().st_size < 100_000
    assert (folder / "candidates.csv").exists()
    assert list((folder / "wandb").glob("offline-run-*"))


def test_the_demo_says_what_it_does_and_lightning_says_nothing(demo):
    _, printed = demo
    for line in ("Pretraining", "epoch 2 of 2", "InstaTune: the largest network equals yours bit for bit"):
        assert line in printed
    for noise in ("Tip", "available", "Warning", "wandb:", "max_epochs"):
        assert noise not in printed


@pytest.fixture
def photos():
    """Three classes of one colour each."""
    rng = np.random.default_rng(0)
    for channel, number in np.ndindex(3, 10):
        pixels = rng.integers(0, 80, (24, 24, 3))
        pixels[..., channel] += 150
        folder = Path("photos", f"class{channel}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return "photos"


def test_the_demo_runs_with_a_timm_model_on_a_folder_of_images_and_again(photos):
    settings = {"model": "test_vit", "images": photos, "epochs": 2, "batch_size": 6, "budget": 3}
    tables = []
    for _ in range(2):
        demo_vit.main(**settings)
        tables.append(
            pd.read_csv("demo_output/networks.csv", index_col="network").drop(columns="latency [ms]")
        )
    pd.testing.assert_frame_equal(*tables)
    assert nas.load("demo_output/small")(torch.zeros(1, 3, 160, 160)).shape == (1, 3)
