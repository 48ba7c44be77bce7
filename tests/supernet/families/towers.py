from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20,
}  # fmt: skip
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int, high: int = 30) -> torch.Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(0))


def built(network: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return randomise(network(config)).eval()


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert torch.equal(a, b)


class TowerConformance(FamilyConformance):
    """What every family of transformers' towers promises beyond the promises of all families."""

    stated: ClassVar[dict[str, Any]] = {}  # options of spaces whose architectures the config can state

    @torch.no_grad()
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_what_is_recorded_on_the_way_is_what_the_extracted_network_records(self, network, attention):
        model, inputs = network
        if attention == "sdpa" and not model._supports_sdpa:
            pytest.skip("it has no sdpa")
        model.set_attn_implementation(attention)
        recorded = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        before = model(**inputs, **recorded)
        supernet = Supernet(model)
        assert_equal(model(**inputs, **recorded), before)
        for architecture in self.architectures(supernet.space)[1:3]:
            with supernet.using(architecture):
                active = model(**inputs, **recorded)
            assert_equal(supernet.extract(architecture)(**inputs, **recorded), active)
        assert_equal(model(**inputs, **recorded), before)

    @pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")
    def test_gradient_checkpointing_changes_no_gradient(self, network):
        model, inputs = network
        model.train()
        supernet = Supernet(model)
        gradients = []
        for is_checkpointed in (False, True):
            if is_checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                assert model.is_gradient_checkpointing
            model.zero_grad()
            with supernet.using(supernet.space.smallest):
                outputs = tree_leaves(model(**inputs))
                sum(output.square().sum() for output in outputs).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert gradients[0]
        assert_equal(*gradients)

    def test_a_config_that_can_say_what_a_network_is_builds_it_again(self, network):
        model, inputs = network
        supernet = Supernet(model, default_space(model, shared=True, **self.stated))
        small = supernet.extract(supernet.space.smallest)
        config = type(small.config).from_dict(small.config.to_dict())
        config._attn_implementation = small.config._attn_implementation
        again = type(small)(config).eval()
        again.load_state_dict(small.state_dict())
        with torch.no_grad():
            assert_equal(again(**inputs), small(**inputs))
