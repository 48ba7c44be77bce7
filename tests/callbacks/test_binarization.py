"""Binarization beside loops written by hand: optimizers, schedules, teachers, checkpoints, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import Binarization, InstaTune, SupernetTraining
from lightning_nas.callbacks._binary_checks import refuse_unused
from lightning_nas.callbacks._stages import stages_named
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn

import lightning_nas as nas
from lightning_nas.binary import Activations, Weights
from tests import user_modules as users
from tests.callbacks.test_supernet_training import QUIET, assert_same, weights

LEARNED = {"weights": Weights(scale="learned"), "activations": 1}


def fit(module, *callbacks, epochs=2, data=None, ckpt_path=None, **settings):
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": epochs, **settings})
    trainer.fit(module, users.loader() if data is None else data, users.loader(), ckpt_path=ckpt_path)
    return trainer


class Each(pl.Callback):
    """Notes something at the start of each batch."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate() or trainer.accumulate_grad_batches == 1:
            self.seen.append(self.look(pl_module))


class MadeInSetup(users.ConfiguredLate):
    def setup(self, stage):
        self.configure_model()

    def configure_model(self):
        super().configure_model()


class MadeInSetupAlone(users.PlainClassifier):
    def __init__(self):
        super().__init__(nn.Identity())
        self.net = None

    def setup(self, stage):
        if self.net is None:
            self.net = users.tiny_vit()


MODULES = [users.PlainClassifier, users.ConfiguredLate, MadeInSetup, MadeInSetupAlone]


# --- the transform


@pytest.mark.parametrize("named", [None, "net"])
@pytest.mark.parametrize("module", MODULES)
def test_the_optimizer_holds_every_new_parameter_wherever_the_network_is_made(module, named):
    module, callback = module(), Binarization(**LEARNED, network=named)
    trainer = fit(module, callback, epochs=1)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    scales = {n: p for n, p in module.named_parameters() if n.endswith("_scale")}
    assert len(scales) == 2 * 12  # of weights and inputs, in three blocks of four layers
    assert {id(p) for p in scales.values()} <= held
    assert all(trainer.optimizers[0].state[p]["step"] == 3 for p in scales.values())
    assert callback.model is module.net
    assert "configure_model" not in vars(module)


@pytest.mark.parametrize("module", MODULES)
def test_the_network_stays_binary_after_fit_and_release_gives_the_plain_one(module):
    module, callback = module(), Binarization()
    fit(module, callback)
    for layer in callback.layers.values():
        assert set(layer.binary_weight.unique().tolist()) == {-1.0, 1.0}
    nas.binary.release(module.net)
    plain = users.tiny_vit()
    assert {n: type(m) for n, m in module.net.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    plain.load_state_dict(module.net.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_module_with_several_children_is_binary_as_a_whole():
    class TwoParts(users.PlainClassifier):
        def __init__(self):
            super().__init__(users.tiny_vit(num_classes=0))
            self.head = nn.Linear(16, users.CLASSES)

        def forward(self, x):
            return self.head(self.net(x))

    module, callback = TwoParts(), Binarization(distill_from="float")
    fit(module, callback)
    assert callback.model is module
    assert len(callback.layers) == 12
    assert "head" not in callback.layers  # the last


def test_the_opening_line_says_what_is_binary_and_why_the_rest_is_not(caplog):
    with caplog.at_level("INFO"):
        fit(users.PlainClassifier(), Binarization(exclude="blocks.1.*"))
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Binarization:")]
    assert "8 layers binary" in line
    assert "patch_embed.proj (first layer)" in line
    assert "(excluded)" in line
    assert "Weights of 1 bit" in line


def test_inputs_that_were_never_negative_are_named_once(caplog):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    with caplog.at_level("INFO"):
        fit(users.PlainClassifier(net), Binarization(activations=1))
    said = [r.getMessage() for r in caplog.records if "never negative" in r.getMessage()]
    assert len(said) == 1
    assert "inputs of 3 were" in said[0]


# --- one run


def power_at(progress):
    return 1 + (1 - math.cos(math.pi * progress / 2)) * 2  # ReSTE's schedule to a power of 3


@pytest.mark.parametrize("teaches", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_equals_the_loop_written_by_hand(accumulate, teaches):
    ours, hand = users.PlainClassifier().double(), users.PlainClassifier().double()
    teaching = {"distill_from": "float", "distill_weight": 2.0, "temperature": 3.0}
    teaching |= {"distill_hidden": nas.HiddenStates(layers="blocks.*", weight=0.5)}
    callback = Binarization(**LEARNED, **(teaching if teaches else {}))
    fit(
        ours,
        callback,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    )
    teacher = copy.deepcopy(hand.net).eval()
    nas.binarize(hand.net, **LEARNED)
    hand.double().train()  # what the layers count with, too
    optimizer, step, total = hand.configure_optimizers(), 0, 2 * -(-3 // accumulate)

    def inside(network, x):
        x = network.pos_embed + torch.cat(
            (network.cls_token.expand(len(x), -1, -1), network.patch_embed(x)), 1
        )
        states = []
        for block in network.blocks:
            x = block(x)
            states.append(x)
        return states, network.head(network.norm(x)[:, 0])

    for _ in range(2):
        for batch, (x, y) in enumerate(users.loader(), 1):
            for layer in nas.binary.layers(hand.net).values():
                layer.weight_estimator.current.fill_(power_at(step / total))
                layer.input_estimator.current.fill_(power_at(step / total))
            states, logits = inside(hand.net, x.double())
            loss = F.cross_entropy(logits, y)
            if teaches:
                with torch.no_grad():
                    their_states, theirs = inside(teacher, x.double())
                p, log_q = (theirs / 3).softmax(-1), (logits / 3).log_softmax(-1)
                loss = loss + 2 * 9 * (p * (p.log() - log_q)).sum(-1).mean()
                distances = [(a - b).square().mean() for a, b in zip(states, their_states, strict=True)]
                loss = loss + 0.5 * torch.stack(distances).mean()
            (loss / accumulate).backward()
            if batch % accumulate == 0 or batch == 3:
                torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-9)


def test_without_codes_to_learn_from_the_teacher_says_nothing_new():
    """A run in which nothing is inert but the weight of its teacher: 0 changes no bit."""
    runs = []
    for teaching in ({}, {"distill_from": "float", "distill_weight": 0.0, "log_every": 1}):
        module = users.ScheduledClassifier()
        pl.seed_everything(0, verbose=False)
        fit(module, Binarization(activations=1, **teaching))
        runs.append(weights(module))
    assert_same(*runs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("estimator", "read", "expected"),
    [
        ("reste", lambda e: e.current.item(), power_at),
        ("ede", lambda e: e.t.item(), lambda p: 10 ** (2 * p - 1)),
        (nas.estimators.ReSTE(power=1.0), lambda e: e.current.item(), lambda p: 1.0),
    ],
)
def test_schedules_follow_the_optimizer_step(estimator, read, expected):
    each = Each(lambda m: read(m.net.blocks[0].mlp.fc1.weight_estimator))
    callback = Binarization(estimator)
    fit(users.PlainClassifier(), callback, each)
    assert each.seen == pytest.approx([expected(step / 6) for step in range(6)])
    assert read(callback.layers["blocks.0.mlp.fc1"].weight_estimator) == pytest.approx(expected(1.0))


def test_a_schedule_may_be_shorter_than_the_run_or_off():
    short, off = (Each(lambda m: m.net.blocks[0].mlp.fc1.weight_estimator.current.item()) for _ in range(2))
    fit(users.PlainClassifier(), Binarization(schedule_steps=2), short)
    fit(users.PlainClassifier(), Binarization(schedule=False), off)
    assert short.seen == pytest.approx([power_at(min(step / 2, 1)) for step in range(6)])
    assert off.seen == [3.0] * 6


@pytest.mark.parametrize(
    ("stages", "settings", "expected"),
    [
        ("weights-first", {}, [(1, 32)] * 3 + [(1, 1)] * 3),
        ("activations-first", {}, [(32, 1)] * 3 + [(1, 1)] * 3),
        ("weights-first", {"weights": 2}, [(2, 32)] * 3 + [(2, 1)] * 3),
        (
            [(0.0, {"weights": 32, "activations": 32}), (0.3, {"weights": 1}), (0.9, {"activations": 1})],
            {},
            [(32, 32)] * 2 + [(1, 32)] * 4,
        ),
    ],
)
def test_stages_begin_at_their_fraction_of_the_run(stages, settings, expected):
    def bits(module):
        (pair,) = {(layer.weight_bits, layer.input_bits) for layer in nas.binary.layers(module).values()}
        return pair

    each, module = Each(bits), users.PlainClassifier()
    callback = Binarization("ste", stages=stages, **{"activations": 1, **settings})
    if expected[-1][1] == 1:
        fit(module, callback, each)
    else:
        with pytest.warns(UserWarning, match="ended at .* before its last stage"):
            fit(module, callback, each)
    assert each.seen == expected
    assert bits(module)[1] == 1  # in its final form, whatever the run reached


def test_biper_trains_the_sine_first_and_then_the_square_wave():
    def values(module):
        weight = module.net.blocks[0].mlp.fc1.binary_weight
        return bool((weight.abs() == 1).all())

    each, callback = Each(values), Binarization("biper", stages="biper")
    fit(users.PlainClassifier(), callback, each)
    assert each.seen == [False] * 3 + [True] * 3


def test_clamp_keeps_latent_weights_within_bounds():
    module = users.PlainClassifier(lr=1.0)
    callback = Binarization("ste", clamp=0.25)
    fit(module, callback)
    assert max(layer.weight.abs().max() for layer in callback.layers.values()) == 0.25
    assert module.net.head.weight.abs().max() > 0.25


# --- checkpoints


RESUMED = {
    "schedule": {},
    "learned scales": LEARNED,
    "a teacher and stages": {**LEARNED, "distill_from": "float", "stages": "weights-first"},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_continues_exactly(settings, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = users.ScheduledClassifier(users.tiny_vit()), users.ScheduledClassifier(users.tiny_vit(1))
    fit(whole, Binarization(**settings, log_every=1), keep, enable_checkpointing=True)
    each = Each(lambda m: m.net.blocks[0].mlp.fc1.weight_estimator.current.item())
    callback = Binarization(**settings, log_every=1)
    fit(resumed, callback, each, ckpt_path=tmp_path / "step=3.ckpt")
    assert_same(weights(resumed), weights(whole), rtol=0, atol=0)
    assert each.seen == pytest.approx([power_at(step / 6) for step in range(3, 6)])
    if callback.teacher is not None:
        assert_same(weights(callback.teacher), weights(users.tiny_vit()), rtol=0, atol=0)


def test_a_checkpoint_of_the_float_module_goes_on_binary_and_its_weights_teach(tmp_path):
    keep = ModelCheckpoint(tmp_path, "float")
    plain = users.PlainClassifier(users.tiny_vit(3))
    fit(plain, keep, epochs=1, enable_checkpointing=True)
    module, callback = users.PlainClassifier(), Binarization(**LEARNED, distill_from="float")
    trainer = fit(module, callback, ckpt_path=tmp_path / "float.ckpt")
    assert trainer.global_step == 6
    assert_same(weights(callback.teacher), weights(plain.net), rtol=0, atol=0)
    state = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    nas.binarize(users.tiny_vit()).load_state_dict({n.removeprefix("net."): v for n, v in state.items()})


def test_validation_alone_is_of_the_binary_network_in_the_form_of_its_checkpoint(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = fit(
        users.PlainClassifier(),
        Binarization(**LEARNED, stages="weights-first"),
        keep,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    expected = {name: float(trainer.callback_metrics[name]) for name in ("val_loss", "val_acc")}
    for made in (users.PlainClassifier, users.ConfiguredLate):
        module = made()
        callback = Binarization(**LEARNED, stages="weights-first")
        (found,) = pl.Trainer(callbacks=[callback], **QUIET).validate(
            module, users.loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False
        )
        assert found == pytest.approx(expected, rel=1e-6)
        assert len(nas.binary.layers(module.net)) == 12
        pl.Trainer(callbacks=[callback], **QUIET).validate(
            module, users.loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False
        )
        assert {layer.input_bits for layer in callback.layers.values()} == {32}


# --- others in the same Trainer


@pytest.mark.parametrize("is_first", [True, False])
def test_a_binary_family_is_searched_and_extracted_in_whatever_order_callbacks_come(is_first):
    search = InstaTune("val_acc", costs=("params",), budget=4, storage="memory", warmup=2, validate=())
    ours = Binarization(**LEARNED, distill_from="float")
    module = users.PlainClassifier()
    fit(module, *((ours, search) if is_first else (search, ours)))
    assert search.sandwich_steps == 4
    x = users.images().tensors[0]
    for candidate in search.result.front:
        small = search.extract(candidate).eval()
        with search.supernet.using(candidate.architecture), torch.no_grad():
            assert torch.equal(small(x), module.net.eval()(x))
        for layer in nas.binary.layers(small).values():
            assert set(layer.binary_weight.unique().tolist()) == {-1.0, 1.0}
        assert len(nas.binary.layers(small)) % 4 == 0
    search.supernet.release()
    assert {type(layer) for layer in nas.binary.layers(module).values()} == {nas.binary.BinaryLinear}


@pytest.mark.parametrize("settings", [{}, {"weights": Weights(scale="learned")}])
def test_an_average_before_ours_is_exact_or_refused(settings):
    module, average = users.PlainClassifier(), WeightAveraging(avg_fn=get_ema_avg_fn(0.5))
    if not settings:
        fit(module, average, Binarization(**settings))
        assert len(nas.binary.layers(module)) == 12
        return
    with pytest.raises(nas.UnsupportedError, match="WeightAveraging has copied .*before WeightAveraging in"):
        fit(module, average, Binarization(**settings))
    assert not nas.binary.layers(module)
    fit(users.PlainClassifier(), Binarization(**settings), WeightAveraging(avg_fn=get_ema_avg_fn(0.5)))


def test_a_module_that_was_binarized_before_is_taken_as_it_is():
    module = users.PlainClassifier()
    nas.binarize(module.net, "ste", include="blocks.0.*")
    callback = Binarization()
    fit(module, callback, epochs=1)
    fit(module, callback, epochs=1)
    assert len(callback.layers) == 4
    with pytest.raises(nas.UnsupportedError, match="binary already, with activations of 32 bits where 1"):
        fit(module, Binarization(activations=1))
    assert len(nas.binary.layers(module)) == 4


# --- refusals, and what is left after them


class Crashing(users.PlainClassifier):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


class MadeAnew(users.PlainClassifier):
    def configure_model(self):
        pass

    def on_fit_start(self):
        pass

    def setup(self, stage):
        self.net = users.tiny_vit()


class Manual(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class ByLBFGS(users.PlainClassifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class WithNaN(users.PlainClassifier):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net.blocks[1].mlp.fc1.weight[0, 0] = math.nan


class NaNScale(users.PlainClassifier):
    def configure_optimizers(self):
        with torch.no_grad():
            self.net.blocks[1].mlp.fc1.weight_scale[0] = math.nan
        return super().configure_optimizers()


LENGTHLESS = {"max_epochs": -1, "limit_train_batches": 2}
FLOAT = {"distill_from": "float"}
REFUSED = {
    "a crash": (Crashing, {}, {}, RuntimeError, "boom"),
    "no such network": (
        users.PlainClassifier,
        {"network": "nett"},
        {},
        nas.NoMatchError,
        "no sub-module 'nett'",
    ),
    "no such layer": (users.PlainClassifier, {"include": "fc3"}, {}, nas.NoMatchError, "matches nothing.*fc"),
    "not such a layer": (users.PlainClassifier, {"include": "norm"}, {}, nas.UnsupportedError, "stays real"),
    "NaN weights": (WithNaN, {}, {}, ValueError, "blocks.1.mlp.fc1.weight has 1 values that are not finite"),
    "NaN scales": (NaNScale, LEARNED, {}, ValueError, "weight scale of blocks.1.mlp.fc1 is not finite"),
    "made anew": (MadeAnew, {"network": "net"}, {}, nas.NASError, "made its network anew"),
    "other classes": (
        users.PlainClassifier,
        {"distill_from": users.tiny_vit(num_classes=7)},
        {},
        nas.UnsupportedError,
        "has 7 classes and the network has 3",
    ),
    "another output": (
        users.PlainClassifier,
        {"distill_from": nn.Sequential(nn.Flatten(), nn.Linear(64, 5))},
        {},
        nas.UnsupportedError,
        r"teacher's output has shape \(8, 5\) where the network's has \(8, 3\)",
    ),
    "no such tap": (
        users.PlainClassifier,
        {**FLOAT, "distill_hidden": "layer.*"},
        {},
        nas.NoMatchError,
        "distill_hidden: no module",
    ),
    "manual": (Manual, FLOAT, {}, nas.UnsupportedError, "manual optimization is not supported"),
    "LBFGS": (ByLBFGS, FLOAT, {}, nas.UnsupportedError, "LBFGS runs training_step several times"),
    "no length": (users.PlainClassifier, {}, {"max_epochs": -1}, ValueError, "give schedule_steps"),
    "a mixture": (
        users.PlainClassifier,
        {"activations": 1},
        {"callbacks": SupernetTraining(sampler="multi-architectural")},
        nas.UnsupportedError,
        "a mixture would count what is masked",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_and_leaves_the_module_as_it_was(name):
    make, settings, trainer, error, message = REFUSED[name]
    module, trainer = make(), dict(trainer)
    more = [trainer.pop("callbacks")] if "callbacks" in trainer else []
    before, kinds = weights(module), {n: type(m) for n, m in module.named_modules()}
    epochs = trainer.pop("max_epochs", 2)
    with pytest.raises(error, match=message):
        fit(module, Binarization(**settings), *more, epochs=epochs, **trainer)
    assert {n: type(m) for n, m in module.named_modules()} == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert "configure_model" not in vars(module)
    if name not in ("a crash", "made anew"):
        after = weights(module)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[n], value) for n, value in before.items() if "nan" not in str(value))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "rest"}, "Did you mean 'reste'"),
        ({"weights": 32}, "nothing to be binary"),
        ({"weights": 3}, "bits must be 1, 2"),
        ({"stages": "weight-first", "activations": 1}, "Did you mean 'weights-first'"),
        ({"stages": "weights-first"}, "give activations=1"),
        ({"stages": "biper"}, "give estimator='biper'"),
        ({"stages": [(0.1, {"weights": 1})]}, r"begin at 0.0 .* got \[0.1\]"),
        ({"stages": [(0.0, {}), (0.5, {}), (0.4, {})]}, "rising fractions"),
        ({"stages": [(0.0, {"weights": 2})]}, "at 0.0 weights can be 1 or 32 here, got 2"),
        ({"stages": [(0.0, {"weight": 1})]}, "unknown 'weight'. Did you mean 'weights'"),
        ({"distill_from": "teacher"}, "must be 'float', a network or None"),
        ({"distill_hidden": "blocks.*"}, "needs a teacher"),
        ({"clamp": 0.0}, "clamp must be above 0"),
        ({"log_every": -1}, "log_every must be at least 0"),
        ({"schedule_steps": 0}, "schedule_steps must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Binarization(**settings)


@pytest.mark.parametrize(
    ("settings", "stages", "unused"),
    [
        ({"activations": 1}, "weights-first", "input_scale"),
        ({"activations": 1, "weights": Weights(scale="learned")}, "activations-first", "weight_scale"),
        ({"activations": Activations(scale=None)}, "weights-first", None),
        ({"activations": 1}, "activations-first", None),
    ],
)
def test_stages_in_which_scales_have_no_part_are_refused_under_ddp(settings, stages, unused):
    model, stages = nas.binarize(users.tiny_vit(), **settings), stages_named(stages, 1, 1, False)
    found = nas.binary.layers(model).values()
    for strategy, is_refused in (("ddp", bool(unused)), ("ddp_find_unused_parameters_true", False)):
        trainer = pl.Trainer(strategy=strategy, **{**QUIET, "devices": 2})
        if is_refused:
            with pytest.raises(
                nas.UnsupportedError, match=f"{unused} of layers .*find_unused_parameters_true"
            ):
                refuse_unused(trainer, found, stages)
        else:
            refuse_unused(trainer, found, stages)


def test_parameters_that_no_optimizer_holds_are_named():
    class HeadOnly(users.PlainClassifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net.head.parameters(), 1e-2)

    with pytest.warns(UserWarning, match=r"12 parameters of binary layers are not trained, as blocks.0.attn"):
        fit(HeadOnly(), Binarization())
