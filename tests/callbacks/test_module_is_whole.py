"""Whatever goes wrong, and whenever, the user gets his module back."""

import itertools

import pytest
import pytorch_lightning as pl
import torch
from lightning_nas.callbacks import InstaTune, SupernetTraining

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_supernet_training import AT_ONCE, QUIET, assert_same, fit, weights


def fingerprint(module):
    """All that a callback could leave behind on a module, but for the values of its weights."""
    return [
        (
            name, type(child), child.training, tuple(child._parameters), tuple(child._buffers),
            [len(getattr(child, hooks)) for hooks in vars(torch.nn.Module()) if hooks.endswith("_hooks")],
            {k: v for k, v in vars(child).items() if k[0] != "_" and isinstance(v, int | float | tuple)},
        )
        for name, child in module.named_modules()
    ]  # fmt: skip


class Crashes(users.PlainClassifier):
    """Raises in the given call of training_step."""

    def __init__(self, call):
        super().__init__(users.tiny_vit(proj_drop_rate=0.1, drop_path_rate=0.1))
        self.calls, self.crash_at = itertools.count(1), call

    def training_step(self, batch, batch_idx):
        if next(self.calls) == self.crash_at:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("call", [1, 2, 4])  # the largest network, its first student, its third
@pytest.mark.parametrize("make", [SupernetTraining, InstaTune])
def test_after_a_crash_in_the_middle_of_a_step(make, call):
    module = Crashes(call)
    module.train()
    before = fingerprint(module)
    callback = make(students_learn_from="task", **AT_ONCE)
    trainer = pl.Trainer(callbacks=[callback], max_epochs=2, **QUIET)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, users.loader(), users.loader())
    assert next(module.calls) == call + 1
    assert fingerprint(module) == before
    assert "log" not in vars(module)


def test_after_a_crash_in_validation_during_the_search():
    class CrashesInSearch(users.PlainClassifier):
        trained = False

        def on_train_end(self):
            raise AssertionError("the search comes first")

        def validation_step(self, batch, batch_idx):
            if self.trained:
                raise RuntimeError("boom in validation")
            return super().validation_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.trained = True

    module = CrashesInSearch()
    before = fingerprint(module)
    with pytest.raises(RuntimeError, match="boom in validation"):
        pl.Trainer(callbacks=[InstaTune(budget=3, **AT_ONCE)], max_epochs=1, **QUIET).fit(
            module, users.loader(), users.loader()
        )
    assert [entry[:2] for entry in fingerprint(module)] == [entry[:2] for entry in before]


def test_after_release_the_module_is_the_users_with_todays_weights():
    module = users.PlainClassifier()
    before, callback = fingerprint(module), SupernetTraining(**AT_ONCE)
    fit(module, callback, max_epochs=1)
    assert fingerprint(module) != before  # still elastic
    x = users.images().tensors[0]
    with torch.no_grad():
        elastic = module.eval()(x)
        callback.supernet.release()
        module.train()
        assert fingerprint(module) == before
        assert torch.equal(module.eval()(x), elastic)


def test_fit_twice_trains_on_and_binds_once():
    module, callback = users.PlainClassifier(), SupernetTraining(warmup=2, validate=())
    fit(module, callback, max_epochs=2)
    first, supernet = weights(module), callback.supernet
    fit(module, callback, max_epochs=2)
    assert callback.supernet is supernet
    assert callback.sandwich_steps == 4  # 6 steps less 2 of warm-up: the second run counts for itself
    assert any(not torch.equal(a, b) for a, b in zip(first.values(), weights(module).values(), strict=True))
    assert not module.net._forward_hooks


def test_fit_again_after_a_crash_and_after_a_release():
    module, callback = (
        Crashes(2),
        SupernetTraining(warmup=0, order=None, students_learn_from="task", validate=()),
    )
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, callback, max_epochs=1)
    fit(module, callback, max_epochs=1)
    assert callback.sandwich_steps == 3
    callback.supernet.release()
    fit(module, callback, max_epochs=1)
    assert callback.supernet.active == callback.supernet.space.largest


def test_a_skipped_step_trains_no_student_and_the_next_one_does():
    class SkipsFirst(users.PlainClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    calls = []

    class Counting(nas.Sandwich):
        def students(self, space, seed, step, progress):
            calls.append(step)
            return super().students(space, seed, step, progress)

    module = SkipsFirst()
    fit(module, SupernetTraining(sampler=Counting(1), **AT_ONCE), max_epochs=1)
    assert calls == [1, 2]


@pytest.mark.parametrize("make", [SupernetTraining, InstaTune])
def test_what_can_never_work_is_refused_before_the_first_change(make):
    class Manual(users.PlainClassifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Another(users.PlainClassifier):
        def __init__(self):
            super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))

    for module, settings, error, message in [
        (Manual(), {}, nas.UnsupportedError, "manual optimization"),
        (
            Another(),
            {},
            nas.NoMatchError,
            r"no supported network in Another; its children are: net \(Sequential\)",
        ),
        (users.TwoNetworks(), {}, nas.UnsupportedError, "several networks.*student, teacher.*network="),
        (
            users.PlainClassifier(),
            {"network": "nett"},
            nas.NoMatchError,
            "no sub-module 'nett'. Nearest names: net",
        ),
        (users.PlainClassifier(), {"space": "relativ"}, ValueError, "relativ.*Known"),
        (users.PlainClassifier(), {"exclude": ("bloks.*",)}, nas.NoMatchError, "bloks"),
    ]:
        before, values = fingerprint(module), weights(module)
        with pytest.raises(error, match=message):
            pl.Trainer(callbacks=[make(**settings)], max_epochs=1, **QUIET).fit(
                module, users.loader(), users.loader()
            )
        assert fingerprint(module) == before
        assert_same(weights(module), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 1.5}, r"warmup must be a fraction of the run in \[0, 1\) .* got 1.5"),
        ({"warmup": -1}, "warmup must be"),
        ({"order": "random"}, "order must be 'importance', 'magnitude' or None, got 'random'"),
        ({"sampler": "sandwhich"}, "Unknown sampler 'sandwhich'. Did you mean 'sandwich'"),
        ({"students_learn_from": "labels"}, "Unknown student loss 'labels'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"lr_factor": 0.0}, "lr_factor must be above 0, got 0"),
        ({"regularize": "none"}, "regularize must be 'largest' or 'all', got 'none'"),
        ({"validate": ("largest",)}, "validate may name 'smallest' and 'random', got"),
    ],
)
def test_arguments_out_of_range_are_named(settings, message):
    for make in (SupernetTraining, InstaTune):
        with pytest.raises(ValueError, match=message):
            make(**settings)
