from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lightning_nas.costs import MACs
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

SIZES: dict[str, Any] = {
    "vocab_size": 31, "n_embd": 24, "num_hidden_layers": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "num_labels": 5,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "language model": {},
    "eager attention": {"attn_implementation": "eager"},
    "features": {"make": "GPT2Model"},
    "untied embeddings": {"tie_word_embeddings": False, "use_cache": False},
    "sequence classification": {"make": "GPT2ForSequenceClassification"},
    "token classification": {"make": "GPT2ForTokenClassification"},
    "question answering": {"make": "GPT2ForQuestionAnswering"},
    "two heads": {"make": "GPT2DoubleHeadsModel", "n_inner": 20},
    "unscaled": {"scale_attn_weights": False},
    "scaled by the block's number": {"scale_attn_by_inverse_layer_idx": True},
}  # fmt: skip
LEFT = torch.tensor([[0, 0, 5, 9, 12, 3], [7, 30, 2, 2, 18, 6]])
RIGHT = torch.tensor([[5, 9, 12, 3, 0, 0], [7, 30, 2, 2, 18, 6]])


def build(variant: str = "language model", **changes: Any) -> Any:
    settings = {**SIZES, **VARIANTS[variant], **changes}
    make = settings.pop("make", "GPT2LMHeadModel")
    torch.manual_seed(0)
    return randomise(getattr(transformers, make)(transformers.GPT2Config(**settings))).eval()


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants(FamilyConformance):
    @pytest.fixture
    def network(self, variant):
        tokens = RIGHT if VARIANTS[variant].get("attn_implementation") == "eager" else LEFT
        inputs = {"input_ids": tokens, "token_type_ids": (tokens > 9).long()}
        if variant == "two heads":  # two choices each
            inputs = {name: torch.stack([value, value.flip(0)], 1) for name, value in inputs.items()}
            inputs["mc_token_ids"] = torch.tensor([[3, 5], [5, 1]])
        return build(variant), {**inputs, "attention_mask": (inputs["input_ids"] != 0).long()}


def test_what_is_left_out_is_silent_in_the_whole_network():
    model = build(num_hidden_layers=4)
    depth = Depth("depth", (3, 4), keeps=((0, 1, 3), (0, 1, 2, 3)))
    choices = [Choice("layers.1.heads", (3, 4)), Choice("layers.3.mlp", (7, 96)), depth]
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced.transformer.h[1].attn.c_proj.weight[3 * 6 :] = 0  # 3 heads of 6
        silenced.transformer.h[3].mlp.c_proj.weight[7:] = 0
        for layer in (silenced.transformer.h[2].attn.c_proj, silenced.transformer.h[2].mlp.c_proj):
            layer.weight.zero_()
            layer.bias.zero_()
    supernet = Supernet(model, SearchSpace(choices))
    with supernet.using(supernet.space.smallest), torch.no_grad():
        torch.testing.assert_close(model(RIGHT).logits, silenced(RIGHT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["language model", "two heads"])
def test_a_copy_with_all_heads_and_blocks_that_are_alike_is_a_standard_checkpoint(variant, tmp_path):
    model = build(variant)
    before = copy.deepcopy(model.config.to_dict())
    supernet = Supernet(model, default_space(model, shared=True, heads=()))
    assert supernet.extract(supernet.space.largest).config.to_dict() == before
    small = supernet.extract(supernet.space.smallest)
    assert (small.config.n_layer, small.config.n_inner) == (2, 24 if variant == "language model" else 5)
    assert model.config.to_dict() == before
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    tokens = RIGHT if variant == "language model" else RIGHT[:, None]
    assert torch.equal(again(tokens).logits, small(tokens).logits)


def test_heads_and_hidden_units_that_the_config_cannot_say_are_those_of_its_layers():
    model = build()
    supernet = Supernet(model, SearchSpace([Choice("heads", (1, 4)), Choice("layers.2.mlp", (7, 96))]))
    small = supernet.extract(supernet.space.smallest)
    attention = small.transformer.h[0].attn
    assert (small.config.n_head, small.config.n_inner) == (4, None)
    assert (attention.num_heads, attention.head_dim, attention.split_size, attention.c_attn.nf) == (
        1,
        6,
        6,
        18,
    )
    assert [block.mlp.c_fc.nf for block in small.transformer.h] == [96, 96, 7]


def test_blocks_whose_number_scales_their_attention_all_run():
    model = build("scaled by the block's number")
    assert {name.rpartition(".")[2] for name in default_space(model).names} == {"heads", "mlp"}
    with pytest.raises(ValueError, match=r"there is no choice 'depth' in it"):
        Supernet(model, SearchSpace([Choice("depth", (2, 3))]))


def test_attention_that_is_computed_in_float32_takes_fewer_heads():
    model = build(
        "eager attention", reorder_and_upcast_attn=True
    )  # refuses float64, which others are held to
    supernet = Supernet(model)
    small = supernet.extract(supernet.space.smallest)
    with supernet.using(supernet.space.smallest):
        assert torch.equal(model(RIGHT).logits, small(RIGHT).logits)
    with FlopCounterMode(display=False) as counter:
        small(RIGHT)
    assert 2 * MACs(supernet, RIGHT)(supernet.space.smallest) == counter.get_total_flops()


def test_cross_attention_is_refused():
    with pytest.raises(UnsupportedError, match=r"add_cross_attention=True is not supported"):
        Supernet(build(add_cross_attention=True))
