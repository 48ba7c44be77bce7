"""A LightningModule that trains a text encoder on text without labels, as AutoDistil does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_nas.distillation import qkv_relation_loss, tap_names
from lightning_nas.distillation.features import RelationKind
from lightning_nas.modules._schedules import faults_of_optimizer, scheduled

__all__ = ["RelationDistillation"]


class RelationDistillation(pl.LightningModule):
    """Trains a text encoder to relate the tokens of a text to each other as a frozen teacher does.

    The loss is that of ``qkv_relation_loss``, between the queries, keys and values of the last block that
    runs and those of one block of the teacher. It needs no labels, and sees no width: as the task of
    ``SupernetTraining(students_learn_from="task")`` it is the loss of every subnetwork alike. Padding does
    not count. Logged are ``train_loss``, and ``val_loss``, which does not depend on how text was batched.

    What lies behind the last queries, keys and values (the rest of that block, a pooler) has no gradient.
    ``nas.MultiArchitectural()`` does not fit: it leaves heads out only behind what is compared here.

    Batches are dictionaries of a tokenizer's tensors; entries that the network does not take are passed over.
    The network is :attr:`model`. The teacher is no part of the module's state: checkpoints don't hold it.

    Args:
        model: a Hugging Face name or folder, or a transformers network, of which the base is trained.
        teacher: likewise; None: the model as it is now. A copy of it teaches.
        layer: of the teacher's blocks the one to learn from; a negative index counts from the last.
        heads: relation heads; None: as many as the teacher has attention heads.
        kind: ``"mse_softmax"`` (the paper's), ``"mse_scores"`` or ``"kl"``, see ``relation_loss``.
        projections: shell patterns over names of modules that give queries, keys and values, one a block;
            of DistilBERT ``("*q_lin", "*k_lin", "*v_lin")``.
        lr: peak learning rate.
        weight_decay: of weight matrices; biases and norms have none.
        warmup: share of the run in which the rate rises, in [0, 1); an int: optimizer steps.
        schedule: how it falls afterwards: ``"linear"``, ``"cosine"`` or ``"constant-ending"``.

    Raises:
        TypeError: for a network that is not of transformers.
        ValueError: for a value out of range, a layer that the teacher does not have, or patterns that match
            nothing.

    Reference: Xu et al., AutoDistil, NeurIPS 2022, section 3.2; its code uses this rate and weight decay.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        teacher: str | Path | nn.Module | None = None,
        *,
        layer: int = -1,
        heads: int | None = None,
        kind: RelationKind = "mse_softmax",
        projections: Sequence[str] = ("*query", "*key", "*value"),
        lr: float = 4e-5,
        weight_decay: float = 0.01,
        warmup: int | float = 0.1,
        schedule: Literal["cosine", "linear", "constant-ending"] = "linear",
    ) -> None:
        super().__init__()
        faults = faults_of_optimizer(lr, weight_decay, 1.0, warmup, schedule)
        if kind not in ("mse_softmax", "mse_scores", "kl"):
            faults.append(f"kind must be 'mse_softmax', 'mse_scores' or 'kl', got {kind!r}")
        if heads is not None and heads < 1:
            faults.append(f"heads must be at least 1, got {heads}")
        if len(projections) != 3:
            faults.append(f"projections are three patterns, of queries, keys and values; got {projections!r}")
        if faults:
            raise ValueError(f"RelationDistillation: {'; '.join(faults)}.")
        self.model = _base(model).train()
        frozen = _base(copy.deepcopy(self.model) if teacher is None else copy.deepcopy(teacher))
        frozen.requires_grad_(False).eval()
        self._teacher: tuple[nn.Module] = (frozen,)  # in a tuple, Lightning does not see it
        self.heads: int = frozen.config.num_attention_heads if heads is None else heads
        self.layer, self.kind, self.projections = layer, kind, tuple(projections)
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule
        self._last: tuple[dict[str, Tensor], list[Tensor]] | None = None
        self._inputs = frozenset(inspect.signature(self.model.forward).parameters)
        for role, network in (("model", self.model), ("teacher", frozen)):
            self._check(role, network)

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._teacher[0]

    def relation_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of the network as it runs now, and the mask ``(batch, tokens)``, true where one counts."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError(
                "RelationDistillation: a batch must be a dictionary of a tokenizer's tensors with "
                f"'input_ids', got {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}."
            )
        inputs = {name: tensor for name, tensor in batch.items() if name in self._inputs}
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with self._watched(self.model) as student:
            self.model(**inputs)
        own, theirs = [outputs[-1] for outputs in student], self._taught(inputs)
        return qkv_relation_loss(own, theirs, self.heads, self.kind, mask), mask

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, mask = self.relation_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(mask))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, mask = self.relation_loss(batch)
        tokens = mask.sum(1)
        counted = tokens if self.kind == "kl" else tokens.square()  # what the loss is the mean over
        self.log("val_loss", loss, prog_bar=True, batch_size=int(counted.sum()))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return scheduled(self, torch.optim.AdamW(groups, lr=self.lr), self.schedule, self.warmup)

    def _taught(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The teacher's queries, keys and values; kept for one batch, which all members of a step share."""
        if self._last is None or not _equal(self._last[0], inputs):
            if next(self.teacher.parameters()).device != self.device:
                self.teacher.to(self.device)
            with self._watched(self.teacher) as taught, torch.no_grad():
                self.teacher(**inputs)
            kept = {name: tensor.clone() for name, tensor in inputs.items()}
            self._last = kept, [outputs[self.layer] for outputs in taught]
        return self._last[1]

    @contextmanager
    def _watched(self, network: nn.Module) -> Iterator[tuple[list[Tensor], ...]]:
        """Outputs of the queries, of the keys and of the values, in the order in which their blocks run."""
        seen: tuple[list[Tensor], ...] = ([], [], [])
        modules = dict(network.named_modules())
        with ExitStack() as hooks:
            for pattern, outputs in zip(self.projections, seen, strict=True):
                for name in tap_names(modules, pattern):
                    handle = modules[name].register_forward_hook(
                        lambda module, args, output, outputs=outputs: outputs.append(output)
                    )
                    hooks.callback(handle.remove)
            yield seen

    def _check(self, role: str, network: nn.Module) -> None:
        blocks = [len(tap_names(dict(network.named_modules()), pattern)) for pattern in self.projections]
        if not min(blocks) == max(blocks) > 0:
            raise ValueError(
                f"RelationDistillation: in the {role} ({type(network).__name__}) projections="
                f"{self.projections} match {', '.join(map(str, blocks))} modules; each must match one a "
                "block."
            )
        if role == "teacher" and not -blocks[0] <= self.layer < blocks[0]:
            raise ValueError(
                f"RelationDistillation: layer={self.layer}, but the teacher has {blocks[0]} blocks; give an "
                f"index from {-blocks[0]} to {blocks[0] - 1}."
            )


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].device == other[name].device and torch.equal(one[name], other[name]) for name in one
    )


def _base(model: str | Path | nn.Module) -> Any:  # a PreTrainedModel, whose class only transformers knows
    from transformers import AutoModel, PreTrainedModel

    if isinstance(model, str | Path):
        # Lightning's precision decides the type in use; weights stored in half precision would train in it.
        return AutoModel.from_pretrained(model, dtype=torch.float32)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "RelationDistillation: a Hugging Face name, a folder or a transformers network is needed, got "
            f"{type(model).__name__}."
        )
    return model.base_model
