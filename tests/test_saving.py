"""What ``save`` and ``load`` promise for every network: the folder, what is refused, what is damaged."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lightning_nas.errors import SavedFolderError, UnsupportedError
from lightning_nas.saving import load, save
from lightning_nas.supernet import Supernet
from lightning_nas.testing import randomise
from tests.saved_folders import description_of, edit_tensors, forbid_code, lie_about_weights, rewrite

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
FILES = {"model.safetensors", "network.json"}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def vit(seed=0):
    return randomise(timm.create_model("vit_tiny_patch16_224", **TINY), seed).eval()


def cut():
    supernet = Supernet(vit())
    return supernet.extract(supernet.space.smallest)


def outputs(model):
    with torch.no_grad():
        return model(IMAGES)


def test_the_architecture_and_metrics_are_kept_with_the_network(tmp_path):
    metrics = {"accuracy": torch.tensor(0.5), "macs": np.int64(10)}
    description = description_of(save(vit(), tmp_path, architecture={"depth": 4}, metrics=metrics))
    assert description["architecture"] == {"depth": 4}
    assert description["metrics"] == {"accuracy": 0.5, "macs": 10}


def test_an_extracted_subnetwork_is_restored_with_the_supernets_outputs(tmp_path):
    supernet = Supernet(vit())
    for seed in range(3):
        architecture = supernet.space.sample(np.random.default_rng(seed))
        folder = save(supernet.extract(architecture), tmp_path / "it", architecture=architecture)
        assert description_of(folder)["architecture"] == dict(architecture)
        with supernet.using(architecture):
            assert torch.equal(outputs(load(folder)), outputs(supernet.model))


def test_a_compiled_network_is_saved_as_the_network_it_compiles(tmp_path):
    model = vit()
    assert torch.equal(outputs(load(save(torch.compile(model), tmp_path))), outputs(model))


# --- what is refused, before anything is written


REFUSED = {
    "no supported network": (
        lambda: nn.Linear(2, 2),
        "torch.nn.modules.linear.Linear cannot be saved; supported are .*every network of timm",
    ),
    "network inside": (lambda: nn.ModuleDict({"net": vit()}), "sub-module 'net' is one"),
    "elastic": (lambda: Supernet(vit()).model, r"still elastic .* Extract first"),
    "no values": (lambda: vit().to("meta"), "holds no values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_before_anything_is_written(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        save(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_is_no_module_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        save({}, tmp_path)


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ([1], TypeError)])
def test_a_metric_that_json_cannot_hold_is_refused(tmp_path, value, error):
    with pytest.raises(error, match="accuracy"):
        save(vit(), tmp_path / "folder", metrics={"accuracy": value})
    assert not (tmp_path / "folder").exists()


# --- the folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_of_ours_is_overwritten_and_other_files_in_it_stay(tmp_path):
    save(cut(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(vit(), tmp_path)
    assert set(contents(tmp_path)) == {*FILES, "notes.txt"}  # no network.py of the earlier network
    assert len(load(tmp_path).blocks) == 4


@pytest.mark.parametrize("stranger", ["weights.pt", "network.json"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, stranger):
    (tmp_path / stranger).write_text("{}")
    with pytest.raises(SavedFolderError, match="not empty"):
        save(vit(), tmp_path)
    assert contents(tmp_path) == {stranger: b"{}"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedFolderError, match="is a file"):
        save(vit(), tmp_path / "file")


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("failing", ["lightning_nas.saving.save_file", "lightning_nas.saving.os.replace"])
def test_an_interrupted_save_leaves_the_earlier_network_or_nothing(tmp_path, monkeypatch, failing, earlier):
    folder = tmp_path / "folder"
    if earlier:
        save(cut(), folder)
    before = contents(folder) if earlier else None

    def full_disk(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(failing, full_disk)
    with pytest.raises(OSError, match="disk full"):
        save(vit(), folder)
    assert contents(folder) == before if earlier else not folder.exists()
    assert not any(path.is_dir() for path in tmp_path.glob("folder/*"))


def test_weights_of_another_save_beside_an_old_description_do_not_load(tmp_path):
    first, second = save(vit(0), tmp_path / "a"), save(vit(1), tmp_path / "b")
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(SavedFolderError, match="SHA-256"):
        load(first)


# --- damaged folders


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


DAMAGES = {
    "no JSON": (lambda f: (f / "network.json").unlink(), "has no network.json"),
    "half a JSON": (lambda f: (f / "network.json").write_text('{"format": "light'), "not readable JSON"),
    "binary JSON": (lambda f: (f / "network.json").write_bytes(b"\xff\xfe\x00"), "not readable JSON"),
    "a list": (lambda f: (f / "network.json").write_text("[]"), "was not written by nas.save"),
    "another's JSON": (lambda f: rewrite(f, format="else"), "was not written by nas.save"),
    "a newer format": (
        lambda f: rewrite(f, format_version=99),
        "format version 99, this lightning-nas reads 1",
    ),
    "an unknown family": (
        lambda f: rewrite(f, family="os.system"),
        "'os.system', which is unknown.*timm, transformers",
    ),
    "no network": (lambda f: rewrite(f, network=None), "lacks 'network'"),
    "an empty network": (
        lambda f: rewrite(f, network={}),
        "describes a network that cannot be built .KeyError",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated weights": (truncate, "it was truncated or replaced"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "has 0 bytes"),
    "altered weights": (flip_a_byte, "SHA-256"),
    "a broken header": (lambda f: lie_about_weights(f, lambda w: w.write_bytes(b"\xff" * 64)), "is damaged"),
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("head.bias")), "head.bias is missing"),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))),
        "x is not part of the network",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"head.bias": torch.ones(6)})),
        r"head.bias is \(6,\), exp",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_which_file_and_what_to_do(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = save(vit(), tmp_path / "folder")
    damage(folder)
    with pytest.raises(SavedFolderError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SavedFolderError, match="there is no folder"):
        load(tmp_path / "nowhere")


def test_loading_runs_no_code_of_the_folder_and_unpickles_nothing(tmp_path, monkeypatch):
    folder = save(cut(), tmp_path)
    forbid_code(folder, monkeypatch)
    assert len(load(str(folder)).blocks) == 3
