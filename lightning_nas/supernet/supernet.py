"""A network in place together with its space: activate a subnetwork, extract it, give the network back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nas.errors import NASError, UnsupportedError
from lightning_nas.space import Architecture, SearchSpace, Value
from lightning_nas.supernet import ordering
from lightning_nas.supernet.anatomy import Anatomy, Axis, Family, Part
from lightning_nas.supernet.families import family_of
from lightning_nas.supernet.fitting import Fit, fit_space
from lightning_nas.supernet.layers import (
    Elastic,
    cut_of,
    make_masked,
    make_plain,
    make_sliced,
    mask_of,
    state_of,
    take,
)
from lightning_nas.supernet.ordering import Permutation

__all__ = ["Supernet", "default_space"]

_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict)
)


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
        UnsupportedError: for a network or a layer inside that cannot be sliced.
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
        self._modules: list[tuple[nn.Module, Part, int | None]] = []
        self._is_released = False
        if order is not None:
            self.reorder(
                self.magnitude() if order == "magnitude" else self._calibrated(calibration or (), loss)
            )
        self._make_elastic()
        self._active = self.space.largest
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
                self._make_elastic()
                self._apply(self._active)

    # --- taking networks out

    def extract(self, architecture: Mapping[str, Value]) -> nn.Module:
        """A plain network: the subnetwork with copies of its weights, and without a trace of the supernet.

        It keeps the mode of training, ``requires_grad``, precision and device. Hooks are not copied.

        Raises:
            ValueError: if the architecture is not one of the space.
        """
        self._refuse_if_released("extract")
        canonical = self.space.canonical(architecture)
        sizes, kept = self.fit.sizes(canonical), self.fit.kept(canonical)
        dropped = {i for i in range(len(self.anatomy.blocks)) if i not in kept}
        memo: dict[
            int, Any
        ] = {}  # what deepcopy finds here it takes as the copy: only slices are ever copied
        for module in self.model.modules():
            memo.update(
                (id(module.__dict__[name]), OrderedDict()) for name in _HOOKS if name in module.__dict__
            )
        for i in dropped:
            memo[id(self.model.get_submodule(self.anatomy.blocks[i]))] = nn.Identity()
        for part in self.anatomy.parts:
            if self.anatomy.block_of(part.module) in dropped:
                continue
            for name, axes in part.axes.items():
                parameter = self.model.get_submodule(part.module)._parameters[name]
                if parameter is not None and (cut := cut_of(axes, sizes)) is not None:
                    weights = take(parameter.detach(), cut).clone()
                    memo[id(parameter)] = nn.Parameter(weights, requires_grad=parameter.requires_grad)
        plain = copy.deepcopy(self.model, memo)
        for part in self.anatomy.parts:
            if self.anatomy.block_of(part.module) not in dropped:
                module = plain.get_submodule(part.module)
                make_plain(module)
                for name, value in part.attributes.items():
                    setattr(module, name, value(sizes))
        for module in plain.modules():
            make_plain(module)
        self.family.trim(plain, kept, sizes)
        return plain

    def release(self) -> None:
        """Give the user the model back as it was, with today's weights. A second call does nothing."""
        for module, _, _ in self._modules:
            make_plain(module)
        self._modules.clear()
        self._is_released = True

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

    def reorder(self, scores: Mapping[str, Tensor]) -> dict[nn.Parameter, list[Permutation]]:
        """Move the units with the highest scores to the front, in place; the network computes the same.

        Gradients in flight move along. What else mirrors a parameter (moments, averaged copies) is up to the
        caller: ``permute_like(tensor, result[parameter])``.

        Args:
            scores: for each group to reorder one score a unit, as :meth:`importance` gives them.

        Returns:
            For each parameter that changed, what was done to it.

        Raises:
            ValueError: for an unknown group, a wrong number of scores, or one that is not finite.
        """
        self._refuse_if_released("reorder")
        return ordering.reorder(self.anatomy, self.model, scores)

    # --- how it is done

    def _refuse_if_released(self, what: str) -> None:
        if self._is_released:
            raise NASError(
                f"Supernet.{what}: this supernet was released; make a new one with Supernet(model)."
            )

    def _make_elastic(self) -> None:
        """Swap the classes of what some architecture of the space changes, and of nothing else."""
        blocks = {self.anatomy.blocks[i]: i for i in self.fit.droppable}
        parts = {part.module: part for part in self.anatomy.parts if self.fit.varies(part)}
        self._modules = []
        for name in [*blocks, *(name for name in parts if name not in blocks)]:
            module, part = self.model.get_submodule(name), parts.get(name, Part(name))
            if self.execution == "slice":
                make_sliced(module, tuple(part.axes), tuple(part.attributes), name in blocks)
            elif name in blocks or self._input_axis(module, part) is not None:
                make_masked(module, name in blocks)
            else:
                continue
            self._modules.append((module, part, blocks.get(name)))

    def _apply(self, architecture: Architecture) -> None:
        sizes, kept = self.fit.sizes(architecture), set(self.fit.kept(architecture))
        for module, part, block in self._modules:
            state = state_of(module)
            if self.execution == "mask":
                axis = self._input_axis(module, part)
                state.mask = torch.tensor(block in kept) if axis is None else mask_of(axis, sizes)
                continue
            state.cuts = {name: cut_of(axes, sizes) for name, axes in part.axes.items()}
            state.is_dropped = block is not None and block not in kept
            for name, value in part.attributes.items():
                setattr(module, name, value(sizes))

    def _input_axis(self, module: nn.Module, part: Part) -> Axis | None:
        """The axis of what flows into a layer, where it is elastic: what mask execution masks."""
        axes = part.axes.get("weight")
        if axes is None or not (isinstance(module, nn.Linear) or "Norm" in type(module).__name__):
            return None
        return axes[-1] if cut_of(axes[-1:], self.fit.smallest) is not None else None

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
        **options: what the family lets one choose (for vision transformers see ``vit_space``).

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


def _refuse_shared(model: nn.Module, anatomy: Anatomy) -> None:
    owners: dict[int, str] = {}
    for part in anatomy.parts:
        for name in part.axes:
            parameter = model.get_submodule(part.module)._parameters[name]
            here = f"{part.module}.{name}".lstrip(".")
            if parameter is not None and owners.setdefault(id(parameter), here) != here:
                raise UnsupportedError(
                    f"Supernet: {owners[id(parameter)]} and {here} are one parameter, and shared weights "
                    "cannot be sliced in two ways. Untie them, for example with copy.deepcopy of one layer."
                )
