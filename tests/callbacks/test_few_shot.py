"""Sub-spaces as supernets of their own: one table of all networks, each with the value that it has alone."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune, train_subspaces
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel

import lightning_nas as nas
from lightning_nas.modules import RelationDistillation, SequenceClassifier
from lightning_nas.supernet import default_space
from tests.modules.test_relation_distillation import QUIET, SIZES, bert, rows, texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Texts(pl.LightningDataModule):
    def __init__(self, size=16, batch=4):
        super().__init__()
        self.size, self.batch = size, batch

    def train_dataloader(self):
        return DataLoader(rows(texts(self.size)), self.batch)

    def val_dataloader(self):
        return DataLoader(rows(texts(6, seed=1)), 6)


def spaces():
    """Two sub-spaces of 8 and 4 networks; the small one drops other blocks at each depth."""
    large = {"depth": (3, 4), "embed": (18, 24), "mlp_ratio": (1.0, 2.0), "heads": (4,)}
    small = {"depth": (2, 3), "embed": (12,), "mlp_ratio": (1.0, 1.5), "heads": None}
    keep = {2: (0, 3), 3: (0, 1, 2), 4: range(4)}
    return {
        "large": default_space(bert(), shared=True, keep=keep, **large),
        "small": default_space(bert(), shared=True, keep=keep, **small),
    }


def quickly(name, **more):
    return pl.Trainer(**{"max_epochs": 1, "enable_checkpointing": False, **QUIET, **more})


def alone(network, teacher):
    """The loss on the held-out text of a network by itself."""
    network.eval()
    with torch.no_grad():
        return RelationDistillation(network, teacher).eval().relation_loss(texts(6, seed=1))[0].item()


def test_the_table_has_every_network_of_all_with_the_loss_and_costs_that_it_has_alone(caplog):
    caplog.set_level("INFO", logger="pytorch_lightning")
    module = RelationDistillation(bert(), bert(1), lr=1e-3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trained = train_subspaces(spaces(), quickly, module, Texts())
    assert caplog.text.count("the largest network of the space is a part of yours") == 1
    assert caplog.text.count("order: as stored; students learn from task.") == 2
    table = trained.result.to_dataframe()
    assert list(table["subspace"]).count("large") == 8
    assert list(table["subspace"]).count("small") == 4
    assert len({c.architecture.key for c in trained.result.candidates}) == 12
    for candidate in trained.result.candidates:
        network = trained.extract(candidate)
        assert type(network) is BertModel
        assert candidate.values["params"] == sum(p.numel() for p in network.parameters())
        assert candidate.values["val_loss"] == pytest.approx(alone(network, module.teacher), rel=1e-5)
    bound = sorted(c.values["macs"] for c in trained.result.candidates)[7]
    best = trained.result.best("val_loss", where={"macs": ("<=", bound)})
    below = [c for c in trained.result.candidates if c.values["macs"] <= bound]
    assert best.values["val_loss"] == min(c.values["val_loss"] for c in below)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any("Elastic" in type(m).__name__ for m in module.modules())


def test_each_sub_space_is_trained_as_it_would_be_by_itself():
    module = RelationDistillation(bert(), bert(1), lr=1e-3)
    trained = train_subspaces(spaces(), quickly, module, Texts(), seed=4)
    by_itself = RelationDistillation(bert(), bert(1), lr=1e-3)
    callback = InstaTune(
        monitor="val_loss", mode="min", space=spaces()["small"], students_learn_from="task", warmup=0,
        order=None, budget=4, seed=4, folder="other", sampler=nas.Sandwich(random=2),
    )  # fmt: skip
    quickly("small", callbacks=[callback]).fit(by_itself, datamodule=Texts())
    for one, other in zip(
        trained.supernets["small"].model.parameters(), by_itself.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_brings_every_network_closer_to_the_teacher_and_the_best_is_found(seed):
    module = RelationDistillation(bert(seed), bert(seed + 10), lr=2e-3)
    before = {}
    for name, space in spaces().items():
        supernet = nas.Supernet(module.model, space)
        before |= {
            (name, a.key): alone(supernet.extract(a), module.teacher) for a in supernet.space.enumerate()
        }
        supernet.release()
    trained = train_subspaces(
        spaces(), lambda name: quickly(name, max_epochs=4), module, Texts(size=64, batch=8), validate=()
    )
    after = {}
    for name, supernet in trained.supernets.items():
        after |= {
            (name, a.key): alone(supernet.extract(a), module.teacher) for a in supernet.space.enumerate()
        }
    assert after.keys() == before.keys()
    assert len(after) == 12
    assert all(after[key] < before[key] for key in after)
    best = trained.result.best("val_loss")
    assert alone(trained.extract(best), module.teacher) == min(after.values())


class Killed(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def saving(name, callbacks=()):
    checkpoint = ModelCheckpoint(dirpath=name, save_last=True)
    return quickly(name, max_epochs=2, enable_checkpointing=True, callbacks=[checkpoint, *callbacks])


@pytest.mark.slow
def test_runs_that_were_killed_go_on_and_equal_those_that_were_not():
    def fit(folder, kill="", **more):
        module = RelationDistillation(bert(), bert(1), lr=1e-3)
        return train_subspaces(
            spaces(),
            lambda name: saving(f"{folder}/{name}", [Killed()] if name == kill else []),
            module, Texts(), folder=f"{folder}/found", **more,
        )  # fmt: skip

    whole = fit("whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit("again", kill="small", ckpt_path="last")
    again = fit("again", ckpt_path="last")
    assert again.result.candidates == whole.result.candidates
    once_more = fit("again", ckpt_path="last")  # everything is complete and only read
    assert once_more.result.candidates == whole.result.candidates
    best = once_more.result.best("val_loss")
    for one, other in zip(
        once_more.extract(best).parameters(), whole.extract(best).parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_any_module_that_validates_will_do():
    torch.manual_seed(0)
    module = SequenceClassifier(
        BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)), num_labels=2, max_length=16
    )
    labelled = DataLoader(rows({**texts(), "labels": torch.arange(12) % 2}), 4)
    data = pl.LightningDataModule()
    data.train_dataloader = data.val_dataloader = lambda: labelled
    own = {
        "wide": nas.SearchSpace([nas.Choice("heads", (3, 4)), nas.Choice("embed", (24,))]),
        "narrow": nas.SearchSpace([nas.Choice("embed", (12,)), nas.Choice("mlp", (24, 48))]),
    }
    trained = train_subspaces(
        own, quickly, module, data, monitor="val_acc", mode="max", costs=["params"], budget=2
    )
    result = trained.result
    assert [o.name for o in result.objectives] == ["params", "val_acc"]
    assert result.best("val_acc").values["val_acc"] == max(c.values["val_acc"] for c in result.candidates)
    assert result.space["heads"].conditions == (("subspace", ("wide",)),)
    narrow = [c for c in result.candidates if c.architecture["subspace"] == "narrow"]
    assert [c.architecture["heads"] for c in narrow] == [4, 4]  # inactive: the largest
    assert trained.extract(narrow[0]).bert.embeddings.word_embeddings.weight.shape[1] == 12


def choices(**values):
    return nas.SearchSpace([nas.Choice(name, options) for name, options in values.items()])


class NeverTrained(RelationDistillation):
    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"at least one sub-space, as \{'tiny': 'autodistil-tiny'\}, got \{\}"),
        ({"a": choices(heads=(2, 9))}, r"'a': .*'heads' cannot be 9, only an integer from 1 to 4"),
        ({"a": choices(head=(2, 4))}, r"'a': .*no choice 'head' in it. Did you mean 'heads'"),
        ({"a": choices(mlp_ratio=(1.0, 3.0))}, r"'a': .*'mlp_ratio' 3.0 makes 72 units of 'embed' 24"),
        ({"a": "autodistil-tiny"}, r"'a': The space 'autodistil-tiny' is for a network with depth 12"),
        ({"a": None}, r"'a' holds no architecture, got None; give a SearchSpace or a preset's name"),
        ({"a": []}, r"'a' holds no architecture, got \[\]"),
        ({"a/b": choices(heads=(2, 4))}, r"'a/b' cannot be the name of a sub-space"),
        (
            {"a": choices(heads=(2, 4)), "b": choices(heads=(2, 4))},
            r"'a' and 'b' are the same sub-space; leave one out",
        ),
        (
            {"a": choices(heads=(2, 4)), "b": choices(embed=(12, 24)), "c": choices(embed=(6, 12))},
            r"'a' has no choice in common with another sub-space: it decides about heads, they about embed",
        ),
        (
            {"a": choices(heads=(2, 9)), "b": choices(mlp=(0, 48))},
            r"'a': .* cannot be 9.*'b': .* cannot be 0",
        ),
    ],
)
def test_sub_spaces_that_cannot_be_are_named_before_any_training(wrong, message):
    with pytest.raises(ValueError, match=message):
        train_subspaces(wrong, quickly, NeverTrained(bert()), Texts())


def test_trainers_that_cannot_be_are_named_before_any_training():
    module, two = NeverTrained(bert()), spaces()
    with pytest.raises(TypeError, match=r"each sub-space needs a fresh Trainer; give a function of its name"):
        train_subspaces(two, quickly("both"), module, Texts())
    with pytest.raises(TypeError, match=r"trainer\('large'\) must return a Trainer, got None"):
        train_subspaces(two, lambda name: None, module, Texts())
    shared = quickly("both")
    with pytest.raises(ValueError, match=r"must make a fresh Trainer for each sub-space"):
        train_subspaces(two, lambda name: shared, module, Texts())
    with pytest.raises(ValueError, match=r"a Trainer has a SupernetTraining or InstaTune callback"):
        train_subspaces(two, lambda name: quickly(name, callbacks=[InstaTune()]), module, Texts())
    for trainer in (quickly, lambda name: saving("one")):
        with pytest.raises(ValueError, match=r"needs a ModelCheckpoint .* a dirpath of its own"):
            train_subspaces(two, trainer, module, Texts(), ckpt_path="last")
    with pytest.raises(ValueError, match=r"ckpt_path='a.ckpt': it must be 'last'"):
        train_subspaces(two, saving, module, Texts(), ckpt_path="a.ckpt")
    with pytest.raises(ValueError, match=r"budget must be at least 1"):
        train_subspaces(two, quickly, module, Texts(), budget=0)
