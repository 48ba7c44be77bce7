"""A run that was interrupted and resumed is the run that never was."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import SupernetTraining
from pytorch_lightning.callbacks import ModelCheckpoint

from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, assert_same, weights

EPOCHS, BATCHES = 3, 5


class StatefulLoader:
    """Its order is a function of the epoch, and it goes on in the middle of one: exact resume needs both."""

    def __init__(self):
        self.data, self.epoch, self.done = users.images(8 * BATCHES), 0, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        if self.done == BATCHES:
            self.epoch, self.done = self.epoch + 1, 0
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch)).view(
            BATCHES, 8
        )
        while self.done < BATCHES:
            self.done += 1
            x, y = self.data.tensors
            yield x[order[self.done - 1]], y[order[self.done - 1]]

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


class Scheduled(users.PlainClassifier):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}
        ]


def run(make_callback, ckpt_path=None, accumulate=1):
    torch.manual_seed(0)
    module = Scheduled()
    keep = ModelCheckpoint(dirpath="kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [keep, *([make_callback()] if make_callback else [])]
    trainer = pl.Trainer(
        callbacks=callbacks, max_epochs=EPOCHS, accumulate_grad_batches=accumulate,
        **{**QUIET, "enable_checkpointing": True},
    )  # fmt: skip
    trainer.fit(module, StatefulLoader(), ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return module, callbacks[-1]


# 15 steps, the first 6 warm-up: inside the warm-up, at its end (ordering is due), in the sandwich.
@pytest.mark.parametrize("step", [2, 6, 7, 10, 13])
@pytest.mark.parametrize("sampler", ["sandwich", "progressive"])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(step, sampler):
    def make():
        return SupernetTraining(warmup=6, sampler=sampler, lr_factor=2.0, seed=11, validate=())

    whole, whole_callback = run(make)
    resumed, callback = run(make, ckpt_path=f"kept/step={step}.ckpt")
    assert_same(weights(whole), weights(resumed), rtol=0, atol=0)
    assert callback.sandwich_steps == whole_callback.sandwich_steps == 9
    assert callback.trained == whole_callback.trained
    assert_same(callback.importance, whole_callback.importance, rtol=0, atol=0)


def test_lightnings_own_resume_is_exact_here_so_that_ours_must_be():
    whole, _ = run(None)
    resumed, _ = run(None, ckpt_path="kept/step=7.ckpt")
    assert_same(weights(whole), weights(resumed), rtol=0, atol=0)


def test_a_checkpoint_holds_the_users_names_and_loads_into_his_plain_module():
    module, callback = run(lambda: SupernetTraining(warmup=3, validate=()))
    state = torch.load("kept/step=15.ckpt", weights_only=True)["state_dict"]
    plain = Scheduled()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    x = users.images().tensors[0]
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), module.eval()(x))
        callback.supernet.release()
        assert torch.equal(plain(x), module(x))
