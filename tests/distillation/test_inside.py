"""Rules on what networks hold inside, on a tiny BERT whose modules are watched by hand."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_nas.distillation import (
    Both,
    HiddenStates,
    InstaTuneLoss,
    Relations,
    Teacher,
    hidden_state_loss,
    noise_to_signal,
    qkv_relation_loss,
    soft_cross_entropy,
    student_loss_named,
    tap_names,
)

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
TOKENS = torch.arange(10).view(2, 5)


def bert(layers=3, heads=4, seed=0, width=24):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=12, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def watched(model):
    """What every module gave, and the logits and all hidden states that the model itself tells."""
    taps = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: taps.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    output = model(TOKENS, attention_mask=MASK, output_hidden_states=True)
    return {name: tap for name, tap in taps.items() if isinstance(tap, torch.Tensor)}, output


def test_hidden_states_are_those_that_transformers_tells():
    student, teacher = watched(bert(seed=1)), watched(bert())
    rule = HiddenStates("encoder.layer.*", weight=3.0, then=Teacher(2.0))
    got = rule(
        student[1].logits, teacher[1].logits, task=None, strong=None, features=False,
        student_taps=student[0], teacher_taps=teacher[0], mask=MASK.bool(),
    )  # fmt: skip
    pairs = zip(student[1].hidden_states[1:], teacher[1].hidden_states[1:], strict=True)
    squares = [((s - t) ** 2)[MASK.bool()].mean() for s, t in pairs]
    expected = soft_cross_entropy(student[1].logits, teacher[1].logits, 2.0) + 3 * sum(squares) / 3
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["cosine", "nsr"])
def test_hidden_states_take_the_other_distances(kind):
    student, teacher = watched(bert(seed=1))[0], watched(bert())[0]
    names = tap_names(teacher, "encoder.layer.*")
    assert len(names) == 3
    loss = noise_to_signal if kind == "nsr" else lambda s, t: hidden_state_loss(s, t, "cosine")
    expected = sum(loss(student[name], teacher[name]) for name in names) / 3
    of_other_tokens = torch.zeros(1, 1)  # of the text alone, where states of an image come behind it
    for mask in (None, of_other_tokens):
        found = HiddenStates("encoder.layer.*", kind).distance(student, teacher, mask)
        torch.testing.assert_close(found, expected)


def qkv(taps, layer):
    return [taps[f"bert.encoder.layer.{layer}.attention.self.{name}"] for name in ("query", "key", "value")]


@pytest.mark.parametrize(
    ("layer", "dropped", "pair"),
    [
        (-1, (), (2, 2)),
        (-1, (2,), (1, 2)),  # the last of each
        (-2, (0,), (1, 1)),
        (-3, (0,), None),  # the student keeps two
        (1, (0,), (1, 1)),
        (0, (0,), None),
    ],
)
def test_relations_are_of_the_chosen_layer_of_each(layer, dropped, pair):
    student, teacher = watched(bert(seed=1, heads=2, width=12))[0], watched(bert())[0]
    student = {n: t for n, t in student.items() if not any(f"layer.{i}." in n for i in dropped)}
    got = Relations(heads=4, layer=layer, kind="kl").distance(student, teacher, MASK.bool())
    if pair is None:
        assert got is None
    else:
        expected = qkv_relation_loss(qkv(student, pair[0]), qkv(teacher, pair[1]), 4, "kl", MASK)
        torch.testing.assert_close(got, expected)


def test_fused_queries_keys_and_values_are_split_in_three():
    student, teacher = watched(bert(seed=1, heads=2, width=12))[0], watched(bert())[0]
    expected = Relations(heads=4).distance(student, teacher, None)
    fused = [{"blocks.0.attn.qkv": torch.cat(qkv(taps, 2), -1)} for taps in (student, teacher)]
    torch.testing.assert_close(Relations(fused="*qkv", heads=4).distance(*fused, None), expected)


def test_rules_stand_on_each_other_and_ask_what_the_innermost_asks():
    student, teacher = watched(bert(seed=1)), watched(bert())
    frozen = torch.nn.Identity()
    inner = InstaTuneLoss(alpha=0.4, strong_teacher=frozen)
    rule = HiddenStates("layer.*", weight=0.5, then=Relations(heads=4, weight=2.0, then=inner))
    assert rule.taps == ("layer.*", "*query", "*key", "*value")
    assert (rule.needs_task, rule.needs_teacher, rule.strong_teacher) == (True, True, frozen)
    assert rule.largest_weight == 0.4
    logits = torch.zeros(2, 3).double(), student[1].logits
    assert rule.largest_extra(*logits) == inner.largest_extra(*logits)
    given = {"task": torch.tensor(0.7), "strong": student[1].logits.detach() + 1, "features": False}
    taps = {"student_taps": student[0], "teacher_taps": teacher[0], "mask": None}
    got = rule(student[1].logits, teacher[1].logits, **given, **taps)
    expected = (
        inner(student[1].logits, teacher[1].logits, **given)
        + 2 * Relations(heads=4).distance(student[0], teacher[0], None)
        + 0.5 * HiddenStates("layer.*").distance(student[0], teacher[0], None)
    )
    torch.testing.assert_close(got, expected)
    plain = HiddenStates("layer.*")
    assert plain.then == Both()
    assert (plain.strong_teacher, plain.largest_weight, plain.largest_extra) == (None, 1.0, None)
    assert student_loss_named(plain) is plain


def test_patterns_find_the_outermost_modules_in_order():
    names = ["a", "a.layer", "a.layer.0", "a.layer.0.out", "a.layer.1", "a.layer.10", "layer.2", "b.player.3"]
    assert tap_names(names, "layer.*") == ["a.layer.0", "a.layer.1", "a.layer.10", "layer.2"]
    assert tap_names(names, "*layer.*") == ["a.layer.0", "a.layer.1", "a.layer.10", "layer.2", "b.player.3"]
    assert tap_names(names, "a.*") == ["a.layer"]
    assert tap_names(names, "c") == []


def test_what_cannot_be_compared_is_named():
    student, teacher = watched(bert(seed=1, heads=2, width=12))[0], watched(bert())[0]
    with pytest.raises(ValueError, match="widths differ, 12 and 24. Compare relations"):
        HiddenStates("layer.*").distance(student, teacher, None)
    with pytest.raises(ValueError, match=r"layer=3, but 3 modules match '\*query'"):
        Relations(layer=3).distance(student, teacher, None)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        Relations(weight=-1)
    with pytest.raises(ValueError, match="kind must be 'mse', 'cosine' or 'nsr', got 'l1'"):
        HiddenStates("layer.*", kind="l1")
