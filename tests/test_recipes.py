"""The shipped recipes do what their first lines say."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning_nas.callbacks import InstaTune
from PIL import Image

from lightning_nas.cli import main
from lightning_nas.modules import ImageClassifier

cli = pytest.importorskip("pytorch_lightning.cli")
pytest.importorskip("jsonargparse")
INSTATUNE_VIT = resources.files("lightning_nas.recipes") / "instatune_vit.yaml"
TINY = {"img_size": 224, "patch_size": 112, "embed_dim": 16, "depth": 3, "num_heads": 4}
SMALLER = [
    "--model.pretrained=false", f"--model.model_kwargs={json.dumps(TINY)}", "--model.num_classes=3",
    "--data.batch_size=6", "--data.num_workers=0",
    "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=2",
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.callbacks.budget=4",
]  # fmt: skip


@pytest.fixture
def photos():
    """Three classes of one colour each, where the recipe expects them."""
    rng = np.random.default_rng(0)
    for split, channel, number in np.ndindex(2, 3, 4):
        pixels = rng.integers(0, 80, (24, 24, 3))
        pixels[..., channel] += 150
        folder = Path("photos", ("train", "val")[split], f"class{channel}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def test_every_value_of_the_recipe_reaches_the_module_and_the_callback(photos):
    written = yaml.safe_load(INSTATUNE_VIT.read_text())
    arguments = ["--config", str(INSTATUNE_VIT), *SMALLER]
    built = cli.LightningCLI(args=arguments, run=False, save_config_callback=None)
    (callback,) = [c for c in built.trainer.callbacks if isinstance(c, InstaTune)]
    wanted = written["trainer"]["callbacks"][0]["init_args"]
    for name in ("monitor", "mode", "lr_factor", "space"):
        assert getattr(callback, name) == wanted[name]
    assert callback.costs == tuple(wanted["costs"])
    assert callback.sampler.random == wanted["sampler"]["init_args"]["random"]
    assert callback.budget == 4
    assert isinstance(built.model, ImageClassifier)
    assert built.model.mixing.label_smoothing == written["model"]["init_args"]["mixing"]["label_smoothing"]
    images, labels = next(iter(built.datamodule.val_dataloader()))
    assert images.shape == (6, 3, 224, 224)
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.dtype == torch.int64


@pytest.mark.slow
def test_the_recipe_runs_and_writes_what_it_says(photos):
    main(["fit", "--config", str(INSTATUNE_VIT), *SMALLER])
    folder = Path("checkpoints/instatune")
    written = {file.name for file in folder.iterdir()}
    assert {"candidates.csv", "result.json", "front.png", "study.log"} <= written
    found = json.loads((folder / "result.json").read_text())
    assert len(found["candidates"]) == 4
    assert [objective["name"] for objective in found["objectives"]] == ["val_acc", "macs", "params"]


def test_each_recipe_opens_with_what_it_is_the_command_and_the_expected_result():
    recipes = [f for f in resources.files("lightning_nas.recipes").iterdir() if f.name.endswith(".yaml")]
    assert recipes
    for recipe in recipes:
        opening = recipe.read_text().split("\n\n")[0]
        assert opening.startswith("# ")
        assert f"lightning-nas fit --config {recipe.name}" in opening
        assert "# Expected: " in opening
        assert "Time: " in opening


def test_samplers_strategies_and_loss_objects_can_be_written_in_yaml():
    from jsonargparse import ArgumentParser
    from lightning_nas.callbacks import InstaTune

    from lightning_nas.distillation import InstaTuneLoss
    from lightning_nas.sampling import Sandwich
    from lightning_nas.strategies import NSGA2

    written = {
        "warmup": 5,
        "sampler": {"class_path": "lightning_nas.Sandwich", "init_args": {"random": 3}},
        "strategy": {"class_path": "lightning_nas.strategies.NSGA2", "init_args": {"population": 8}},
        "students_learn_from": {"class_path": "lightning_nas.InstaTuneLoss", "init_args": {"alpha": 0.4}},
    }
    parser = ArgumentParser()
    parser.add_class_arguments(InstaTune, "callback")
    callback = parser.instantiate(parser.parse_object({"callback": written})).callback
    assert callback.sampler == Sandwich(random=3)
    assert callback.strategy == NSGA2(population=8)
    assert callback.student_loss == InstaTuneLoss(alpha=0.4)
    assert callback.phases.warmup == 5
    assert isinstance(callback.phases.warmup, int)
