"""Which codes are in force in which part of a run, and the schedules of estimators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import nn

from lightning_nas.binary import BinaryLayer, layers, set_bits
from lightning_nas.estimators import BiPer, Estimator
from lightning_nas.registry import nearest

__all__ = ["Stage", "apply_stage", "estimators_in", "has_schedule", "stage_at", "stages_named"]

Stage: TypeAlias = "tuple[float, dict[str, int]]"
"""From which fraction of the run on, and ``weights``, ``activations`` (bits) and ``biper`` (1 or 2)."""

_PRESETS = ("activations-first", "biper", "weights-first")


def stages_named(
    stages: str | Sequence[Stage] | None, weights: int, activations: int, is_biper: bool
) -> tuple[Stage, ...]:
    """The stages of a preset, or those given, checked; empty for None.

    Args:
        stages: as :class:`Binarization` takes them.
        weights: bits of the last stage, by default.
        activations: likewise.
        is_biper: whether the estimator has stages of its own.

    Raises:
        ValueError: for an unknown preset, or stages that cannot be.
    """
    where = "Binarization: stages"
    if stages is None:
        return ()
    if isinstance(stages, str):
        if stages not in _PRESETS:
            raise ValueError(f"{where}: unknown preset {stages!r}. {nearest(stages, _PRESETS)}")
        if stages != "biper" and 32 in (weights, activations):
            raise ValueError(
                f"{where}={stages!r} needs codes for both, got weights={weights} and "
                f"activations={activations}; give activations=1."
            )
        both = {"weights": weights, "activations": activations}
        first = {
            "weights-first": {"activations": 32},
            "activations-first": {"weights": 32},
            "biper": {"biper": 1},
        }[stages]
        last = {"biper": 2} if stages == "biper" else both
        stages = [(0.0, {**both, **first}), (0.5, {**both, **last})]
    resolved = tuple((float(start), dict(codes)) for start, codes in stages)
    starts = [start for start, _ in resolved]
    if not resolved or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
        raise ValueError(
            f"{where} must begin at 0.0 and go on in rising fractions of the run below 1, got {starts}."
        )
    allowed = {"weights": {32, weights}, "activations": {32, activations}, "biper": {1, 2}}
    for start, codes in resolved:
        for name, value in codes.items():
            if name not in allowed:
                raise ValueError(f"{where}: at {start} unknown {name!r}. {nearest(name, allowed)}")
            if value not in allowed[name]:
                known = " or ".join(map(str, sorted(allowed[name])))
                raise ValueError(f"{where}: at {start} {name} can be {known} here, got {value!r}.")
    if not is_biper and any("biper" in codes for _, codes in resolved):
        raise ValueError(f"{where}: 'biper' is of the BiPer estimator; give estimator='biper'.")
    return resolved


def stage_at(stages: Sequence[Stage], progress: float) -> int:
    """The index of the stage in force."""
    return max(index for index, (start, _) in enumerate(stages) if start <= progress)


def apply_stage(network: nn.Module, codes: dict[str, int]) -> None:
    """Let the binary layers of a network run with these codes."""
    set_bits(network, weights=codes.get("weights"), activations=codes.get("activations"))
    for estimator in estimators_in(layers(network).values()):
        if isinstance(estimator, BiPer):
            estimator.stage = codes.get("biper", estimator.stage)


def estimators_in(found: Iterable[BinaryLayer]) -> list[Estimator]:
    """Those of weights and of inputs."""
    both = (estimator for layer in found for estimator in (layer.weight_estimator, layer.input_estimator))
    return [estimator for estimator in both if estimator is not None]


def has_schedule(estimator: Estimator) -> bool:
    """Whether it changes with the progress of a run."""
    return type(estimator).schedule is not Estimator.schedule
