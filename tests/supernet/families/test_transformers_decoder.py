"""What decoders of all families owe those who generate with them, and those who train them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_nas.supernet import Supernet, default_space
from tests.supernet.families import test_transformers_gpt2 as gpt2
from tests.supernet.families import test_transformers_llama as llama

DECODERS: dict[str, Any] = {
    "GPT-2": (gpt2.build, "language model"),
    "Llama": (llama.build, "tied embeddings"),
    "Mistral with a window": (llama.build, "Mistral"),
    "Qwen2 with windows": (llama.build, "Qwen2 with windows"),
}
EAGER = {"attn_implementation": "eager"}
PADDED = {"input_ids": llama.LEFT, "attention_mask": (llama.LEFT != 0).long()}


def build(decoder: str, **changes: Any) -> Any:
    make, variant = DECODERS[decoder]
    return make(variant, num_hidden_layers=4, **changes)


def elastic(model: Any) -> Supernet:
    """Its second block is the one that may be dropped: the numbers of those that run have a gap."""
    keep = {3: (0, 2, 3), 4: (0, 1, 2, 3)}
    return Supernet(model, default_space(model, depth=(3, 4), keep=keep))


def some_of(space):
    return [space.smallest, space.sample(np.random.default_rng(1))]


def generated(model: Any, inputs: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (batch, new), and the logits that each was chosen by (batch, new, vocabulary)."""
    length = inputs["input_ids"].shape[1]
    result = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **settings,
    )  # fmt: skip
    return result.sequences[:, length:], torch.stack(result.logits, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_subnetwork_generates_the_same_with_a_cache_without_and_extracted(decoder, attention):
    model = build(decoder, attn_implementation=attention)
    supernet = elastic(model)
    for architecture in some_of(supernet.space):
        small = supernet.extract(architecture)
        with supernet.using(architecture):
            tokens, logits = generated(model, PADDED)
            # The naive way: the whole text again for each token.
            without, expected = generated(model, PADDED, use_cache=False)
            static, _ = generated(model, PADDED, cache_implementation="static")
        assert torch.equal(tokens, without)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(static, tokens)
        extracted = generated(small, PADDED)
        assert torch.equal(extracted[0], tokens)
        assert torch.equal(extracted[1], logits)


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_on_the_left_changes_no_token(decoder):
    model = build(decoder)
    supernet = elastic(model)
    with supernet.using(supernet.space.smallest):
        padded, logits = generated(model, PADDED)
        alone, expected = generated(
            model, {"input_ids": llama.LEFT[:1, 2:], "attention_mask": torch.ones_like(llama.LEFT[:1, 2:])}
        )
    assert torch.equal(padded[:1], alone)
    torch.testing.assert_close(logits[:1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_beams_of_a_subnetwork_are_those_of_the_extracted_one(decoder):
    model = build(decoder)
    supernet = elastic(model)
    small = supernet.extract(supernet.space.smallest)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with supernet.using(supernet.space.smallest):
        inside = model.generate(**PADDED, **settings)
    assert torch.equal(small.generate(**PADDED, **settings), inside)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_blocks_of_a_copy_are_numbered_as_its_cache_is(decoder):
    model = build(decoder)
    supernet = elastic(model)
    small = supernet.extract(supernet.space.smallest)
    blocks = small.transformer.h if decoder == "GPT-2" else small.model.layers
    numbers = [block.attn.layer_idx if decoder == "GPT-2" else block.self_attn.layer_idx for block in blocks]
    cache = small(**PADDED).cache
    assert numbers == list(range(len(cache)))
    assert [layer.get_seq_length() for layer in cache.layers] == [6] * len(numbers)
    whole = build(decoder)
    assert len(whole(**PADDED).cache) > len(cache)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("is_recorded_before", [True, False])
def test_recorded_states_and_attentions_are_those_of_the_blocks_that_run(decoder, is_recorded_before):
    model = build(decoder, **EAGER)
    recorded = {"output_hidden_states": True, "output_attentions": True}
    whole = model(**PADDED, **recorded) if is_recorded_before else None
    supernet = elastic(model)
    architecture = supernet.space.smallest
    small = supernet.extract(architecture)
    with supernet.using(architecture):
        inside = model(**PADDED, **recorded)
    outside = small(**PADDED, **recorded)
    depth = small.config.num_hidden_layers
    assert (len(inside.hidden_states), len(inside.attentions)) == (depth + 1, depth)
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(inside, name), getattr(outside, name), strict=True):
            assert torch.equal(one, other)
    again = model(**PADDED, **recorded)
    assert len(again.attentions) == depth + 1
    if whole is not None:
        assert all(map(torch.equal, again.hidden_states, whole.hidden_states))


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradient_checkpointing_changes_no_gradient(decoder):
    gradients = []
    for is_checkpointed in (False, True):
        model = build(decoder).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        supernet = elastic(model)
        with supernet.using(supernet.space.smallest):
            torch.manual_seed(0)
            model(**PADDED, labels=llama.LEFT).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) < len(list(build(decoder).parameters()))  # a block that does not run has none
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
