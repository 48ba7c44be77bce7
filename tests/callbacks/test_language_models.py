"""The sandwich step on a causal language model, whose logits are (batch, tokens, vocabulary)."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_nas as nas

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "accelerator": "cpu", "devices": 1,
}  # fmt: skip
SANDWICH = nas.Sandwich(random=1)


class LanguageModel(pl.LightningModule):
    """As users write it: the network computes the loss from labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, attn_implementation="eager",
            )
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        output = self.model(**batch)
        self.log("train_loss", output.loss)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def texts():
    tokens = torch.randint(1, 23, (12, 7), generator=torch.Generator().manual_seed(0))
    tokens[::2, :3] = 0  # padded on the left
    rows = [
        {"input_ids": row, "attention_mask": (row != 0).long(), "labels": row.masked_fill(row == 0, -100)}
        for row in tokens
    ]
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize(("learn", "share"), [("teacher", 0.0), ("both", 0.5)])
def test_students_of_a_language_model_learn_every_next_token_but_padding_from_the_largest(learn, share):
    ours, hand = LanguageModel(), LanguageModel()
    trainer = pl.Trainer(
        callbacks=[
            SupernetTraining(
                sampler=SANDWICH, students_learn_from=learn, warmup=0, order=None, validate=()
            )
        ],
        max_epochs=1, **QUIET,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
        trainer.fit(ours, texts())

    supernet, optimizer = nas.Supernet(hand.model), hand.configure_optimizers()
    hand.train()
    for step, batch in enumerate(texts()):
        optimizer.zero_grad()
        largest = hand.model(**batch)
        largest.loss.backward()
        teacher = largest.logits.detach().softmax(-1)
        for member in SANDWICH.students(supernet.space, 0, step, 0.0):
            with supernet.using(member):
                student = hand.model(**batch)
                each = -(teacher * student.logits.log_softmax(-1)).sum(-1)  # a token
                taught = (each * batch["attention_mask"]).sum() / batch["attention_mask"].sum()
                (share * student.loss + (1 - share) * taught).backward()
        optimizer.step()
    for name, weight in hand.model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), weight, rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(hand.model.lm_head.weight, LanguageModel().model.lm_head.weight)
