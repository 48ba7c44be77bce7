"""What goes into the network and comes out of it while the user's training step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_nas.distillation import OutputReader

__all__ = ["Call", "Capture", "entry_of"]


@dataclass(frozen=True)
class Call:
    """One call of the network: its detached inputs, and the tensor to distil, still in its graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class Capture:
    """Records the calls of one module while it is switched on.

    Args:
        entry: the module whose calls are recorded.
        read: gives the tensor to distil.
        must_read: whether an output that cannot be read is an error; otherwise its call is passed over.
    """

    def __init__(self, entry: nn.Module, read: OutputReader, must_read: bool) -> None:
        self.entry, self.read, self.must_read = entry, read, must_read
        self.calls: list[Call] | None = None  # None: switched off

        # A closure, not a bound method: copies of the user's module share functions, but copy what methods
        # are bound to.
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.calls is not None and module is self.entry:
                self._record(self.calls, args, kwargs, output)

        self._handle = entry.register_forward_hook(watch, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()

    @contextmanager
    def on(self) -> Iterator[list[Call]]:
        """Record calls into a list of their own."""
        before, self.calls = self.calls, []
        try:
            yield self.calls
        finally:
            self.calls = before

    def _record(self, calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        try:
            tensor = self.read(output)
        except TypeError:
            if self.must_read:
                raise
            return
        if tensor.requires_grad:
            calls.append(Call(detached(args), detached(kwargs), tensor))


def detached(inputs: Any) -> Any:
    """The same nest of inputs with every tensor cut from its graph."""
    return apply_to_collection(inputs, Tensor, Tensor.detach)


def entry_of(network: nn.Module, root: nn.Module) -> nn.Module:
    """The module that users call to run the network: the wrapper of ``torch.compile`` where there is one."""
    for module in root.modules():
        if getattr(module, "_orig_mod", None) is network:
            return module
    return network
