"""Conformance tests that shipped members of a concept pass, and that a user's own are held to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_nas.costs import MACs, Parameters
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Architecture, SearchSpace
from lightning_nas.supernet import Supernet, family_of, zero_residual_branches
from lightning_nas.supernet.statistics import tracks_statistics

__all__ = ["FamilyConformance", "randomise"]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and batch-norm statistic anew, in place.

    Ones and zeros of a fresh network would hide a forgotten copy.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.ndim == 1:
                parameter.add_(0.7)
        for module in model.modules():
            if tracks_statistics(module):
                module.running_mean.normal_(generator=generator)  # type: ignore[operator, union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[operator, union-attr]
    return model


class FamilyConformance:
    """What every family of networks promises, as tests.

    Subclass it, and define a pytest fixture ``network`` that returns a fresh small model in eval mode with
    randomised parameters, and example inputs of it: a tensor, a tuple, or a dict of keywords. From these
    inputs subnetworks with batch norm get statistics of their own first.

    Example:
        >>> import pytest
        >>> class TestMyFamily(FamilyConformance):
        ...     @pytest.fixture
        ...     def network(self):
        ...         return randomise(MyNet()).eval(), torch.randn(2, 3, 16, 16)
    """

    def space(self, model: nn.Module) -> SearchSpace | None:
        """The space to test; None: the family's default."""
        return None

    def architectures(self, space: SearchSpace) -> list[Architecture]:
        """Where the promises are checked: the ends of the space and two random points."""
        rng = np.random.default_rng(0)
        return [space.largest, space.smallest, *(space.sample(rng) for _ in range(2))]

    def test_the_whole_network_computes_what_the_model_did_bit_for_bit(self, network: Any) -> None:
        """Making a network elastic changes neither outputs nor the names and identity of its weights."""
        model, inputs = network
        before, names = _run(model, inputs), list(model.state_dict())
        identities = [id(parameter) for parameter in model.parameters()]
        for execution in family_of(model).executions:
            supernet = Supernet(model, self.space(model), execution=execution)  # type: ignore[arg-type]
            _equal(_run(model, inputs), before)
            supernet.activate(supernet.space.smallest)
            assert list(model.state_dict()) == names
            assert [id(parameter) for parameter in model.parameters()] == identities
            supernet.release()

    def test_an_extracted_network_computes_what_the_active_subnetwork_does(self, network: Any) -> None:
        """In eval mode an extracted network equals the active subnetwork bit for bit."""
        model, inputs = network
        supernet = Supernet(model, self.space(model))
        for architecture in self.architectures(supernet.space):
            _calibrate(supernet, architecture, inputs)
            with supernet.using(architecture):
                active = _run(model, inputs)
            _equal(_run(supernet.extract(architecture), inputs), active)

    def test_an_extracted_network_is_plain_and_its_own(self, network: Any) -> None:
        """An extracted network has the user's classes, nothing of ours, and storage of its own."""
        model, inputs = network
        classes = {name: type(module) for name, module in model.named_modules()}
        supernet = Supernet(model, self.space(model))
        _calibrate(supernet, supernet.space.smallest, inputs)
        extracted = supernet.extract(supernet.space.smallest)
        assert type(extracted) is classes[""]
        assert {type(module) for module in extracted.modules()} <= set(classes.values())
        assert not any("elastic" in name.lower() for module in extracted.modules() for name in vars(module))
        storages = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        own = {
            tensor.untyped_storage().data_ptr() for tensor in [*extracted.parameters(), *extracted.buffers()]
        }
        assert not (storages - {0}) & (own - {0})

    def test_costs_are_those_of_the_extracted_network(self, network: Any) -> None:
        """MACs and parameters are exact."""
        model, inputs = network
        supernet = Supernet(model, self.space(model))
        macs, parameters = MACs(supernet, inputs), Parameters(supernet)
        chosen = self.architectures(supernet.space)[:3]
        for i, architecture in enumerate(chosen):
            _calibrate(supernet, architecture, inputs)
            extracted = supernet.extract(architecture).requires_grad_(False)
            supernet.family.unfuse(extracted)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                _call(extracted, inputs)
            assert 2 * macs(architecture) == counter.get_total_flops()
            assert 2 * macs.many(chosen)[i] == counter.get_total_flops()
            assert parameters(architecture) == sum(parameter.numel() for parameter in extracted.parameters())

    def test_blocks_whose_branches_are_zero_give_back_their_input(self, network: Any) -> None:
        """The layers that a family calls the ends of residual branches are those, where it names any."""
        model, inputs = network
        anatomy = family_of(model).anatomy(model)
        if not anatomy.branch_ends:
            return
        zero_residual_branches(model)
        droppable = [s.blocks[i] for s in anatomy.stages for i in range(len(s.blocks)) if i not in s.fixed]
        changed = []

        def compare(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not torch.equal(_tensors(output)[0], args[0]):
                changed.append(block)

        for name in droppable:
            model.get_submodule(name).register_forward_hook(compare)
        _run(model, inputs)
        assert not changed

    def test_masking_equals_slicing_in_outputs_and_gradients(self, network: Any) -> None:
        """Both executions agree in float64; a family that cannot mask says so."""
        model, inputs = _double(*network)
        if "mask" not in family_of(model).executions:
            try:
                Supernet(model, self.space(model), execution="mask")
            except UnsupportedError:
                return
            raise AssertionError("a family without masked execution must refuse it")
        masked_model = copy.deepcopy(model)
        sliced = Supernet(model, self.space(model))
        masked = Supernet(masked_model, self.space(masked_model), execution="mask")
        for architecture in self.architectures(sliced.space):
            with sliced.using(architecture), masked.using(architecture):
                one, other = _differentiated(model, inputs), _differentiated(masked_model, inputs)
            for name in one:
                if (
                    one[name].shape == other[name].shape
                ):  # features of a narrower network end in zeros when masked
                    torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-9)

    def test_reordering_changes_no_output_beyond_rounding(self, network: Any) -> None:
        """A random order of all units leaves the function alone, in float64."""
        model, inputs = _double(*network)
        supernet = Supernet(model, self.space(model))
        before = _run(model, inputs)
        generator = torch.Generator().manual_seed(1)
        scores = {name: torch.rand(len(s), generator=generator) for name, s in supernet.magnitude().items()}
        assert supernet.reorder(scores)
        for one, other in zip(_tensors(_run(model, inputs)), _tensors(before), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_release_gives_the_model_back(self, network: Any) -> None:
        """Classes, attributes and outputs are the user's again."""
        model, inputs = network
        attributes = {name: _plain_attributes(module) for name, module in model.named_modules()}
        classes = {name: type(module) for name, module in model.named_modules()}
        before = _run(model, inputs)
        supernet = Supernet(model, self.space(model))
        supernet.activate(supernet.space.smallest)
        supernet.release()
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert {name: _plain_attributes(module) for name, module in model.named_modules()} == attributes
        _equal(_run(model, inputs), before)


def _calibrate(supernet: Supernet, architecture: Architecture, inputs: Any) -> None:
    with supernet.using(architecture):
        if supernet.is_stale:
            with supernet.recalibrating() as model:
                _call(model, inputs)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _run(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return _call(model, inputs)


def _differentiated(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = _tensors(_call(model, inputs))
    sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    result = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, parameter in model.named_parameters():
        result[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return result


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    return [tensor for value in values for tensor in _tensors(value)]


def _equal(one: Any, other: Any) -> None:
    for a, b in zip(_tensors(one), _tensors(other), strict=True):
        assert torch.equal(a, b), f"the largest difference is {(a - b).abs().max():.3g}"


def _double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    floating = tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return model.double(), floating


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | list) and not name.startswith("_")
    }
