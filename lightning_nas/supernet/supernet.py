"""A network in place together with its space: activate a subnetwork, extract it, give the network back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.space import Architecture, SearchSpace, Value
from lightning_nas.supernet import ordering
from lightning_nas.supernet.anatomy import Anatomy, Axis, Family, Part, Stage
from lightning_nas.supernet.families import family_of
from lightning_nas.supernet.fitting import Fit, fit_space
from lightning_nas.supernet.layers import (
    Cut,
    Elastic,
    codes_weights,
    cut_of,
    make_hiding,
    make_masked,
    make_plain,
    make_sliced,
    mask_of,
    memo_without_hooks,
    state_of,
    take,
    tensor_of,
)
from lightning_nas.supernet.ordering import Permutation
from lightning_nas.supernet.statistics import BUFFERS, Statistics, Values, fresh, stale, tracks_statistics

__all__ = ["Supernet", "default_space"]


class Supernet:
    """A network whose heads, hidden units, blocks and width can be left out, in place.

    Parameters keep their identity and names, so optimizers, checkpoints and averaged copies stay valid; what
    the whole network computes stays the same, bit for bit.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=4).eval()
        >>> supernet = Supernet(model)
        >>> small = supernet.extract(supernet.space.smallest)
        >>> len(small.blocks), small.blocks[0].attn.num_heads
        (3, 1)

    Args:
        model: a network of a supported family, or a compiled one; changed in place until :meth:`release`.
        space: the subnetworks: a space, the name of one of the family's presets, or None for its default.
        order: ``"importance"`` moves the heads and units that matter most to the front, which needs
            ``calibration``; ``"magnitude"`` does so by their weights; None leaves them.
        calibration: batches for ``order="importance"``: tuples, or dicts of keywords for the model. (Of a
            tuple a vision transformer takes the first element.)
        loss: the loss of an output and its batch; None: ``output.loss``.
        execution: ``"slice"`` saves the time of what is left out; ``"mask"`` keeps all shapes constant, for
            compiled graphs and sharded parameters, and saves nothing. The two agree up to rounding.
        exclude: shell patterns over names of modules (``"blocks.0.*"``, ``"blocks.3.mlp"``) or of choices
            (``"depth"``) that stay whole.

    Raises:
        UnsupportedError: for a network or a layer inside that cannot be sliced, or an execution that its
            family does not have.
        ValueError: for a space that does not fit the network, or options that do not fit each other.
        NoMatchError: for a pattern of ``exclude`` that matches nothing.
        NASError: if the network already has a supernet.

    Attributes:
        model: the network.
        family: its adapter.
        anatomy: what the adapter says about it.
        fit: the space, and how its choices decide about the network.
        execution: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace | str | None = None,
        *,
        order: Literal["importance", "magnitude"] | None = None,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        execution: Literal["slice", "mask"] = "slice",
        exclude: Iterable[str] | str = (),
    ) -> None:
        if order not in ("importance", "magnitude", None):
            raise ValueError(f"Supernet: order must be 'importance', 'magnitude' or None, got {order!r}.")
        if (order == "importance") != (calibration is not None):
            raise ValueError(
                "Supernet: order='importance' and calibration=batches belong together, "
                f"got order={order!r} and calibration={'given' if calibration is not None else None}."
            )
        if execution not in ("slice", "mask"):
            raise ValueError(f"Supernet: execution must be 'slice' or 'mask', got {execution!r}.")
        self.model: nn.Module = _inside(model)
        self.execution: Literal["slice", "mask"] = execution
        self.family, self.anatomy, self.fit = _plan(self.model, space, exclude)
        if execution not in self.family.executions:
            raise UnsupportedError(
                f"Supernet: execution={execution!r} does not work for a {type(self.model).__name__}; use "
                f"execution={self.family.executions[0]!r}."
            )
        if execution == "mask":
            _refuse_masked_codes(self.model, "execution='mask'", "execution='slice'")
        self._modules: list[tuple[nn.Module, Part, int | None]] = []
        self._norms = {name: m for name, m in self.model.named_modules() if tracks_statistics(m)}
        self._statistics = Statistics()
        self._is_released = False
        self._active = self.space.largest
        if order is not None:
            self.reorder(
                self.magnitude() if order == "magnitude" else self._calibrated(calibration or (), loss)
            )
        self._varying = {part.module: part for part in self.anatomy.parts if self.fit.varies(part)}
        self._make_elastic(self.execution)
        self._apply(self._active)

    @property
    def space(self) -> SearchSpace:
        """The subnetworks."""
        return self.fit.space

    @property
    def active(self) -> Architecture:
        """The architecture that the model runs, in canonical form."""
        return self._active

    @property
    def released(self) -> bool:
        """Whether the user has the model back, and this supernet can do nothing more."""
        return self._is_released

    def __repr__(self) -> str:
        state = "released" if self._is_released else self.execution
        return f"Supernet({type(self.model).__name__}, {self.space}, {state})"

    # --- running a subnetwork

    def activate(self, architecture: Mapping[str, Value]) -> None:
        """Let the model run this subnetwork from now on.

        Raises:
            ValueError: if it is not one of the space; nothing changes then.
        """
        self._refuse_if_released("activate")
        canonical = self.space.canonical(architecture)
        self._apply(canonical)
        self._active = canonical

    @contextmanager
    def using(self, architecture: Mapping[str, Value]) -> Iterator[nn.Module]:
        """Run this subnetwork inside the ``with`` block, and the previous one afterwards, come what may."""
        before = self._active
        self.activate(architecture)
        try:
            yield self.model
        finally:
            if not self._is_released:
                self.activate(before)

    @contextmanager
    def paused(self) -> Iterator[nn.Module]:
        """Inside the ``with`` block the model is the user's own: classes, attributes, and today's weights."""
        self._refuse_if_released("paused")
        for module, _, _ in self._modules:
            make_plain(module)
        self._modules = []  # an architecture activated meanwhile takes effect at the end
        try:
            yield self.model
        finally:
            if not self._is_released:
                self._make_elastic(self.execution)
                self._apply(self._active)

    @contextmanager
    def mixture(self, architectures: Sequence[Mapping[str, Value]]) -> Iterator[nn.Module]:
        """Run several subnetworks in one pass: each on its own part of the batch, all parts of one size.

        What a subnetwork does not use is masked, so a pass costs what the largest network's does.

        Args:
            architectures: the first one runs on the first ``batch / len(architectures)`` samples, and so on.

        Raises:
            UnsupportedError: for a network with batch norm, whose statistics would mix, or one that cannot be
                masked.
            ValueError: if there is none, or one is not of the space; and, in the pass, for a batch that
                cannot be split into equal parts.

        Reference: Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021, section 3.3.
        """
        self.refuse_mixture()
        if not architectures:
            raise ValueError("Supernet.mixture: at least one architecture is needed, got none.")
        members = [self.space.canonical(architecture) for architecture in architectures]
        with self.paused():
            self._make_elastic("mask")
            sizes = [self.fit.sizes(member) for member in members]
            kept = [set(self.fit.kept(member)) for member in members]
            for module, part, block in self._modules:
                axis, state = self._input_axis(module, part), state_of(module)
                rows = [
                    torch.tensor(block in k) if axis is None else mask_of(axis, s)
                    for k, s in zip(kept, sizes, strict=True)
                ]
                state.mask, state.is_mixed = torch.stack(rows), True
            try:
                yield self.model
            finally:
                for module, _, _ in self._modules:
                    make_plain(module)

    def refuse_mixture(self) -> None:
        """Say that a network cannot run as a :meth:`mixture`.

        Raises:
            UnsupportedError: if it has batch norm, or its family no masked execution.
        """
        if self._norms:
            raise UnsupportedError(
                f"Supernet.mixture: {next(iter(self._norms))} is a batch norm, and its statistics would mix "
                "subnetworks. Use another sampler, such as 'sandwich'."
            )
        if "mask" not in self.family.executions:
            raise UnsupportedError(
                f"Supernet.mixture: a {type(self.model).__name__} cannot be masked. Use another sampler, "
                "such as 'sandwich'."
            )
        _refuse_masked_codes(self.model, "a mixture", "another sampler, such as 'sandwich'")

    # --- taking networks out

    def extract(self, architecture: Mapping[str, Value]) -> nn.Module:
        """A plain network: the subnetwork with copies of its weights, and without a trace of the supernet.

        It keeps the mode of training, ``requires_grad``, precision and device. Hooks are not copied.

        Raises:
            ValueError: if the architecture is not one of the space.
        """
        self._refuse_if_released("extract")
        canonical = self.space.canonical(architecture)
        if self._norms and canonical != self.space.largest and self._statistics.of(canonical.key) is None:
            warnings.warn(stale("the extracted network"), stacklevel=2)
        return self._copied(canonical)

    def skeleton(self, architecture: Mapping[str, Value]) -> nn.Module:
        """What :meth:`extract` gives, without weights: all tensors are on the meta device. To count with."""
        self._refuse_if_released("skeleton")
        return self._copied(self.space.canonical(architecture), "meta")

    def _copied(self, canonical: Architecture, device: str | None = None) -> nn.Module:
        sizes, kept = self.fit.sizes(canonical), self.fit.kept(canonical)
        dropped = {i for i in range(len(self.anatomy.blocks)) if i not in kept}
        # What deepcopy finds in the memo it takes as the copy: only slices are ever copied, and no hooks.
        memo = memo_without_hooks(self.model)
        for i in dropped:
            memo[id(self.model.get_submodule(self.anatomy.blocks[i]))] = nn.Identity()
        parts = [part for part in self.anatomy.parts if self.anatomy.block_of(part.module) not in dropped]
        for part in parts:
            module = self.model.get_submodule(part.module)
            for name, axes in part.axes.items():
                tensor, cut = tensor_of(module, name), cut_of(axes, sizes)
                if tensor is not None and cut is not None:
                    with torch.no_grad():
                        kept_values = part.reads.get(name, _take)(module, tensor, cut)
                    memo[id(tensor)] = _like(tensor, kept_values.clone())
        statistics = self._statistics.of(canonical.key) if canonical != self.space.largest else None
        for name, values in (statistics or {}).items():
            memo.update(
                (id(self._norms[name]._buffers[buffer]), self._cut(name, buffer, value, sizes).clone())
                for buffer, value in values.items()
            )
        if device is not None:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                memo[id(tensor)] = _like(tensor, memo.get(id(tensor), tensor).detach().to(device))
        plain = copy.deepcopy(self.model, memo)
        for part in parts:
            module = plain.get_submodule(part.module)
            make_plain(module)
            for name, value in part.attributes.items():
                setattr(module, name, value(sizes))
            for name in part.temporary:
                delattr(module, name)
        for module in plain.modules():
            make_plain(module)
        for stage in self.anatomy.stages:
            _shorten(plain, stage, self.fit.kept_of(stage, canonical))
        self.family.trim(plain, kept, sizes)
        return plain

    def _cut(self, norm: str, buffer: str, value: Tensor, sizes: Mapping[str, Any]) -> Tensor:
        """A statistic as the buffer is, but of the width that its norm has at these sizes.

        Masked execution keeps whole ones.
        """
        part = next((part for part in self.anatomy.parts if part.module == norm), Part(norm))
        whole = self._norms[norm]._buffers[buffer]
        assert whole is not None  # what has a statistic has its buffer
        value = value.to(whole)
        if buffer not in part.axes or value.shape != whole.shape:
            return value
        return take(value, cut_of(part.axes[buffer], sizes))

    def release(self) -> None:
        """Give the user the model back as it was, with today's weights. A second call does nothing."""
        for module, _, _ in self._modules:
            make_plain(module)
        self._modules.clear()
        self._is_released = True

    # --- batch-norm statistics

    @property
    def is_stale(self) -> bool:
        """Whether the active subnetwork runs on batch-norm statistics that are not its own."""
        return bool(self._norms) and self._statistics.are_stale

    def recalibrate(self, batches: Iterable[Any], samples: int = 2000) -> None:
        """Give the active subnetwork batch-norm statistics of its own: reset, then averaged over batches.

        They are kept for its architecture, for :meth:`activate` and :meth:`extract`, until the network is
        trained on. The largest network keeps those that training gave it, and a network without batch norm
        needs none: both are left as they are.

        Args:
            batches: of training data, as for ``calibration``; as many as are needed are taken.
            samples: how many, at least.

        Raises:
            ValueError: if there is no batch, or ``samples`` is below 1.

        Reference: Yu et al., BigNAS, ECCV 2020, section 3.4; Cai et al., Once-for-All, use 2,000 images.
        """
        if samples < 1:
            raise ValueError(f"Supernet.recalibrate: samples must be at least 1, got {samples}.")
        seen = 0
        with self.recalibrating() as model:
            for batch in batches:
                output = self.family.output(model, batch)
                seen += len(next(t for t in tree_leaves((batch, output)) if isinstance(t, Tensor) and t.ndim))
                if seen >= samples:
                    break

    @contextmanager
    def recalibrating(self, agree: Callable[[Tensor], Tensor] | None = None) -> Iterator[nn.Module]:
        """The same for forward passes that the caller makes inside the ``with`` block, without gradients.

        Args:
            agree: makes one statistic the same on all processes, where there are several: their mean.

        Raises:
            ValueError: at its end, if no pass was made.
        """
        self._refuse_if_released("recalibrating")
        if not self._norms or self._active == self.space.largest:
            yield self.model
            return
        kept = set(self.fit.kept(self._active))
        running = {n: m for n, m in self._norms.items() if self.anatomy.block_of(n) in {None, *kept}}
        modes = [(module, module.training) for module in self.model.modules()]
        momenta = [(norm, norm.momentum) for norm in running.values()]
        self.model.eval()
        for name, norm in running.items():
            norm.training = True  # and not norm.train(), which is for a dropout inside too
            norm.momentum = None  # type: ignore[assignment]  # the plain average over batches
            state_of(norm).values = fresh(self._own_values(name, norm))
        self._statistics.is_recalibrating = True
        try:
            with torch.no_grad():
                yield self.model
            values = {name: state_of(norm).values for name, norm in running.items()}
            if any(int(value["num_batches_tracked"]) == 0 for value in values.values()):
                raise ValueError(
                    "Supernet.recalibrate: at least one batch is needed, and it must run the whole network."
                )
            if agree is not None:
                for statistics in values.values():
                    statistics.update({name: agree(statistics[name]) for name in BUFFERS[:2]})
            self._statistics.learn(self._active.key, values)
        finally:
            self._statistics.is_recalibrating = False
            for norm, momentum in momenta:
                norm.momentum = momentum
            for module, training in modes:
                module.training = training
            self._apply(self._active)

    def forget_statistics(self) -> None:
        """Let every recalibration count for nothing, since the weights have changed."""
        is_current = self._active == self.space.largest and not self._statistics.are_any_known
        if self._norms and not self._is_released and not is_current:
            self._statistics.forget()
            self._apply(self._active)

    def _own_values(self, name: str, norm: nn.Module) -> Values:
        cuts = state_of(norm).cuts
        buffers = {buffer: norm._buffers.get(buffer) for buffer in BUFFERS}
        return {b: take(t, cuts.get(b)).clone() for b, t in buffers.items() if t is not None}

    # --- order

    def importance(self) -> dict[str, Tensor]:
        r"""Scores of every head and hidden unit from the gradients that the weights hold now.

        :math:`|\sum W \, \partial L / \partial W|` over the columns through which a unit's contribution
        leaves: of a head, its columns of the output projection; of a hidden unit, its column of the second
        MLP matrix.

        Returns:
            For each group (``"layers.3.heads"``) one score a unit; frozen layers are left out.

        Raises:
            ValueError: if no weight has a gradient.
        """
        return ordering.taylor_scores(self.anatomy, self.model)

    def magnitude(self) -> dict[str, Tensor]:
        """Scores of every head and hidden unit without data: the sum of the same columns' absolute values."""
        return ordering.magnitude_scores(self.anatomy, self.model)

    def reorder(self, scores: Mapping[str, Tensor]) -> dict[Tensor, list[Permutation]]:
        """Move the units with the highest scores to the front, in place; the network computes the same.

        Gradients in flight move along. What else mirrors a tensor (moments, averaged copies) is up to the
        caller: ``permute_like(mirror, result[tensor])``.

        Args:
            scores: for each group to reorder one score a unit, as :meth:`importance` gives them.

        Returns:
            For each parameter and buffer that changed, what was done to it.

        Raises:
            ValueError: for an unknown group, a wrong number of scores, or one that is not finite.
        """
        self._refuse_if_released("reorder")
        done = ordering.reorder(self.anatomy, self.model, scores)
        self.forget_statistics()
        return done

    # --- how it is done

    def _refuse_if_released(self, what: str) -> None:
        if self._is_released:
            raise NASError(
                f"Supernet.{what}: this supernet was released; make a new one with Supernet(model)."
            )

    def _make_elastic(self, execution: Literal["slice", "mask"]) -> None:
        """Swap the classes of what some architecture of the space changes, and of nothing else."""
        blocks, parts = {self.anatomy.blocks[i]: i for i in self.fit.droppable}, self._varying
        self._modules = []
        norms = self._norms if parts or blocks else {}
        for name in dict.fromkeys([*blocks, *parts, *norms]):
            module, part = self.model.get_submodule(name), parts.get(name, Part(name))
            if name in norms:
                tensors = tuple(part.axes) if execution == "slice" else ()
                make_sliced(module, tuple(dict.fromkeys((*tensors, *BUFFERS))), tuple(part.attributes), False)
                state_of(module).watch = self._statistics.watch
            elif execution == "slice":
                make_sliced(module, tuple(part.axes), tuple(part.attributes), name in blocks)
                state_of(module).reads = part.reads
            elif name in blocks or self._input_axis(module, part) is not None:
                make_masked(module, name in blocks)
            else:
                continue
            self._modules.append((module, part, blocks.get(name)))
        for stage in self.anatomy.stages:
            if stage.hides_dropped and self.execution == "slice" and blocks.keys() & set(stage.blocks):
                container = stage.blocks[0].rpartition(".")[0]
                module = self.model.get_submodule(container)
                make_hiding(module)
                self._modules.append((module, Part(container), None))

    def _apply(self, architecture: Architecture) -> None:
        sizes, kept = self.fit.sizes(architecture), set(self.fit.kept(architecture))
        for module, part, block in self._modules:
            state = state_of(module)
            if self.execution == "mask":
                if state.watch is None:
                    axis = self._input_axis(module, part)
                    state.mask = torch.tensor(block in kept) if axis is None else mask_of(axis, sizes)
                continue
            state.cuts = {name: cut_of(axes, sizes) for name, axes in part.axes.items()}
            state.is_dropped = block is not None and block not in kept
            for name, value in part.attributes.items():
                setattr(module, name, value(sizes))
        if self._norms and self._modules:
            known = self._statistics.use(None if architecture == self.space.largest else architecture.key)
            for name, norm in self._norms.items():
                if architecture == self.space.largest:
                    state_of(norm).values = {}
                else:
                    state_of(norm).values = (known or {}).get(name) or self._own_values(name, norm)

    def _input_axis(self, module: nn.Module, part: Part) -> Axis | None:
        """The axis of what flows into a layer, where it is elastic: what mask execution masks."""
        axis, is_known = part.inputs, isinstance(module, nn.Linear) or "Norm" in type(module).__name__
        if axis is None and is_known and "weight" in part.axes:
            axis = part.axes["weight"][-1]
        return axis if axis is not None and cut_of((axis,), self.fit.smallest) is not None else None

    def _calibrated(
        self, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None
    ) -> dict[str, Tensor]:
        """Importance summed over batches; gradients, modes and ``requires_grad`` of the user stay."""
        ways_out = ordering.ways_out(self.anatomy, self.model)
        before = [(parameter, parameter.grad, parameter.requires_grad) for parameter in ways_out]
        modes = [(module, module.training) for module in self.model.modules()]
        total: dict[str, Tensor] = {}
        gradient: Tensor | None
        try:
            self.model.eval()
            for parameter in ways_out:
                parameter.requires_grad_(True)
            for batch in batches:
                with torch.enable_grad():
                    output = self.family.output(self.model, batch)
                    if loss is None and not isinstance(getattr(output, "loss", None), Tensor):
                        raise ValueError(
                            f"Supernet: the output ({type(output).__name__}) has no .loss; "
                            "give loss=a function of the output and its batch."
                        )
                    value = output.loss if loss is None else loss(output, batch)
                    gradients = torch.autograd.grad(value, ways_out)
                for parameter, gradient in zip(ways_out, gradients, strict=True):
                    parameter.grad = gradient
                for name, score in self.importance().items():
                    total[name] = total[name] + score if name in total else score
        finally:
            for parameter, gradient, requires_grad in before:
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training
        if not total:
            raise ValueError(
                "Supernet: calibration is empty; at least one batch is needed for order='importance'."
            )
        return total


def default_space(
    model: nn.Module, preset: str = "relative", *, exclude: Iterable[str] | str = (), **options: Any
) -> SearchSpace:
    """The space that a supernet of this network would have, to read, change and give to :class:`Supernet`.

    Args:
        model: a network of a supported family, not elastic.
        preset: the name of one of the family's spaces.
        exclude: as in :class:`Supernet`.
        **options: what to choose, as in :func:`~lightning_nas.supernet.spaces.relative_space`.

    Raises:
        UnsupportedError: for a network or a layer inside that cannot be sliced.
        ValueError: for an unknown preset, or options that do not fit the network.
    """
    return _plan(_inside(model), preset, exclude, **options)[2].space


def _inside(model: nn.Module) -> nn.Module:
    """The network that a compiled one runs, and follows when it changes."""
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def _plan(
    model: nn.Module, space: SearchSpace | str | None, exclude: Iterable[str] | str, **options: Any
) -> tuple[Family, Anatomy, Fit]:
    if any(isinstance(module, Elastic) for module in model.modules()):
        raise NASError(
            f"Supernet: this {type(model).__name__} already has a supernet, or is a copy of one that has. "
            "Call supernet.release() first, or make copies with supernet.extract(supernet.space.largest)."
        )
    family = family_of(model)
    anatomy = family.anatomy(model)
    _refuse_shared(model, anatomy)
    if not isinstance(space, SearchSpace):
        space = family.space(model, space or "relative", **options)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return family, anatomy, fit_space(space, anatomy, patterns, type(model).__name__)


def _refuse_masked_codes(model: nn.Module, what: str, instead: str) -> None:
    coded = [name for name, module in model.named_modules() if codes_weights(module)]
    if coded:
        raise UnsupportedError(
            f"Supernet: {coded[0]} codes its weights, and {what} would count what is masked: a zero has the "
            f"code +1, and scales are means over all weights. Use {instead}."
        )


def _refuse_shared(model: nn.Module, anatomy: Anatomy) -> None:
    owners: dict[int, str] = {}
    axes_of: dict[str, tuple[Axis, ...]] = {}
    for part in anatomy.parts:
        for name, axes in part.axes.items():
            tensor = tensor_of(model.get_submodule(part.module), name)
            here = f"{part.module}.{name}".lstrip(".")
            axes_of[here] = axes
            if tensor is not None and axes_of[owners.setdefault(id(tensor), here)] != axes:
                raise UnsupportedError(
                    f"Supernet: {owners[id(tensor)]} and {here} are one parameter, and shared weights "
                    "cannot be sliced in two ways. Untie them, for example with copy.deepcopy of one layer."
                )


def _take(module: nn.Module, tensor: Tensor, cut: Cut) -> Tensor:
    """How a part's tensors are read where it says nothing else."""
    return take(tensor, cut)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """New values for a parameter, as a parameter, or for a buffer."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _shorten(model: nn.Module, stage: Stage, kept: tuple[int, ...]) -> None:
    """Leave only the kept blocks in a stage's container, numbered anew."""
    if len(kept) == len(stage.blocks):
        return
    container: Any = model.get_submodule(stage.blocks[0].rpartition(".")[0])
    blocks = [model.get_submodule(stage.blocks[i]) for i in kept]
    container._modules.clear()
    container._modules.update((str(i), block) for i, block in enumerate(blocks))
