"""Relation distillation as a task: against loops over transformers' own hidden states, in a supernet too."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, BertModel, DistilBertConfig, DistilBertModel

import lightning_nas as nas
from lightning_nas.modules import RelationDistillation, SequenceClassifier
from lightning_nas.supernet import default_space
from lightning_nas.testing import randomise
from tests.distillation.test_features import relation_by_loops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def bert(seed=0, kind=BertModel, **sizes):
    return randomise(kind(BertConfig(**{**SIZES, **sizes})), seed)


def texts(size=12, seed=0):
    """Texts of 2 to 8 tokens, padded to 8 with nonsense."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (size, 8), generator=generator)
    lengths = torch.randint(2, 9, (size, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(8) < lengths).long()}


def rows(batch):
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def by_hand(student, teacher, batch, layer, heads=4, kind="mse_softmax"):
    """From the hidden states that transformers tells, by loops."""
    total = 0.0
    hidden = [
        model(**batch, output_hidden_states=True).hidden_states[:-1][index]
        for model, index in ((student, -1), (teacher, layer))
    ]
    blocks = student.encoder.layer[-1].attention.self, teacher.encoder.layer[layer].attention.self
    for name in ("query", "key", "value"):
        own, theirs = (
            getattr(block, name)(h).detach().double() for block, h in zip(blocks, hidden, strict=True)
        )
        total += relation_by_loops(own, theirs, heads, kind, batch["attention_mask"])
    return total


@pytest.mark.parametrize("kind", ["mse_softmax", "mse_scores", "kl"])
@pytest.mark.parametrize("layer", [-1, 0])
def test_the_loss_is_that_of_loops_over_the_texts_without_their_padding(kind, layer):
    student = bert(1, num_hidden_layers=2, hidden_size=12, num_attention_heads=2)
    module = RelationDistillation(student, bert(), layer=layer, kind=kind)
    loss, mask = module.relation_loss(texts())
    expected = by_hand(student, module.teacher, texts(), layer, kind=kind)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(mask, texts()["attention_mask"].bool())


def test_a_network_that_is_its_own_teacher_has_nothing_to_learn():
    module = RelationDistillation(bert(kind=BertForMaskedLM))
    assert type(module.model) is BertModel
    loss, _ = module.relation_loss(texts())
    assert loss == 0
    assert RelationDistillation(bert(), bert(1)).relation_loss(texts())[0] > 1e-5


@pytest.mark.parametrize("kind", ["mse_softmax", "kl"])
def test_the_validation_loss_does_not_depend_on_the_batches(kind):
    module, values = RelationDistillation(bert(1), bert(), kind=kind), []
    for size in (1, 5, 12):
        trainer = pl.Trainer(**QUIET)
        trainer.validate(module, DataLoader(rows(texts()), size), verbose=False)
        values.append(float(trainer.callback_metrics["val_loss"]))
    assert values == pytest.approx([module.relation_loss(texts())[0].item()] * 3, rel=1e-5)


def test_training_comes_closer_to_the_teacher_who_stays_as_it_was():
    module, before = RelationDistillation(bert(1), bert(), lr=5e-3), copy.deepcopy(bert().state_dict())
    first = module.relation_loss(texts())[0].item()
    trainer = pl.Trainer(max_epochs=5, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(rows(texts()), 4))
    assert module.relation_loss(texts())[0].item() < 0.7 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.teacher.state_dict().items())
    assert not module.teacher.training
    assert module.model.training
    assert {name.partition(".")[0] for name in module.state_dict()} == {"model"}


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_subnetwork_is_compared_by_the_last_block_that_runs(depth):
    module = RelationDistillation(bert(1), bert())
    keep = {2: (0, 3), 3: (0, 1, 2), 4: range(4)}
    space = default_space(
        module.model, shared=True, depth=(2, 3, 4), keep=keep, embed=(12, 24), mlp_ratio=(1.0, 2.0)
    )
    supernet = nas.Supernet(module.model, space)
    small = space.architecture({"depth": depth, "heads": 2, "embed": 12})
    with supernet.using(small):
        active, _ = module.relation_loss(texts())
    alone, _ = RelationDistillation(supernet.extract(small), bert(), heads=4).relation_loss(texts())
    assert torch.equal(active, alone)
    assert alone.item() == pytest.approx(by_hand(supernet.extract(small), bert(), texts(), -1), rel=1e-4)


class Gradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {name: p.grad for name, p in pl_module.model.named_parameters() if p.grad is not None}
        self.found = {name: gradient.clone() for name, gradient in found.items()}


def test_as_a_task_it_is_the_loss_of_the_largest_the_smallest_and_the_random_members_alike():
    space = default_space(bert(), shared=True, embed=(12, 24), mlp_ratio=(1.0, 2.0))
    module, gradients = RelationDistillation(bert(1), bert(), warmup=0), Gradients()
    reference = copy.deepcopy(module)
    callback = SupernetTraining(
        space=space, sampler=nas.Sandwich(random=2), students_learn_from="task", order=None, warmup=0, seed=3
    )
    asked = []
    module.teacher.register_forward_hook(lambda *args: asked.append(1))
    trainer = pl.Trainer(max_steps=1, callbacks=[callback, gradients], enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(rows(texts()), 12))
    assert len(asked) == 1
    supernet = nas.Supernet(reference.model, space)
    members = [space.largest, *nas.Sandwich(random=2).students(space, 3, 0, 0.0)]
    assert len(members) == 4
    for member in members:
        with supernet.using(member):
            reference.relation_loss(texts())[0].backward()
    expected = {n: p.grad for n, p in reference.model.named_parameters() if p.grad is not None}
    assert gradients.found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.found[name], gradient, rtol=1e-4, atol=1e-7)


def test_distilbert_names_its_projections_otherwise():
    config = DistilBertConfig(
        vocab_size=40, dim=24, n_layers=2, n_heads=4, hidden_dim=32, max_position_embeddings=16
    )
    names = ("*q_lin", "*k_lin", "*v_lin")
    student, teacher = (randomise(DistilBertModel(config), seed) for seed in (0, 1))
    loss, _ = RelationDistillation(student, teacher, projections=names).relation_loss(texts())
    assert 0 < loss < 3
    with pytest.raises(ValueError, match=r"in the model \(DistilBertModel\) projections=.* match 0, 0, 0"):
        RelationDistillation(student)


def test_a_folder_is_read_and_both_networks_are_those_in_it(tmp_path):
    bert().save_pretrained(tmp_path)
    module = RelationDistillation(tmp_path)
    assert module.relation_loss(texts())[0] == 0
    assert module.model.training
    assert module.teacher is not module.model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, r"layer=4, but the teacher has 4 blocks; give an index from -4 to 3"),
        ({"kind": "l1", "lr": 0.0}, r"lr must be above 0, got 0.0; kind must be 'mse_softmax'"),
        ({"heads": 0}, r"heads must be at least 1, got 0"),
        ({"projections": ("*qkv",)}, r"projections are three patterns"),
        ({"projections": ("*query", "*key", "*dense")}, r"in the model .* match 4, 4, 13 modules"),
    ],
)
def test_what_cannot_work_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RelationDistillation(bert(), **settings)


def test_a_batch_or_a_network_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"a dictionary of a tokenizer's tensors with 'input_ids', got list"):
        RelationDistillation(bert()).relation_loss([torch.zeros(1)])
    with pytest.raises(TypeError, match=r"a transformers network is needed, got Linear"):
        RelationDistillation(torch.nn.Linear(2, 2))


def test_a_narrow_student_is_fine_tuned_by_the_classifier_that_its_config_does_not_describe():
    supernet = nas.Supernet(bert(), default_space(bert(), shared=True, embed=(12, 24), mlp_ratio=(1.0, 2.0)))
    student = supernet.extract(supernet.space.architecture({"embed": 12, "heads": 3}))
    assert student.config.hidden_size == 24
    classifier = SequenceClassifier(student, num_labels=2, pooling="mean", max_length=16)
    assert classifier(**texts()).shape == (12, 2)
