"""Measures subnetworks on batches of data: as cheaply as racing and shared beginnings make it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_nas.objectives import Cost
from lightning_nas.racing import Racing, Rivals, Run
from lightning_nas.space import Architecture, Value
from lightning_nas.supernet.prefixes import SharedPrefixes
from lightning_nas.supernet.supernet import Supernet

__all__ = ["SupernetEvaluator"]


class SupernetEvaluator:
    """The ``evaluate`` of a search over a supernet: the mean score over batches, without gradients.

    Subnetworks that are measured together, by :meth:`many`, share the outputs of the first blocks that they
    have in common, which changes no bit (:class:`~lightning_nas.supernet.SharedPrefixes`). With ``racing`` a
    subnetwork stops once one that was measured earlier, and costs no more, is surely better; a result then
    says as ``"share"`` which share of the data it is from.

    Example:
        >>> import lightning_nas as nas, timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=3).eval()
        >>> supernet = nas.Supernet(model)
        >>> batches = [(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))]
        >>> def is_correct(output, batch):
        ...     return output.argmax(1) == batch[1]
        >>> evaluate = SupernetEvaluator(supernet, batches, is_correct)
        >>> sorted(evaluate(supernet.space.smallest))
        ['accuracy']

    Args:
        supernet: of the subnetworks; its active one is active again afterwards.
        batches: tuples, or dicts of keywords for the model; the same each time they are iterated. A list is
            raced through in a seeded order, another one for each call. Samples should be shuffled once.
        score: the scores of the samples of a batch, from the network's output and the batch: ``(samples,)``.
        metric: the name of their mean.
        mode: whether a larger mean is better; only a race asks.
        costs: all other objectives of the search, to be minimised; only a race asks.
        racing: how sure a race must be; None: everything is measured on all batches.
        share_prefixes: whether :meth:`many` shares the outputs of first blocks.
        calibration: batches of training data from which a subnetwork with batch norm gets its statistics.
        calibration_samples: how many samples of these, at least.
        seed: of the order of batches in a race.

    Raises:
        ValueError: if the network has batch norm and there is no ``calibration``, or for a mode; when called,
            for an architecture that is not of the space, scores of a wrong shape, or no batch.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[Any],
        score: Callable[[Any, Any], Tensor],
        metric: str = "accuracy",
        mode: Literal["max", "min"] = "max",
        costs: Sequence[Cost] = (),
        *,
        racing: Racing | None = None,
        share_prefixes: bool = True,
        calibration: Iterable[Any] | None = None,
        calibration_samples: int = 2000,
        seed: int = 0,
    ) -> None:
        if supernet.batch_norms and calibration is None:
            raise ValueError(
                f"SupernetEvaluator: {next(iter(supernet.batch_norms))} is a batch norm, and each subnetwork "
                "needs statistics of its own; give calibration=batches of training data."
            )
        self.supernet, self.batches, self.score, self.metric = supernet, batches, score, metric
        self.costs, self.racing, self.share_prefixes = tuple(costs), racing, share_prefixes
        self.calibration, self.calibration_samples, self.seed = calibration, calibration_samples, seed
        self.rivals = Rivals(racing, mode)
        self.prefixes = SharedPrefixes(supernet)

    def __call__(self, architecture: Mapping[str, Value]) -> dict[str, float]:
        """Measure one subnetwork."""
        return self.many([architecture])[0]

    def many(self, architectures: Sequence[Mapping[str, Value]]) -> list[dict[str, float]]:
        """Measure subnetworks together, batch by batch; they race against those of earlier calls only.

        Returns:
            The values of each, in the order given.
        """
        canonical = [self.supernet.space.canonical(architecture) for architecture in architectures]
        if not canonical:
            return []
        members = {architecture.key: architecture for architecture in canonical}
        paths = {key: self.prefixes.path(member) for key, member in members.items()}
        order = sorted(members, key=paths.__getitem__)
        runs = {key: self.rivals.start(cost(members[key]) for cost in self.costs) for key in order}
        sharing = self.share_prefixes and len(order) > 1
        with self.supernet.using(members[order[0]]) as model, _evaluating(model), ExitStack() as stack:
            self._recalibrate(members.values())
            stack.enter_context(self.prefixes.on() if sharing else nullcontext())
            for part, batch in self._parts(order):
                self.prefixes.forget()
                for key in order:
                    if not runs[key].is_stopped:
                        self.supernet.activate(members[key])
                        self.prefixes.use(paths[key])
                        runs[key].add(self._scores(model, batch), part)
                if all(run.is_stopped for run in runs.values()):
                    break
        for run in runs.values():
            run.finish()
        return [self._values(runs[architecture.key]) for architecture in canonical]

    def _values(self, run: Run) -> dict[str, float]:
        return {self.metric: run.value} | ({} if self.racing is None else {"share": run.share})

    def _parts(self, keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """The batches, with their numbers."""
        if self.racing is None or not isinstance(self.batches, Sequence):
            yield from enumerate(self.batches)
            return
        # Not the order of earlier candidates, on which the choice of these may depend.
        rng = np.random.default_rng([self.seed, zlib.crc32("".join(keys).encode())])
        for part in rng.permutation(len(self.batches)):
            yield int(part), self.batches[part]

    def _scores(self, model: nn.Module, batch: Any) -> Any:
        device = next(model.parameters()).device
        batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
        scores = self.score(self.supernet.family.output(model, batch), batch)
        return torch.as_tensor(scores).double().cpu().numpy()

    def _recalibrate(self, members: Iterable[Architecture]) -> None:
        for member in members if self.calibration is not None else ():
            self.supernet.activate(member)
            if self.supernet.is_stale:
                self.supernet.recalibrate(self.calibration or (), self.calibration_samples)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
