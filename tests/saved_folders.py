"""Ways to damage a folder that ``save`` wrote, and to see that nothing in it is run."""

import hashlib
import json

import safetensors.torch

MISSING = object()


def description_of(folder):
    return json.loads((folder / "network.json").read_text())


def rewrite(folder, **changes):
    """Other entries in network.json."""
    (folder / "network.json").write_text(json.dumps({**description_of(folder), **changes}))


def rewrite_network(folder, **changes):
    """Other entries under its "network"; MISSING takes one away."""
    network = {**description_of(folder)["network"], **changes}
    rewrite(folder, network={k: v for k, v in network.items() if v is not MISSING})


def lie_about_weights(folder, change):
    """Weights that are another network's, with a description that vouches for them."""
    file = folder / "model.safetensors"
    change(file)
    data = file.read_bytes()
    vouched = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    rewrite(folder, weights={**description_of(folder)["weights"], **vouched})


def edit_tensors(folder, edit):
    """Other tensors in the file, with a description that vouches for them."""

    def change(file):
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
        edit(tensors)
        safetensors.torch.save_file(tensors, file)

    lie_about_weights(folder, change)


def forbid_code(folder, monkeypatch):
    """Let the folder's Python file end the process, and let nothing be unpickled."""
    (source,) = folder.glob("*.py")
    source.write_text("raise SystemExit('code of the folder ran')")

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
