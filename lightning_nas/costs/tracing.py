"""What one forward pass does to a device, seen by running it without data: its kernels and its memory."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lightning_nas.costs.inputs import arguments
from lightning_nas.space import Value
from lightning_nas.supernet import Supernet

__all__ = ["Kernel", "Trace", "extracted", "traced"]


@dataclass(frozen=True)
class Kernel:
    """One operation that a device carries out.

    Args:
        name: PyTorch's (``"aten.addmm"``).
        flops: floating-point operations of products, two a multiply-accumulate; 0 for other operations.
        moved: of each tensor that it reads or writes: elements, bits an element, whether floating.
    """

    name: str
    flops: int
    moved: tuple[tuple[int, int, bool], ...]

    def bytes(self, floating_bits: int | None = None) -> float:
        """Bytes read and written; ``floating_bits``: of an element of floating tensors, if not their own."""
        return (
            sum(
                elements * (floating_bits if floating_bits is not None and is_floating else bits)
                for elements, bits, is_floating in self.moved
            )
            / 8
        )


@dataclass(frozen=True)
class Trace:
    """What one forward pass does.

    Args:
        kernels: in the order they run; views are none.
        peak_bytes: the most that inputs, activations and outputs take at one time.
    """

    kernels: tuple[Kernel, ...]
    peak_bytes: int


def extracted(supernet: Supernet, architecture: Mapping[str, Value]) -> nn.Module:
    """The extracted network, ready to be measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # stale batch-norm statistics change no cost
        return supernet.extract(architecture).eval().requires_grad_(False)


def traced(supernet: Supernet, architecture: Mapping[str, Value], example_inputs: Any) -> Trace:
    """Trace one architecture, on the device that the network is on.

    Nothing is computed: tensors are fake. A network that looks at the values of its inputs is run instead.
    """
    try:
        return _traced_fake(supernet, architecture, example_inputs)
    except RuntimeError:  # fake tensors have no values; what else is wrong is wrong again
        network = extracted(supernet, architecture)
        device = next(network.parameters()).device
        inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, example_inputs)
        return _watched(network, {}, inputs)


def _traced_fake(supernet: Supernet, architecture: Mapping[str, Value], example_inputs: Any) -> Trace:
    network = supernet.skeleton(architecture).eval().requires_grad_(False)
    device = next(supernet.model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(tensor: Any) -> Any:
            return torch.empty_like(tensor, device=device) if isinstance(tensor, Tensor) else tensor

        weights = {n: fake(t) for n, t in (*network.named_parameters(), *network.named_buffers())}
        return _watched(network, weights, tree_map(fake, example_inputs))


def _watched(network: nn.Module, weights: dict[str, Tensor], inputs: Any) -> Trace:
    watch = _Watch((weights, list(network.parameters()), list(network.buffers())), inputs)
    with torch.no_grad(), torch.random.fork_rng([]), watch:
        torch.func.functional_call(network, weights, *arguments(inputs))
    return Trace(tuple(watch.kernels), watch.peak)


class _Watch(TorchDispatchMode):
    """Notes each kernel, and what memory is alive: a storage counts from its first tensor to its last."""

    def __init__(self, weights: Any, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch annotates it not
        self.kernels: list[Kernel] = []
        # By the address of each storage; weights do not count, inputs do all the time.
        self._sizes: dict[int, int] = {}
        self._keep = [t.untyped_storage() for t in tree_leaves((inputs, weights)) if isinstance(t, Tensor)]
        self._sizes.update((s._cdata, s.nbytes()) for s in self._keep)
        self._sizes.update((t.untyped_storage()._cdata, 0) for t in tree_leaves(weights))
        self.peak = self._alive = sum(self._sizes.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in written)
        if not is_view:
            flops = _flops(func, args, kwargs or {}, output)
            self.kernels.append(Kernel(str(func.overloadpacket), flops, tuple(map(_size, read + written))))
        for storage in (t.untyped_storage() for t in written):
            if (key := storage._cdata) not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self._alive)
        return output

    def _forget(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def _size(tensor: Tensor) -> tuple[int, int, bool]:
    """Elements, at most those that are stored: an expanded tensor is read from few."""
    width = tensor.element_size()
    elements = min(tensor.numel(), tensor.untyped_storage().nbytes() // width)
    return elements, 8 * width, tensor.is_floating_point()


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    packet = func.overloadpacket
    if str(packet).startswith("aten._scaled_dot_product"):  # the counter knows no fused attention on a CPU
        query, key, value = args[:3]
        return int(sdpa_flop_count(query.shape, key.shape, value.shape))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output))
    return 0
