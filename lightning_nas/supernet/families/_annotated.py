"""Networks of no known class whose user marked layers with :func:`lightning_nas.elastic`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import takewhile
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nas.errors import UnsupportedError
from lightning_nas.registry import nearest
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.supernet.adapter import Adapter, Reader, length
from lightning_nas.supernet.anatomy import Anatomy, Axis, Segment, Sizes
from lightning_nas.supernet.annotation import Annotation, annotations_of, erase
from lightning_nas.supernet.spaces import relative_space
from lightning_nas.supernet.tracing import Flow, Join, Units, ends_at, refusal, taken, trace

__all__ = ["AnnotatedFamily", "annotated_family"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class AnnotatedFamily(Adapter):
    """Adapter of any network with marked layers: they, and what reads them, are all that is elastic.

    Args:
        executions: how its subnetworks run.
    """

    name = "annotated"

    def __init__(self, executions: tuple[str, ...]) -> None:
        self.executions = executions

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Describe a network.

        Raises:
            UnsupportedError: for a marked layer whose outputs go where they cannot be followed, or a depth
                inside another.
            ValueError: for marks with choices of one name that differ.
        """
        return _Annotated(model).anatomy()

    def space(self, model: nn.Module, preset: str, **options: Any) -> SearchSpace:
        """The space of the marks.

        Raises:
            ValueError: for another preset, or options.
        """
        if preset != "relative" or options:
            raise ValueError(
                f"Supernet: the space of this {type(model).__name__} is what its layers are marked with "
                f"(nas.elastic), and has no presets or options; got {', '.join(options) or repr(preset)}. "
                "Change the marks, or restrict the space: default_space(model).restrict({...})."
            )
        return SearchSpace(_choices(model))

    def trim(self, model: nn.Module, kept: tuple[int, ...], sizes: Sizes) -> None:
        """A plain network has no marks."""
        erase(model)


_SLICED, _MASKED = AnnotatedFamily(("slice",)), AnnotatedFamily(("slice", "mask"))


def annotated_family(model: nn.Module) -> AnnotatedFamily:
    """The family of a network with marked layers.

    What is masked is the last dimension of the inputs of linear layers and layer norms, and nothing else.
    """
    is_linear = all(
        mark.kind == "depth" or (not mark.into and isinstance(model.get_submodule(name), nn.Linear))
        for name, mark in annotations_of(model).items()
    )
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    return _MASKED if is_linear and not has_batch_norm else _SLICED


def _choices(model: nn.Module) -> list[Choice]:
    """The choices of all marks; those of equal layers come once."""
    choices: dict[str, tuple[Choice, str]] = {}
    for name, mark in annotations_of(model).items():
        choice = mark.choice_of(name)
        if mark.kind == "depth" and mark.choice is None:
            stage = Reader(model)
            stage.stage(name, choice.name)
            choice = relative_space(stage.anatomy(), depth={choice.name: mark.values})[choice.name]
        other, elsewhere = choices.setdefault(choice.name, (choice, name))
        if other != choice or (mark.kind == "depth" and elsewhere != name):
            raise ValueError(
                f"elastic: the choice {choice.name!r} has the options {other.values} at {elsewhere} and "
                f"{choice.values} at {name}. Layers that share a choice have the same options, and each "
                "depth has a choice of its own."
            )
    return [choice for choice, _ in choices.values()]


class _Annotated(Reader):
    """Reads one network by its marks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        marks = annotations_of(model)
        self.depths = {name: mark for name, mark in marks.items() if mark.kind == "depth"}
        self.marks = {name: mark for name, mark in marks.items() if mark.kind == "out"}
        self.flow = cache(partial(trace, model))

    def anatomy(self) -> Anatomy:
        _choices(self.model)  # refuses those that do not fit each other
        for name, mark in self.depths.items():
            if inside := [other for other in self.depths if name.startswith(f"{other}.")]:
                raise UnsupportedError(
                    f"elastic: {name} is inside {inside[0]}, and both are marked with depth=. Mark only one."
                )
            self.stage(name, mark.choice_of(name).name)
        reads: dict[str, Units] = {}
        joins: list[Join] = []
        for name, mark in self.marks.items():
            flow = self._told(name, mark) if mark.into else self._traced(name)
            same = _together(name, flow.joins)
            joins += [join for join in flow.joins if join[0] in same]
            for module, units in flow.reads.items():
                if units.layer in same:
                    before = reads.setdefault(module, units)
                    joins.append((before.layer, units.layer, module))
        self._check(joins, {*self.marks, *reads})
        group_of: dict[str, str] = {}
        for name in self.marks:
            if name not in group_of:
                same = _together(name, joins)
                group_of |= dict.fromkeys(same, self._group([n for n in self.marks if n in same], reads))
        for name in dict.fromkeys((*self.marks, *reads)):
            self._layer(name, group_of, reads.get(name))
        return super().anatomy()

    def _traced(self, layer: str) -> Flow:
        """The flow of the smallest module in which the layer's outputs end."""
        layers = tuple((name, mark.values[-1]) for name, mark in self.marks.items() if not mark.into)
        problem, cause = "nowhere: no forward pass calls it", None
        for scope in _around(layer):
            if type(self.model.get_submodule(scope)).forward is nn.Module.forward:
                continue
            try:
                flow = self.flow(scope, layers)
            except UnsupportedError:
                raise
            except Exception as error:  # a user's code fails as it likes where tensors have no values
                if cause is None:
                    problem = f"somewhere in {scope or 'the network'}, which cannot be traced ({error})"
                    cause = error
                continue
            if layer in flow.called:
                leaving = [flow.leaves[n] for n in _together(layer, flow.joins) if n in flow.leaves]
                if not leaving:
                    return flow
                problem = problem if cause else leaving[0]
        raise refusal(layer, problem) from cause

    def _told(self, layer: str, mark: Annotation) -> Flow:
        """The flow that a mark tells."""
        parent, flow = layer.rpartition(".")[0], Flow()
        children = {name: child for name, child in self.model.get_submodule(parent).named_modules() if name}
        for name in (*mark.through, *mark.into):
            if name not in children:
                raise UnsupportedError(
                    f"elastic: {layer} is marked with into={mark.into} and through={mark.through}, but "
                    f"{parent or 'the network'} has no {name!r}. {nearest(name, children)}"
                )
            units = Units(layer, mark.values[-1])
            flow.reads[f"{parent}.{name}".lstrip(".")] = taken(children[name], name, units)
        return flow

    def _check(self, joins: Iterable[Join], modules: set[str]) -> None:
        for one, other, place in joins:
            choice = self.marks[one].choice
            if one != other and (choice is None or choice != self.marks[other].choice):
                raise UnsupportedError(
                    f"elastic: the outputs of {one} and of {other} come together ({place}), so their numbers "
                    f"are one decision. Mark both with the same named choice: out=nas.Choice('width', ...)."
                )
        names: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        for shared in names.values():
            if len(shared) > 1 and modules & set(shared):
                raise UnsupportedError(
                    f"elastic: {' and '.join(shared)} are one module, which is followed in one place only. "
                    "Give each place its own, or mark another layer."
                )

    def _group(self, layers: list[str], reads: Mapping[str, Units]) -> str:
        """Units that some layers have in common."""
        mark = self.marks[layers[0]]
        readers = [n for n, u in reads.items() if u.layer in layers and ends_at(self.model.get_submodule(n))]
        if not readers:
            raise refusal(layers[0], "nowhere: no layer reads them")
        around = layers[0] if len(layers) == 1 else _ancestor(layers)
        choices = (mark.choice_of(layers[0]).name,)
        return self.group(f"{layers[0]}.out", mark.values[-1], choices, (around, *layers), readers[-1])

    def _layer(self, name: str, group_of: Mapping[str, str], reads: Units | None) -> None:
        """A module that makes units, or reads them, or both."""
        module: Any = self.model.get_submodule(name)

        def axis(layer: str, count: int, size: int = 1) -> Axis:
            return (Segment(count, size, group_of[layer]),)

        inputs = None if reads is None else axis(reads.layer, reads.count, reads.size or 1)
        if inputs is not None and isinstance(module, BATCH_NORMS):
            self.batch_norm(name, inputs)
        elif inputs is not None and isinstance(module, nn.GroupNorm):
            self.part(name, {"weight": (inputs,), "bias": (inputs,)}, {"num_channels": length(inputs)})
        elif inputs is not None and isinstance(module, nn.LayerNorm | nn.RMSNorm):
            self.norm(name, inputs, (nn.LayerNorm, nn.RMSNorm))
        elif isinstance(module, nn.Linear):
            rows = axis(name, module.out_features) if name in self.marks else (Segment(module.out_features),)
            self.linear(name, rows, inputs or (Segment(module.in_features),))
        else:
            rows = (Segment(module.out_channels),)
            if name in self.marks:
                rows = axis(name, module.out_channels)
            elif reads is not None and not ends_at(module):
                rows = axis(reads.layer, reads.count, module.out_channels // reads.count)
            self.convolution(name, rows, inputs or (Segment(module.in_channels),), classes=CONVS)


def _together(layer: str, joins: Iterable[Join]) -> set[str]:
    """The layers whose units are one layer's, by way of others too."""
    pairs, found = [{one, other} for one, other, _ in joins], {layer}
    while more := set().union(*(pair for pair in pairs if pair & found)) - found:
        found |= more
    return found


def _around(layer: str) -> Iterator[str]:
    """The names of the modules that hold a layer, the smallest first; the network's is empty."""
    while layer:
        layer = layer.rpartition(".")[0]
        yield layer


def _ancestor(layers: Iterable[str]) -> str:
    """The name of the smallest module that holds all layers."""
    levels = zip(*(layer.split(".")[:-1] for layer in layers), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
