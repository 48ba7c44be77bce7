"""Names for things that users may add: one dictionary, one decorator, one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

__all__ = ["Registry", "nearest"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps short names to classes, so that ``"sandwich"`` means what ``Sandwich()`` means.

    Args:
        concept: what is registered, for messages (``"sampler"``).

    Example:
        >>> samplers = Registry("sampler")
        >>> @samplers.register("largest")
        ... class Largest: ...
        >>> samplers["largest"] is Largest
        True
    """

    def __init__(self, concept: str) -> None:
        self.concept = concept
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that makes its class known under ``name``; a later one replaces an earlier one."""

        def add(item: T) -> T:
            self._known[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            raise ValueError(f"Unknown {self.concept} {name!r}. {nearest(name, self._known)}")
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)


def nearest(name: str, known: Iterable[str]) -> str:
    """The part of a message that helps after an unknown name: the nearest names, then all."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(map(repr, names))}."
