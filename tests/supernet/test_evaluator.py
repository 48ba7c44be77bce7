"""Measuring subnetworks together, by shared beginnings and by racing, against measuring them one by one."""

import numpy as np
import pytest
import torch
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from lightning_nas import Racing
from lightning_nas.supernet import Supernet, SupernetEvaluator, default_space
from lightning_nas.testing import randomise

SIZES = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vit(depth=4, **settings):
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "num_heads": 4}
    return randomise(VisionTransformer(depth=depth, **sizes, **settings)).eval()


def bert():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=16, **SIZES
    )
    return randomise(BertForSequenceClassification(config)).eval()


def gpt2():
    return randomise(
        GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=3, n_head=4, **SIZES))
    ).eval()


def swin():
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
    return randomise(SwinTransformer(**sizes, window_size=4, num_classes=3)).eval()


def resnet():
    return randomise(ResNet(Bottleneck, (1, 2, 1, 1), channels=(16, 16, 16, 16), num_classes=3)).eval()


def pictures(channels, side, count=3):
    return [(torch.randn(2, channels, side, side, generator=seeded(i)),) for i in range(count)]


def sentences(count=3):
    tokens = [torch.randint(1, 50, (2, 5 + i), generator=seeded(i)) for i in range(count)]
    for token in tokens:
        token[1, 3:] = 0
    return [{"input_ids": token, "attention_mask": (token != 0).long()} for token in tokens]


NETWORKS = {
    "vit": (vit, pictures(1, 8)),
    "bert": (bert, sentences()),
    "gpt2": (gpt2, sentences()),
    "swin": (swin, pictures(3, 32)),
    "resnet": (resnet, pictures(3, 32)),
}


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def drawn(space, count, seed=0):
    """Architectures, many of which begin alike: mutants of a few."""
    rng = np.random.default_rng(seed)
    parents = [space.sample(rng) for _ in range(2)]
    found = []
    for i in range(count):
        one, other = dict(parents[i % 2]), space.sample(rng)
        for name in rng.choice(space.names, 2):
            one[name] = other[name]
        found.append(space.canonical(one))
    return found


@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_of_subnetworks_that_share_equal_their_own_bit_for_bit(kind):
    build, batches = NETWORKS[kind]
    supernet, found = Supernet(build()), {}

    def score(output, batch):
        found.setdefault(supernet.active.key, []).append(logits(output).clone())
        return logits(output).argmax(-1)

    architectures = drawn(supernet.space, 8)
    calibration = batches if kind == "resnet" else None
    evaluate = SupernetEvaluator(supernet, batches, score, calibration=calibration)
    evaluate.many(architectures)
    assert (evaluate.prefixes.skipped > 0) == (kind not in ("resnet", "gpt2"))
    for architecture in architectures:
        with supernet.using(architecture), torch.no_grad():
            own = [logits(supernet.family.output(supernet.model, batch)) for batch in batches]
        assert all(torch.equal(one, other) for one, other in zip(found[architecture.key], own, strict=True))


def test_each_different_beginning_runs_once_on_each_batch():
    supernet = Supernet(vit())
    architectures = drawn(supernet.space, 30)
    evaluate = SupernetEvaluator(supernet, pictures(1, 8), lambda output, _: output.argmax(1))
    evaluate.many(architectures)
    beginnings, blocks = set(), 0
    for architecture in set(architectures):
        kept = supernet.space["depth"].kept(architecture["depth"])
        run = [(i, architecture[f"layers.{i}.heads"], architecture[f"layers.{i}.mlp"]) for i in kept]
        beginnings |= {tuple(run[: k + 1]) for k in range(len(run))}
        blocks += len(run)
    assert evaluate.prefixes.executed == 3 * len(beginnings)
    assert evaluate.prefixes.skipped == 3 * (blocks - len(beginnings))
    assert len(beginnings) < 0.8 * blocks


@pytest.mark.parametrize("execution", ["slice", "mask"])
def test_an_elastic_width_is_shared_only_where_it_is_equal(execution):
    model = vit()
    space = default_space(model, embed=(0.5, 1.0))
    supernet = Supernet(model, space, execution=execution)
    deep = space.architecture({"depth": 4, "layers.3.mlp": space["layers.3.mlp"].values[0]})
    narrow = space.architecture({**space.largest, "embed": space["embed"].values[0]})
    evaluate = SupernetEvaluator(supernet, pictures(1, 8, 1), lambda output, _: output.sum(1))
    together = evaluate.many([space.largest, deep, narrow])
    assert evaluate.prefixes.skipped == (3 if execution == "slice" else 0)
    for architecture, values in zip([space.largest, deep, narrow], together, strict=True):
        with supernet.using(architecture), torch.no_grad():
            own = supernet.model(pictures(1, 8, 1)[0][0]).sum(1).double().mean().item()
        assert values == {"accuracy": own}


def test_a_block_whose_output_is_changed_in_place_later_runs_again():
    class Doubling(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model = vit()
    model.norm = Doubling(16)
    supernet = Supernet(model)
    architectures = drawn(supernet.space, 8)
    scores = {}
    for shares in (True, False):
        settings = {"score": lambda output, _: output.sum(1), "share_prefixes": shares}
        scores[shares] = SupernetEvaluator(supernet, pictures(1, 8), **settings).many(architectures)
    assert scores[True] == scores[False]


def test_a_block_with_hooks_inside_runs_each_time():
    supernet, calls = Supernet(vit()), []
    supernet.model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    evaluate = SupernetEvaluator(supernet, pictures(1, 8), lambda output, _: output.argmax(1))
    architectures = {a.key: a for a in drawn(supernet.space, 6)}
    evaluate.many(list(architectures.values()))
    assert len(calls) == 3 * len(architectures)


def test_the_network_is_as_it_was_after_a_measurement_and_after_an_error():
    supernet = Supernet(vit().train())
    supernet.activate(supernet.space.smallest)
    supernet.model.blocks[0].eval()
    modes = [module.training for module in supernet.model.modules()]

    def fail(output, batch):
        assert not any(module.training for module in supernet.model.modules())
        assert not output.requires_grad
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        SupernetEvaluator(supernet, pictures(1, 8), fail).many([supernet.space.largest] * 2)
    SupernetEvaluator(supernet, pictures(1, 8), lambda output, _: output.argmax(1))(supernet.space.largest)
    assert [module.training for module in supernet.model.modules()] == modes
    assert supernet.active == supernet.space.smallest
    assert not any("forward" in vars(block) for block in supernet.model.blocks)


class Params:
    name, unit = "size", "units"

    def __call__(self, architecture):
        return float(sum(architecture.values()))


@pytest.mark.parametrize("shares", [True, False])
def test_a_group_races_against_those_measured_before(shares):
    supernet = Supernet(vit())
    images = [torch.randn(20, 1, 8, 8, generator=seeded(i)) for i in range(30)]
    # The smallest network is right, the others only as far as they agree with it.
    with torch.no_grad(), supernet.using(supernet.space.smallest):
        batches = [(x, supernet.model(x).argmax(1)) for x in images]
    ran = []

    def correct(output, batch):
        ran.append(supernet.active)
        return output.argmax(1) == batch[1]

    evaluate = SupernetEvaluator(
        supernet, batches, correct, costs=[Params()], racing=Racing(), share_prefixes=shares
    )
    assert evaluate(supernet.space.smallest) == {"accuracy": 1.0, "share": 1.0}
    ran.clear()
    group = drawn(supernet.space, 6)
    found = evaluate.many(group)
    for architecture, values in zip(group, found, strict=True):
        assert values["share"] < 1
        assert values["accuracy"] < 1
        assert ran.count(architecture) == round(values["share"] * 30)


def test_a_network_with_batch_norm_needs_data_for_its_statistics():
    with pytest.raises(ValueError, match=r"bn1 is a batch norm.*give calibration="):
        SupernetEvaluator(Supernet(resnet()), pictures(3, 32), logits)
