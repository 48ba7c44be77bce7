"""Students that also learn from what the largest network holds inside, and from a frozen teacher."""

import copy

import numpy as np
import pytest
import torch
from lightning_nas.callbacks import SelfDistillation, SupernetTraining
from torch import nn
from torch.nn import functional as F

import lightning_nas as nas
from tests import user_modules as users
from tests.callbacks.test_module_is_whole import Crashes, fingerprint
from tests.callbacks.test_supernet_training import (
    AT_ONCE,
    assert_same,
    cross_entropy_of_soft_targets,
    fit,
    sandwich,
    weights,
)

SANDWICH = nas.Sandwich(random=2)


class Watched:
    """Runs a network and gives its logits and what modules gave, by name."""

    def __init__(self, network, names):
        self.network, self.seen = network, {}
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self.seen.__setitem__(name, output)
            )

    def __call__(self, x):
        self.seen.clear()
        return self.network(x), dict(self.seen)


def blocks_apart(student, largest, kept):
    return sum(
        (student[f"blocks.{i}"] - largest[f"blocks.{i}"].detach()).square().mean() for i in kept
    ) / len(kept)


def relations_apart(student, largest, kept):
    """Of the last block that each has, by the loops of the definition over parts and heads."""
    total = 0
    pair = student[f"blocks.{kept[-1]}.attn.qkv"], largest["blocks.2.attn.qkv"].detach()
    for part in range(3):
        relations = []
        for x in pair:
            width = x.shape[-1] // 3
            size = width // 2
            heads = [x[..., part * width + h * size : part * width + (h + 1) * size] for h in range(2)]
            relations.append(torch.stack([(h @ h.mT / np.sqrt(size)).softmax(-1) for h in heads]))
        total = total + (relations[0] - relations[1]).square().mean()
    return total


CASES = {
    "hidden states": (lambda then: nas.HiddenStates("blocks.*", weight=0.5, then=then), blocks_apart, 0.5),
    "relations": (
        lambda then: nas.Relations(fused="*qkv", heads=2, weight=4.0, then=then),
        relations_apart,
        4.0,
    ),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("task_share", [0.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_the_loop_written_by_hand(case, task_share, accumulate):
    make, apart, weight = CASES[case]
    ours, hand = users.PlainClassifier().double(), users.PlainClassifier().double()
    callback = SupernetTraining(
        sampler=SANDWICH, students_learn_from=make(nas.Both() if task_share else nas.Teacher()), **AT_ONCE
    )
    fit(ours, callback, max_epochs=2, precision="64-true", accumulate_grad_batches=accumulate)

    supernet, optimizer, step, depths = nas.Supernet(hand.net), hand.configure_optimizers(), 0, set()
    names = [name for i in range(3) for name in (f"blocks.{i}", f"blocks.{i}.attn.qkv")]
    run = Watched(hand.net, names)
    hand.train()
    for _ in range(2):
        batches = [(x.double(), y) for x, y in users.loader()]
        for start in range(0, 3, accumulate):
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulate]:
                largest, inside = run(x)
                (F.cross_entropy(largest, y) / accumulate).backward()
                for member in sandwich(supernet.space, step):
                    kept = [i for i in range(3) if i in supernet.fit.kept(supernet.space.canonical(member))]
                    depths.add(len(kept))
                    with supernet.using(member):
                        student, own = run(x)
                        loss = (1 - task_share) * cross_entropy_of_soft_targets(student, largest)
                        loss = loss + task_share * F.cross_entropy(student, y)
                        ((loss + weight * apart(own, inside, kept)) / accumulate).backward()
            optimizer.step()
            step += 1
    assert depths == {2, 3}
    # The bias of keys has no gradient but rounding, about 1e-17, which Adam divides by its own size or 1e-8.
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", [nas.Teacher, nas.Both])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_frozen_teacher_shares_with_the_largest_network(rule, accumulate):
    ours, hand = users.PlainClassifier().double(), users.PlainClassifier().double()
    frozen = users.tiny_vit(seed=5, proj_drop_rate=0.5).double().eval()
    learn = rule(strong_teacher=copy.deepcopy(frozen).train(), strong_weight=0.3)
    fit(
        ours,
        SupernetTraining(sampler=SANDWICH, students_learn_from=learn, **AT_ONCE),
        max_epochs=1,
        precision="64-true",
        accumulate_grad_batches=accumulate,
    )
    share = 0.5 if rule is nas.Both else 0.0
    supernet, optimizer = nas.Supernet(hand.net), hand.configure_optimizers()
    batches = [(x.double(), y) for x, y in users.loader()]
    for start in range(0, 3, accumulate):
        optimizer.zero_grad()
        for x, y in batches[start : start + accumulate]:
            largest = hand.net(x)
            (F.cross_entropy(largest, y) / accumulate).backward()
            for member in sandwich(supernet.space, start // accumulate):
                with supernet.using(member):
                    student = hand.net(x)
                    taught = 0.7 * cross_entropy_of_soft_targets(student, largest)
                    taught = taught + 0.3 * cross_entropy_of_soft_targets(student, frozen(x))
                    ((share * F.cross_entropy(student, y) + (1 - share) * taught) / accumulate).backward()
        optimizer.step()
    assert_same(weights(ours), weights(hand), rtol=0, atol=1e-12)


class Counting(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self):
        super().__init__()
        self.net, self.asked = users.tiny_vit(seed=5), 0

    def forward(self, x):
        self.asked += 1
        return self.net(x)


@pytest.mark.parametrize(
    "make", [lambda t: nas.InstaTuneLoss(strong_teacher=t), lambda t: nas.Both(strong_teacher=t)]
)
def test_a_frozen_teacher_is_asked_once_a_batch_for_everyone(make):
    teacher = Counting()
    callback = SupernetTraining(sampler=nas.Sandwich(2), students_learn_from=make(teacher), **AT_ONCE)
    fit(users.PlainClassifier(), callback, max_epochs=1)
    assert teacher.asked == 3


def test_a_frozen_teacher_with_other_classes_is_refused_before_the_first_step():
    unnamed = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    for teacher, message in [
        (
            users.tiny_vit(num_classes=5),
            r"the teacher \(VisionTransformer\) has 5 classes and the network has 3",
        ),
        (unnamed, r"shape \(8, 5\) where the network's has \(8, 3\). Give a teacher with the same classes"),
    ]:
        for rule in (nas.Both(strong_teacher=teacher), nas.InstaTuneLoss(strong_teacher=teacher)):
            module = users.PlainClassifier()
            before, values = fingerprint(module), weights(module)
            with pytest.raises(nas.UnsupportedError, match=message):
                fit(module, SupernetTraining(students_learn_from=rule, **AT_ONCE), max_epochs=1)
            assert fingerprint(module) == before
            assert_same(weights(module), values, rtol=0, atol=0)


@pytest.mark.parametrize("make", [users.CalledTwice, users.AugmentingClassifier, users.NestedFeatures])
@pytest.mark.parametrize("then", [nas.Teacher(), nas.Both()])
def test_students_of_modules_of_all_habits_learn_from_inside(make, then):
    rule = nas.HiddenStates("blocks.*", then=nas.Relations(fused="*qkv", heads=2, then=then))
    module, callback = make(), SupernetTraining(students_learn_from=rule, **AT_ONCE)
    fit(module, callback, callbacks=[SelfDistillation(snapshots=1, unit="step")], max_epochs=1)
    assert callback.sandwich_steps == 3
    hooks = [len(child._forward_hooks) for child in module.modules()]
    assert not any(hooks)


def test_inside_losses_are_in_single_precision_under_mixed():
    rule = nas.Relations(fused="*qkv", heads=2, weight=4.0)
    teacher, student = (
        {"a.qkv": torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    )
    expected = rule.distance(student, teacher, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rule.distance(student, teacher, None), expected)
    callback = SupernetTraining(students_learn_from=rule, **AT_ONCE)
    fit(users.PlainClassifier(), callback, max_epochs=1, precision="bf16-mixed")
    assert callback.sandwich_steps == 3


def test_a_pattern_that_matches_nothing_and_a_crash_leave_the_module_whole():
    for module, rule, error, message in [
        (
            users.PlainClassifier(),
            nas.HiddenStates("encoder.layer.*"),
            nas.NoMatchError,
            "'encoder.layer.*'. Its modules end in: .*blocks",
        ),
        (
            users.PlainClassifier(),
            nas.Relations(),
            nas.NoMatchError,
            r"matches '\*query'. Its modules end in: .*qkv",
        ),
        (Crashes(2), nas.HiddenStates("blocks.*"), RuntimeError, "boom"),
    ]:
        before = fingerprint(module)
        with pytest.raises(error, match=message):
            fit(module, SupernetTraining(students_learn_from=rule, **AT_ONCE), max_epochs=1)
        assert fingerprint(module) == before


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "in place"])
def test_a_compiled_network_learns_as_the_eager_one(when):
    def run(net):
        module = users.PlainClassifier(net).double()
        rule = nas.HiddenStates("blocks.*", weight=2.0)
        fit(module, SupernetTraining(students_learn_from=rule, **AT_ONCE), max_epochs=1, precision="64-true")
        return [p.detach() for p in module.parameters()]

    net = users.tiny_vit()
    if when == "before":
        net = torch.compile(net, backend="eager")
        net(users.images().tensors[0])  # without hooks
    else:
        net.compile(backend="eager")
    for compiled, eager in zip(run(net), run(users.tiny_vit()), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-9)


def test_modules_that_never_run_are_refused():
    module = users.PlainClassifier()
    module.net.spare = nn.Linear(2, 2)
    callback = SupernetTraining(students_learn_from=nas.HiddenStates("spare"), **AT_ONCE)
    with pytest.raises(nas.UnsupportedError, match="none of those named ran in training_step"):
        fit(module, callback, max_epochs=1)
