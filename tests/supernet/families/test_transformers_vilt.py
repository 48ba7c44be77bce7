from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltForTokenClassification,
    ViltModel,
)

from lightning_nas.costs import MACs
from lightning_nas.supernet import Supernet
from tests.supernet.families.towers import IMAGE, SIZES, TowerConformance, built, drawn, tokens

PIXELS = torch.ones(2, 16, 16, dtype=torch.long)
PIXELS[1, :, 8:] = 0
WORDS = {
    "input_ids": tokens(2, 5),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "token_type_ids": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]),
}
PAIR = WORDS | {"pixel_values": drawn(2, 3, 16, 16), "pixel_mask": PIXELS}
PAIRS = WORDS | {"pixel_values": drawn(2, 2, 3, 16, 16), "pixel_mask": PIXELS[None].repeat(2, 1, 1, 1)}
TWO = {"num_images": 2, "modality_type_vocab_size": 3}
VARIANTS = {
    "question answering": (
        ViltForQuestionAnswering,
        {},
        PAIR | {"labels": torch.tensor([[0, 1.0], [0.3, 0]])},
    ),
    "retrieval": (ViltForImageAndTextRetrieval, {}, PAIR),
    "masked words": (ViltForMaskedLM, {}, PAIR | {"labels": WORDS["input_ids"]}),
    "two images": (ViltForImagesAndTextClassification, TWO, PAIRS | {"labels": torch.tensor([0, 1])}),
    "tokens": (ViltForTokenClassification, {}, PAIR | {"labels": WORDS["input_ids"] % 2}),
    "features of whole images": (
        ViltModel,
        {"qkv_bias": False},
        WORDS | {"pixel_values": PAIR["pixel_values"]},
    ),
}


def vilt(network, **settings):
    return built(network, ViltConfig(**SIZES, **IMAGE, vocab_size=30, max_position_embeddings=8, **settings))


@pytest.mark.parametrize("variant", VARIANTS)
class TestViLT(TowerConformance):
    stated = {"heads": ()}  # noqa: RUF012  # its heads are as wide as the width over their number

    @pytest.fixture
    def network(self, variant, monkeypatch):
        def in_order(weights, count, replacement=False):
            return torch.arange(int(count)) % len(weights)

        monkeypatch.setattr(torch, "multinomial", in_order)  # it draws the order of the patches
        network, settings, inputs = VARIANTS[variant]
        return vilt(network, **settings), inputs


def test_an_extracted_network_draws_the_same_order_of_patches():
    model = vilt(ViltModel)
    supernet = Supernet(model)
    small = supernet.extract(supernet.space.smallest)
    with supernet.using(supernet.space.smallest), torch.no_grad():
        torch.manual_seed(3)
        inside = model(**PAIR).last_hidden_state
    with torch.no_grad():
        torch.manual_seed(3)
        assert torch.equal(small(**PAIR).last_hidden_state, inside)


def test_patches_that_all_masks_leave_out_cost_nothing():
    supernet = Supernet(vilt(ViltForQuestionAnswering))
    halved = PAIR | {"pixel_mask": PIXELS[1:].repeat(2, 1, 1)}
    costs = []
    for inputs in (PAIR, halved):
        small = supernet.extract(supernet.space.smallest)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(**inputs)
        costs.append(MACs(supernet, inputs)(supernet.space.smallest))
        assert 2 * costs[-1] == counter.get_total_flops()
    assert costs[1] < costs[0]


def test_counting_leaves_the_random_state_as_it_was():
    supernet = Supernet(vilt(ViltForQuestionAnswering))
    before = torch.get_rng_state()
    MACs(supernet, PAIR)
    assert torch.equal(torch.get_rng_state(), before)
