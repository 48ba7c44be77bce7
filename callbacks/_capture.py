"""What goes into the network and comes out of it while the user's training step runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_nas.distillation import OutputReader, read_output, tap_names
from lightning_nas.errors import NoMatchError

__all__ = ["Call", "Capture", "entry_of", "tapped"]


@dataclass(frozen=True)
class Call:
    """One call of the network: its detached inputs, the tensor to distil, and outputs of modules inside it.

    The last two are still in the graph.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    taps: dict[str, Tensor] = field(default_factory=dict)

    def cut(self) -> Call:
        """The same call, nothing in a graph any more; the output is a copy, since users may change theirs."""
        taps = {name: tensor.detach() for name, tensor in self.taps.items()}
        return Call(self.args, self.kwargs, self.output.detach().clone(), taps)

    def mask(self, network: nn.Module) -> Tensor | None:
        """The input ``attention_mask``, true where a token counts, if it is ``(batch, tokens)``."""
        try:
            given = inspect.signature(network.forward).bind(*self.args, **self.kwargs).arguments
        except TypeError:
            return None
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def counted(self, network: nn.Module, output: Tensor) -> Tensor:
        """Of an output token by token those that are no padding, ``(tokens, ...)``; any other one whole."""
        mask = self.mask(network)
        if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
            return output
        return output[mask]


class Capture:
    """Records the calls of one module while it is switched on.

    Args:
        entry: the module whose calls are recorded.
        read: gives the tensor to distil.
        must_read: whether an output that cannot be read is an error; otherwise its call is passed over.
        taps: modules inside whose outputs are kept, by name.
    """

    def __init__(
        self,
        entry: nn.Module,
        read: OutputReader,
        must_read: bool,
        taps: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.entry, self.read, self.must_read = entry, read, must_read
        self.calls: list[Call] | None = None  # None: switched off
        self._tapped: dict[str, Tensor] = {}
        self._is_tapping = False

        # A closure, not a bound method: copies of the user's module share functions, but copy what methods
        # are bound to.
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.calls is not None and module is self.entry:
                self._record(self.calls, args, kwargs, output)

        self._handles = [entry.register_forward_hook(watch, with_kwargs=True)]
        for name, module in (taps or {}).items():
            self._handles.append(module.register_forward_hook(self._tap(name, module)))

    def _tap(self, name: str, tapped: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if module is tapped and (self.calls is not None or self._is_tapping) and torch.is_grad_enabled():
                self._tapped[name] = read_output(output)

        return watch

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def tapping(self) -> Iterator[dict[str, Tensor]]:
        """Record what modules inside give, in a run that does not pass the entry."""
        self._tapped, self._is_tapping = {}, True
        tapped = self._tapped
        try:
            yield tapped
        finally:
            self._tapped, self._is_tapping = {}, False

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
        taps, self._tapped = self._tapped, {}
        try:
            tensor = self.read(output)
        except TypeError:
            if self.must_read:
                raise
            return
        if tensor.requires_grad:
            calls.append(Call(detached(args), detached(kwargs), tensor, taps))


def detached(inputs: Any) -> Any:
    """The same nest of inputs with every tensor cut from its graph."""
    return apply_to_collection(inputs, Tensor, Tensor.detach)


def entry_of(network: nn.Module, root: nn.Module) -> nn.Module:
    """The module that users call to run the network: the wrapper of ``torch.compile`` where there is one."""
    for module in root.modules():
        if getattr(module, "_orig_mod", None) is network:
            return module
    return network


def tapped(network: nn.Module, patterns: Iterable[str], where: str) -> dict[str, nn.Module]:
    """The modules inside the network whose outputs a rule compares, in the network's order.

    Raises:
        NoMatchError: for a pattern that matches none; lists how names end.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    found: set[str] = set()
    for pattern in patterns:
        names = tap_names(modules, pattern)
        if not names:
            ends = sorted({end for name in modules if not (end := name.rpartition(".")[2]).isdigit()})
            raise NoMatchError(
                f"{where}: no module of {type(network).__name__} matches {pattern!r}. "
                f"Its modules end in: {', '.join(ends)}. Patterns are shell-style, over their names."
            )
        found.update(names)
    return {name: module for name, module in modules.items() if name in found}
