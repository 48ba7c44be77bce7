from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_nas.costs import MACs, Parameters
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "num_labels": 5,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "num_hidden_layers": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "language model": {},
    "eager attention": {"attn_implementation": "eager"},
    "tied embeddings": {"tie_word_embeddings": True, "attn_implementation": "eager"},
    "features": {"make": "LlamaModel"},
    "sequence classification": {"make": "LlamaForSequenceClassification"},
    "token classification": {"make": "LlamaForTokenClassification"},
    "question answering": {"make": "LlamaForQuestionAnswering"},
    "biases": {"attention_bias": True, "mlp_bias": True, "use_cache": False},
    "head size of its own": {"head_dim": 10},
    "as many key heads": {"num_key_value_heads": 6},
    "one key head": {"num_key_value_heads": 1},
    "Mistral": {"make": "MistralForCausalLM", "sliding_window": 3},
    "Mistral without a window": {"make": "MistralForSequenceClassification", "sliding_window": None},
    "Qwen2": {"make": "Qwen2ForTokenClassification"},
    "Qwen2 with windows": {"make": "Qwen2ForCausalLM", **WINDOWS},
}  # fmt: skip
CONFIGS = {"L": transformers.LlamaConfig, "M": transformers.MistralConfig, "Q": transformers.Qwen2Config}
LEFT = torch.tensor([[0, 0, 5, 9, 12, 3], [7, 30, 2, 2, 18, 6]])
RIGHT = torch.tensor([[5, 9, 12, 3, 0, 0], [7, 30, 2, 2, 18, 6]])


def build(variant: str = "language model", **changes: Any) -> Any:
    settings = {**SIZES, **VARIANTS[variant], **changes}
    make = settings.pop("make", "LlamaForCausalLM")
    torch.manual_seed(0)
    return randomise(getattr(transformers, make)(CONFIGS[make[0]](**settings))).eval()


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants(FamilyConformance):
    @pytest.fixture
    def network(self, variant):
        # Tokens that see no other are nan in eager attention in float64: its float32 softmax gets all -inf.
        tokens = RIGHT if VARIANTS[variant].get("attn_implementation") == "eager" else LEFT
        return build(variant), {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def test_what_is_left_out_is_silent_in_the_whole_network():
    model = build(num_hidden_layers=4)
    depth = Depth("depth", (3, 4), keeps=((0, 1, 3), (0, 1, 2, 3)))
    choices = [Choice("layers.1.heads", (2, 3)), Choice("layers.3.mlp", (7, 20)), depth]
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced.model.layers[1].self_attn.o_proj.weight[:, 2 * 2 * 4 :] = 0  # 2 groups, 2 query heads, of 4
        silenced.model.layers[3].mlp.down_proj.weight[:, 7:] = 0
        silenced.model.layers[2].self_attn.o_proj.weight.zero_()
        silenced.model.layers[2].mlp.down_proj.weight.zero_()
    supernet = Supernet(model, SearchSpace(choices))
    with supernet.using(supernet.space.smallest), torch.no_grad():
        torch.testing.assert_close(model(RIGHT).logits, silenced(RIGHT).logits, rtol=1e-5, atol=1e-5)


def test_multiply_accumulates_of_a_small_llama_by_hand():
    model = build("tied embeddings", num_hidden_layers=2)
    space = SearchSpace([Choice("layers.0.heads", (1, 3)), Choice("layers.1.mlp", (7, 20))])
    supernet = Supernet(model, space)
    tokens, width, head, vocabulary = 6, 24, 4, 31

    def block(groups, units):
        projections = width * head * (2 * groups + groups + groups + 2 * groups)  # q, k, v, o
        products = 2 * tokens * head * (2 * groups)  # scores and values, for a query
        return tokens * (projections + products + 3 * width * units)

    macs, parameters = MACs(supernet, RIGHT[:1]), Parameters(supernet)
    ends = tokens * width * vocabulary
    assert macs(space.largest) == 2 * block(3, 20) + ends
    assert macs(space.smallest) == block(1, 20) + block(3, 7) + ends

    def weights(groups, units):
        return width * head * 6 * groups + 3 * width * units + 2 * width

    assert parameters(space.smallest) == weights(1, 20) + weights(3, 7) + width + vocabulary * width


@pytest.mark.parametrize(
    ("variant", "heads", "sizes"),
    [
        ("language model", 1, (2, 1, 4)),
        ("tied embeddings", 2, (4, 2, 4)),
        ("head size of its own", 1, (2, 1, 10)),
        ("sequence classification", 3, (6, 3, 4)),
        ("Mistral", 2, (4, 2, 4)),
        ("Qwen2", 1, (2, 1, 4)),
        ("Qwen2 with windows", 2, (4, 2, 4)),
    ],
)
def test_a_copy_whose_blocks_are_alike_is_a_standard_checkpoint(variant, heads, sizes, tmp_path):
    model = build(variant)
    before = copy.deepcopy(model.config.to_dict())
    supernet = Supernet(model, default_space(model, shared=True))
    assert supernet.extract(supernet.space.largest).config.to_dict() == before
    small = supernet.extract(supernet.space.architecture({**supernet.space.smallest, "heads": heads}))
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == sizes
    assert (config.num_hidden_layers, config.intermediate_size) == (len(small.base_model.layers), 5)
    assert model.config.to_dict() == before
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path, attn_implementation=config._attn_implementation)
    assert torch.equal(again(RIGHT).logits, small(RIGHT).logits)


def test_heads_that_the_config_refuses_or_that_differ_stay_as_they_were_in_it():
    model = build("as many key heads")
    supernet = Supernet(model, SearchSpace([Choice("heads", (5, 6)), Choice("layers.1.mlp", (7, 20))]))
    small = supernet.extract(supernet.space.smallest)  # a Llama of width 24 cannot have 5 heads
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (6, 6, 20)
    assert small.model.layers[0].self_attn.q_proj.out_features == 5 * 4


def test_a_copy_with_windows_knows_which_of_its_blocks_have_one():
    model = build("Qwen2 with windows")
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.layer_types == kinds
    supernet = Supernet(model, SearchSpace([Depth("depth", (2, 4), keeps=((0, 2), (0, 1, 2, 3)))]))
    small = supernet.extract(supernet.space.smallest)
    supernet.release()
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_type for layer in small.model.layers] == small.config.layer_types
    with pytest.raises(ValueError, match=r"'depth' 3 drops block 2, which must always run"):
        Supernet(model, SearchSpace([Depth("depth", (3, 4), keeps=((0, 1, 3), (0, 1, 2, 3)))]))


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"attn_implementation='flex_attention' is not supported"):
        Supernet(build(attn_implementation="flex_attention"))

    class LowRank(nn.Linear):
        pass

    model = build()
    model.model.layers[1].mlp.up_proj = LowRank(24, 20, bias=False)
    with pytest.raises(UnsupportedError, match=r"model.layers.1.mlp.up_proj is a .*LowRank, a linear layer"):
        Supernet(model)
    config = transformers.Qwen3Config(**{**SIZES, "head_dim": 4})
    with pytest.raises(UnsupportedError, match=r"Qwen3ForCausalLM is not a .*'Qwen2ForCausalLM'"):
        Supernet(transformers.Qwen3ForCausalLM(config))
