"""Supernet training of text encoders, as users call them: keywords, padding, batches of many lengths."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SelfDistillation, SupernetTraining
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import lightning_nas as nas
from tests.callbacks.test_supernet_training import (
    AT_ONCE,
    SANDWICH,
    assert_same,
    cross_entropy_of_soft_targets,
    fit,
    sandwich,
    weights,
)

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip


class TextClassifier(pl.LightningModule):
    """As the examples of transformers have it: the network is called with the batch and knows the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        output = self.model(**batch)
        self.log("loss", output.loss)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class SentenceClassifier(TextClassifier):
    """Mean pooling over the tokens of a network without a head."""

    def __init__(self, model):
        super().__init__(model)
        self.head = torch.nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        mask = batch["attention_mask"]
        tokens = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        pooled = (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return F.cross_entropy(self.head(pooled), batch["labels"])


def build(kind="classifier", dropout=0.0):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind == "distilbert":
        config = DistilBertConfig(
            vocab_size=50, dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=16,
            num_labels=3, dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
        )  # fmt: skip
        return TextClassifier(DistilBertForSequenceClassification(config))
    if kind == "sentences":
        return SentenceClassifier(BertModel(BertConfig(**SIZES, **rates), add_pooling_layer=False))
    if kind == "tokens":
        return TextClassifier(BertForTokenClassification(BertConfig(**SIZES, **rates)))
    if kind == "answers":
        return TextClassifier(BertForQuestionAnswering(BertConfig(**{**SIZES, "num_labels": 2}, **rates)))
    return TextClassifier(BertForSequenceClassification(BertConfig(**SIZES, **rates)))


def buckets(kind="classifier", further=0):
    """Four batches of four padded texts, each of another length, and padded further."""
    generator, batches = torch.Generator().manual_seed(0), []
    for length in (5, 9, 7, 12):
        lengths = torch.randint(2, length + 1, (4, 1), generator=generator)
        ids = torch.randint(1, 50, (4, length), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if kind == "answers":
            batch |= {"start_positions": torch.tensor([0, 1, 0, 1]), "end_positions": torch.ones(4).long()}
        elif kind == "tokens":
            batch["labels"] = (ids % 3).masked_fill(mask == 0, -100)
        else:
            batch["labels"] = torch.arange(4) % 3
        for name, value in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
            if name in batch and batch[name].ndim == 2:
                batch[name] = F.pad(batch[name], (0, further), value=value)
        batches.append(batch)
    return DataLoader(batches, batch_size=None)


def read(output):
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), 1)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def unit_distance(student, teacher):
    return (F.normalize(student, dim=-1) - F.normalize(teacher.detach(), dim=-1)).square().sum(-1).mean()


def distance_of(kind, student, teacher, mask):
    """Of outputs token by token the mean over the tokens that count, one after the other."""
    distance = unit_distance if kind == "sentences" else cross_entropy_of_soft_targets
    if kind not in ("sentences", "tokens"):
        return distance(student, teacher)
    tokens = [(i, j) for i in range(len(mask)) for j in range(mask.shape[1]) if mask[i, j]]
    return sum(distance(student[[i], j], teacher[[i], j]) for i, j in tokens) / len(tokens)


@pytest.mark.parametrize("kind", ["classifier", "sentences", "tokens", "answers", "distilbert"])
@pytest.mark.parametrize(("learn", "task_share"), [("teacher", 0.0), ("both", 0.5)])
def test_a_run_over_buckets_of_lengths_equals_the_loop_written_by_hand(kind, learn, task_share):
    ours, hand = build(kind).double(), build(kind).double()
    callback = SupernetTraining(sampler=SANDWICH, students_learn_from=learn, **AT_ONCE)
    fit(ours, callback, buckets(kind), max_epochs=1, precision="64-true")

    supernet, optimizer = nas.Supernet(hand.model), hand.configure_optimizers()
    hand.log, seen = lambda *_: None, []
    hand.model.register_forward_hook(lambda module, inputs, output: seen.append(read(output)))
    hand.train()
    for step, batch in enumerate(buckets(kind)):
        optimizer.zero_grad()
        hand.training_step(batch, step).backward()
        teacher = seen[-1]
        for member in sandwich(supernet.space, step):
            with supernet.using(member):
                task = hand.training_step(batch, step)
                taught = distance_of(kind, seen[-1], teacher, batch["attention_mask"])
                (task_share * task + (1 - task_share) * taught).backward()
        optimizer.step()
    # Features are compared in float32, whatever the network computes in.
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-7 if kind == "sentences" else 1e-12)


@pytest.mark.parametrize("kind", ["sentences", "tokens"])
@pytest.mark.parametrize("teach", ["largest", "strong teacher", "hidden states", "earlier networks"])
def test_padding_further_changes_no_weight_of_a_run(kind, teach):
    strong = build(kind).double().model
    runs = []
    for further in (0, 3):
        callback = {
            "largest": lambda: SupernetTraining(**AT_ONCE),
            "strong teacher": lambda: SupernetTraining(
                students_learn_from=nas.InstaTuneLoss(strong_teacher=strong), **AT_ONCE
            ),
            "hidden states": lambda: SupernetTraining(
                students_learn_from=nas.HiddenStates("encoder.layer.*", "nsr"), **AT_ONCE
            ),
            "earlier networks": lambda: SelfDistillation(network="model", ema=0.5),
        }[teach]()
        module = build(kind).double()
        fit(module, callback, buckets(kind, further), max_epochs=1, precision="64-true")
        runs.append(weights(module))
    assert_same(*runs, rtol=1e-9, atol=1e-7 if kind == "sentences" else 1e-10)


@pytest.mark.parametrize("kind", ["classifier", "sentences", "distilbert"])
def test_gradient_checkpointing_changes_no_weight_of_a_run(kind):
    runs = []
    for checkpointed in (False, True):
        module = build(kind, dropout=0.1)
        if checkpointed:
            module.model.gradient_checkpointing_enable()
        fit(module, SupernetTraining(warmup=2, validate=()), buckets(), max_epochs=1)
        runs.append(weights(module))
    assert_same(*runs, rtol=0, atol=0)
