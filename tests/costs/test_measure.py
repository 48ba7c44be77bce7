from __future__ import annotations

import json

import pytest
import torch

import lightning_nas as nas
from lightning_nas.costs import LatencyTable
from lightning_nas.costs.measure import main
from tests.costs.networks import tiny_vit

QUICK = ["--repeats", "1", "--warmup", "0", "--check", "5"]


def images():
    return {"x": torch.zeros(1, 3, 8, 8)}


def test_a_table_is_measured_there_and_loaded_here(tmp_path, capsys):
    model = tiny_vit()
    part = nas.supernet.default_space(model).restrict({"depth": (4,)})
    nas.save(model, tmp_path / "network")
    (tmp_path / "space.json").write_text(part.to_json())
    out = tmp_path / "table.json"
    network = ["--network", str(tmp_path / "network"), "--space", str(tmp_path / "space.json")]
    main([*network, "--shape", "[1,3,8,8]", "--out", str(out), "--batch_size", "2", *QUICK])
    supernet = nas.Supernet(tiny_vit(), part)
    table = LatencyTable.load(out, supernet, example_inputs=images())
    assert table.conditions["shapes"] == [[2, 3, 8, 8]]
    assert table.conditions["repeats"] == 1
    assert f"{table.conditions['device']}: {table.error}" in capsys.readouterr().out
    assert (table.many([supernet.space.largest]) > 0).all()


def test_network_and_example_may_come_from_functions(tmp_path):
    out = tmp_path / "table.json"
    functions = ["--network", "tests.costs.networks:tiny_vit", "--example", "tests.costs.test_measure:images"]
    main([*functions, "--out", str(out), *QUICK])
    assert json.loads(out.read_text())["network"]["class"] == "VisionTransformer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--network", "tests.costs.networks:tiny_vit"],
            r"give either shape.* got shape=None and example=None",
        ),
        (
            ["--network", "tests.costs.networks:tony", "--shape", "[1]"],
            r"'tests.costs.networks:tony' is neither",
        ),
        (
            ["--network", "nowhere", "--shape", "[1]"],
            r"'nowhere' is neither a folder nor a package.module:function",
        ),
        (
            ["--network", "tests.costs.test_measure:images", "--shape", "[1]"],
            r"must return a torch.nn.Module, got dict",
        ),
    ],
)
def test_what_leads_to_no_network_is_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--out", str(tmp_path / "table.json")])
