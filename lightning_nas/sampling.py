"""Which subnetworks one optimizer step trains, beside the largest.

A plan is a pure function of the seed, the step and the space: every process and every resumed run draws the
same members, with no communication and no stored generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from lightning_nas.registry import Registry
from lightning_nas.space import Architecture, Choice, SearchSpace, Value

__all__ = [
    "Largest",
    "MultiArchitectural",
    "Progressive",
    "Random",
    "Sampler",
    "Sandwich",
    "sampler_named",
    "samplers",
]

samplers: Registry[type[Sampler]] = Registry("sampler")
"""The samplers known by name; users add their own with ``@samplers.register("name")``."""


@runtime_checkable
class Sampler(Protocol):
    """What a sampler must offer."""

    def students(self, space: SearchSpace, seed: int, step: int, progress: float) -> tuple[Architecture, ...]:
        """The architectures that step ``step`` trains besides the largest, in the order they run.

        Args:
            space: of the supernet.
            seed: of the run.
            step: the optimizer step, counted from 0.
            progress: share of the sandwich phase that is over, in [0, 1].
        """
        ...


@samplers.register("largest")
@dataclass(frozen=True)
class Largest:
    """The largest network alone: the user's plain training."""

    def students(self, space: SearchSpace, seed: int, step: int, progress: float) -> tuple[Architecture, ...]:
        """No student."""
        return ()


@samplers.register("random")
@dataclass(frozen=True)
class Random:
    """``random`` members drawn anew in every step, each choice uniform over its options.

    Args:
        random: members a step, at least 1.

    Reference: InstaTune (Sridhar et al., 2023) trains one random member beside the largest.
    """

    random: int = 1

    def __post_init__(self) -> None:
        if self.random < 1:
            raise ValueError(
                f"Random: random must be at least 1, got {self.random}; sampler='largest' trains no member."
            )

    def students(self, space: SearchSpace, seed: int, step: int, progress: float) -> tuple[Architecture, ...]:
        """The drawn members."""
        rng = np.random.default_rng([seed, step])
        return tuple(space.sample(rng) for _ in range(self.random))


@samplers.register("sandwich")
@dataclass(frozen=True)
class Sandwich:
    """The smallest network and ``random`` drawn ones: the sandwich rule.

    Args:
        random: drawn members a step, at least 0. One was best at equal time (docs/the-supernet-phase.md).

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.2 (there two random members).
    """

    random: int = 1

    def __post_init__(self) -> None:
        if self.random < 0:
            raise ValueError(f"Sandwich: random must be at least 0, got {self.random}.")

    def students(self, space: SearchSpace, seed: int, step: int, progress: float) -> tuple[Architecture, ...]:
        """The drawn members, then the smallest."""
        drawn = Random(self.random).students(space, seed, step, progress) if self.random else ()
        return (*drawn, space.smallest)


@samplers.register("progressive")
@dataclass(frozen=True)
class Progressive:
    """A sandwich over a space that opens from the largest network downwards.

    At progress ``p`` each choice offers the upper ``p / until`` share of its options (at least the two
    largest), so the smallest network of the moment shrinks step by step.

    Args:
        random: drawn members a step, at least 0.
        until: progress at which the whole space is open, in (0, 1].

    Reference: after progressive shrinking in Cai et al., Once-for-All, ICLR 2020, section 3.3; here all
    choices open at the same time.
    """

    random: int = 2
    until: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"Progressive: until must be in (0, 1], got {self.until}.")
        Sandwich(self.random)

    def students(self, space: SearchSpace, seed: int, step: int, progress: float) -> tuple[Architecture, ...]:
        """The members of the space as far as it is open, in canonical form of the whole space."""
        share = min(1.0, progress / self.until)
        opened = space.restrict({choice.name: _upper(choice, share) for choice in space.choices})
        members = Sandwich(self.random).students(opened, seed, step, progress)
        return tuple(space.canonical(member) for member in members)


@samplers.register("multi-architectural")
@dataclass(frozen=True)
class MultiArchitectural:
    """Several members in one pass: each trains on its own part of the batch, in place of the largest network.

    Every option of a choice comes equally often within a step, where the number of drawn members is a
    multiple of theirs: the options are dealt in turn, then shuffled, for each choice by itself. A step costs
    about one pass of the largest network, and students learn from the user's loss alone. A batch that cannot
    be split into ``parts`` equal parts is split into fewer.

    Args:
        parts: members a step, at least 1.
        largest: whether one of them is always the largest network.

    Reference: Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021, section 3.3.
    """

    parts: int = 4
    largest: bool = True

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"MultiArchitectural: parts must be at least 1, got {self.parts}.")

    def students(self, space: SearchSpace, seed: int, step: int, progress: float) -> tuple[Architecture, ...]:
        """None beside the members that share the pass."""
        return ()

    def mixture(self, space: SearchSpace, seed: int, step: int, batch: int) -> tuple[Architecture, ...]:
        """The members whose parts, one after the other, are a batch of this size."""
        parts = next(n for n in range(min(self.parts, batch), 0, -1) if batch % n == 0)
        rng, drawn, dealt = np.random.default_rng([seed, step]), parts - self.largest, {}
        for choice in space.choices:
            first = rng.integers(len(choice.values))  # where there are more options than parts
            turns = [choice.values[(first + i) % len(choice.values)] for i in range(drawn)]
            dealt[choice.name] = [turns[i] for i in rng.permutation(drawn)]
        members = [space.canonical({name: values[i] for name, values in dealt.items()}) for i in range(drawn)]
        if self.largest:
            members.insert(int(rng.integers(parts)), space.largest)
        return tuple(members)


def _upper(choice: Choice, share: float) -> Sequence[Value]:
    count = max(min(2, len(choice.values)), round(share * len(choice.values)))
    return choice.values[-count:]


def sampler_named(sampler: str | Sampler) -> Sampler:
    """The sampler of this name with its default settings, or the sampler itself.

    Raises:
        ValueError: for an unknown name; lists the known ones.
        TypeError: for anything that is neither a name nor a sampler.
    """
    if isinstance(sampler, str):
        return samplers[sampler]()
    if not isinstance(sampler, Sampler):
        raise TypeError(
            f"sampler must be a name ({', '.join(samplers)}) or have .students(...), got {sampler!r}."
        )
    return sampler
