"""BERT, RoBERTa and DistilBERT with every head: what each family promises, and what encoders add to it."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    RobertaConfig,
)

from lightning_nas.costs import MACs
from lightning_nas.errors import UnsupportedError
from lightning_nas.supernet import Supernet, default_space
from lightning_nas.testing import FamilyConformance, randomise

SIZES = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 20, "num_labels": 2,
}  # fmt: skip
CONFIGS = {
    "Bert": lambda **more: BertConfig(**SIZES, **more),
    "Roberta": lambda **more: RobertaConfig(**SIZES, **more),
    "DistilBert": lambda **more: DistilBertConfig(
        vocab_size=60, dim=24, n_layers=3, n_heads=4, hidden_dim=40, max_position_embeddings=20, num_labels=2,
        **more,
    ),
}  # fmt: skip
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
TOKENS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def build(kind, head="ForSequenceClassification", attention="sdpa", **more):
    config = CONFIGS[kind](attn_implementation=attention, **more)
    pooler = {"add_pooling_layer": False} if (kind, head) == ("Bert", "Model") else {}
    return randomise(getattr(transformers, f"{kind}{head}")(config, **pooler)).eval()


def inputs(kind):
    types = {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)} if kind == "Bert" else {}
    return {"input_ids": TOKENS, "attention_mask": MASK, **types}


CASES = [(kind, head, "sdpa", None) for kind in CONFIGS for head in HEADS]
CASES += [(kind, "ForMaskedLM", "eager", (0.5, 1.0)) for kind in CONFIGS]
CASES += [
    ("Bert", head, "sdpa", (0.5, 1.0)) for head in ("Model", "ForPreTraining", "ForSequenceClassification")
]
CASES += [("Roberta", "ForSequenceClassification", "sdpa", (0.5, 1.0))]
CASES += [("DistilBert", "ForSequenceClassification", "sdpa", (0.5, 1.0))]


@pytest.mark.parametrize(("kind", "head", "attention", "embed"), CASES)
class TestEncoders(FamilyConformance):
    @pytest.fixture
    def network(self, kind, head, attention, embed):
        self.embed = embed
        return build(kind, head, attention), inputs(kind)

    def space(self, model):
        return default_space(model, embed=self.embed)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_recorded_on_the_way_is_that_of_the_blocks_that_run(kind, attention):
    model = build(kind, attention=attention)
    supernet = Supernet(model)
    wanted = {**inputs(kind), "output_hidden_states": True, "output_attentions": attention == "eager"}
    model(**wanted)  # installs transformers' own hooks
    with supernet.using(supernet.space.smallest):
        active = model(**wanted)
    extracted = supernet.extract(supernet.space.smallest)(**wanted)
    assert len(active.hidden_states) == len(extracted.hidden_states) == 3
    for one, other in zip(active.hidden_states, extracted.hidden_states, strict=True):
        assert torch.equal(one, other)
    if attention == "eager":
        assert [a.shape[1] for a in extracted.attentions] == [1, 1]
        assert all(map(torch.equal, active.attentions, extracted.attentions))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = build(kind).train()
    supernet = Supernet(model)
    gradients = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        with supernet.using(supernet.space.smallest):
            model(**inputs(kind), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name])


def test_the_config_says_what_a_stock_class_can_build():
    supernet = Supernet(build("Bert"))
    uniform = {**supernet.space.largest, **{f"layers.{i}.mlp": 20 for i in range(3)}, "depth": 2}
    extracted = supernet.extract(uniform)
    assert (extracted.config.num_hidden_layers, extracted.config.intermediate_size) == (2, 20)
    twin = BertForSequenceClassification(extracted.config)
    twin.load_state_dict(extracted.state_dict())
    assert torch.equal(twin.eval()(**inputs("Bert")).logits, extracted(**inputs("Bert")).logits)
    assert supernet.model.config.num_hidden_layers == 3
    assert [block.attention.self.layer_idx for block in extracted.bert.encoder.layer] == [0, 1]


def test_tied_embeddings_stay_tied_at_every_width():
    model = build("Bert", "ForMaskedLM")
    supernet = Supernet(model, default_space(model, embed=(0.5, 1.0)))
    extracted = supernet.extract(supernet.space.smallest)
    assert extracted.cls.predictions.decoder.weight is extracted.bert.embeddings.word_embeddings.weight
    assert extracted.config.hidden_size == 12


def test_bert_base_has_the_published_space_and_macs():
    """InstaTune, table 1: 11.17 G for the encoder of BERT-base on 128 tokens, 2.19 G for its smallest."""
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig()).bert
        model.pooler = None
    space = default_space(model, "instatune")
    assert space.size == 9_726_654_763_008
    supernet = Supernet(model, space)
    macs = MACs(supernet, torch.zeros(1, 128, dtype=torch.long))
    assert macs(space.largest) == 11_173_625_856
    by_hand = 6 * (4 * 128 * 768 * 64 * 6 + 2 * 128**2 * 64 * 6 + 2 * 128 * 768 * 1024)
    assert macs(space.smallest) == by_hand
    assert round(by_hand / 1e9, 2) == 2.19


def test_decoders_and_other_attention_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"BertModel is used as a decoder"):
        Supernet(build("Bert", "Model", is_decoder=True))
    model = build("Bert", "Model")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        UnsupportedError, match=r"'flex_attention' is not supported; load .*'sdpa' or 'eager'"
    ):
        Supernet(model)
    with pytest.raises(UnsupportedError, match=r"BertLMHeadModel is not a supported network. Did you mean"):
        Supernet(transformers.BertLMHeadModel(CONFIGS["Bert"](is_decoder=True)))


def test_a_class_that_a_user_derives_is_taken_for_what_it_extends():
    class Mine(BertModel):
        def forward(self, tokens):
            return super().forward(tokens).last_hidden_state.mean(1)

    model = randomise(Mine(CONFIGS["Bert"]())).eval()
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):
        active = model(TOKENS)
    assert torch.equal(supernet.extract(supernet.space.smallest)(TOKENS), active)
