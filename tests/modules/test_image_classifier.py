import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nas.modules import ImageClassifier, Mixing, mix, warmup_cosine

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def classifier(**settings):
    return ImageClassifier(NAME, **{"num_classes": 10, "model_kwargs": TINY, **settings})


def data(size=24, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)


def loader(batch_size=8, **settings):
    return DataLoader(TensorDataset(*data(**settings)), batch_size=batch_size)


def trainer(tmp_path, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    return pl.Trainer(**{**quiet, **settings})


class Rates(pl.Callback):
    """The learning rate that each optimizer step used, per group."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_it_trains_validates_tests_and_predicts(tmp_path):
    pl.seed_everything(0)
    module, run = (
        classifier(mixing={"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
        trainer(tmp_path, max_epochs=1),
    )
    before = [p.clone() for p in module.parameters()]
    run.fit(module, loader(7), loader())
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_acc", "val_acc5"}
    assert not all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    run.test(module, loader(), verbose=False)
    assert set(run.callback_metrics) == {"test_loss", "test_acc", "test_acc5"}
    assert torch.cat(run.predict(module, loader())).shape == (24, 10)


def test_logged_numbers_are_the_mean_over_all_images_whatever_the_batches(tmp_path):
    module = classifier()
    found = trainer(tmp_path).validate(module, loader(batch_size=7), verbose=False)[0]
    images, labels = data()
    with torch.no_grad():
        logits = module.eval()(images)
    in_top5 = (logits.argsort(dim=1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["val_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["val_acc5"] == pytest.approx(in_top5.float().mean().item())


def test_few_classes_have_no_top5_accuracy(tmp_path):
    found = trainer(tmp_path).validate(classifier(num_classes=5), loader(classes=5), verbose=False)[0]
    assert set(found) == {"val_loss", "val_acc"}


def test_it_learns_classes_that_can_be_told_apart(tmp_path):
    pl.seed_everything(0)
    images, labels = data(64, classes=2)
    images = images * 0.1 + (labels * 2.0 - 1)[:, None, None, None]
    loaded = DataLoader(TensorDataset(images, labels), batch_size=16)
    run, module = trainer(tmp_path, max_epochs=5), classifier(num_classes=2, lr=5e-3)
    run.fit(module, loaded, loaded)
    assert run.callback_metrics["val_acc"] == 1


def test_batches_may_be_dictionaries(tmp_path):
    images, labels = data()
    loaded = DataLoader([{"image": i, "label": y} for i, y in zip(images, labels, strict=True)], batch_size=8)
    module = classifier()
    pairs = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert trainer(tmp_path).validate(module, loaded, verbose=False) == pairs


def test_images_alone_are_enough_to_predict(tmp_path):
    images, _ = data()
    found = torch.cat(trainer(tmp_path).predict(module := classifier(), DataLoader(images, batch_size=8)))
    with torch.no_grad():
        torch.testing.assert_close(found, module.eval()(images))


# --- learning rates


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (4, 4), (0.25, 3)])
def test_the_rate_follows_the_closed_form_at_every_optimizer_step(tmp_path, warmup, steps):
    rates, module = Rates(), classifier(lr=0.01, layer_decay=1.0, warmup=warmup)
    trainer(tmp_path, max_epochs=4, callbacks=[rates]).fit(module, loader())  # 4 epochs of 3 batches
    rise = [0.01 * (t + 1) / steps for t in range(steps)]
    fall = [0.005 * (1 + math.cos(math.pi * t / (12 - steps))) for t in range(12 - steps)]
    assert [group[0] for group in rates.seen] == pytest.approx(rise + fall)


def test_accumulated_batches_count_as_one_step_of_the_schedule(tmp_path):
    rates, module = Rates(), classifier(lr=0.01, layer_decay=1.0, warmup=0)
    trainer(tmp_path, max_epochs=4, accumulate_grad_batches=3, callbacks=[rates]).fit(module, loader())
    expected = [0.005 * (1 + math.cos(math.pi * t / 4)) for t in range(4) for _ in range(3)]
    assert [group[0] for group in rates.seen] == pytest.approx(expected)


def test_layers_further_from_the_output_learn_slower_by_the_decay():
    module = classifier(lr=0.1, layer_decay=0.5, weight_decay=0.2)
    groups = module.parameter_groups()
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    distances = {"head": 0, "norm": 1, "blocks.1": 1, "blocks.0": 2}  # everything before the blocks: 3
    for name, parameter in module.model.named_parameters():
        layer = next((layer for layer in distances if name.startswith(layer)), None)
        exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert found[id(parameter)] == (0.1 * 0.5 ** distances.get(layer, 3), 0 if exempt else 0.2)
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))


def test_a_plain_network_without_timms_methods_gets_layer_rates_too():
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(64, 10))
    groups = ImageClassifier(network, num_classes=10, layer_decay=1.0).parameter_groups()
    assert sum(len(group["params"]) for group in groups) == 4
    assert {group["lr"] for group in groups} == {5e-4}


def test_the_factor_never_leaves_zero_to_one():
    for warmup, total in [(0, 1), (3, 3), (5, 3), (2, 50)]:
        assert all(0 <= warmup_cosine(step, warmup, total) <= 1 for step in range(60))


# --- mixing


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_mixup_blends_each_image_and_label_with_its_mirror_in_the_batch(size):
    images, labels = data(size)
    original = images.clone()
    np.random.seed(3)  # noqa: NPY002  # timm draws from numpy's global generator
    mixed, targets = mix(images, labels, 10, Mixing(mixup=0.8))
    np.random.seed(3)  # noqa: NPY002  # timm draws from numpy's global generator
    np.random.rand()  # noqa: NPY002  # timm draws from numpy's global generator
    share = np.random.beta(0.8, 0.8)  # noqa: NPY002  # timm draws from numpy's global generator
    even = size // 2 * 2
    for i in range(size):
        partner, own = (even - 1 - i, share) if i < even else (i, 1.0)
        torch.testing.assert_close(mixed[i], own * images[i] + (1 - own) * images[partner])
        expected = torch.zeros(10)
        expected[labels[i]] += own
        expected[labels[partner]] += 1 - own
        torch.testing.assert_close(targets[i], expected)
    assert torch.equal(images, original)  # the user's batch is his


def test_cutmix_gives_each_label_the_share_of_pixels_that_its_image_keeps():
    np.random.seed(0)  # noqa: NPY002  # timm draws from numpy's global generator
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    mixed, targets = mix(images, torch.arange(4), 4, Mixing(cutmix=1.0))
    for i in range(4):
        assert targets[i, i].item() == pytest.approx((mixed[i] == i).float().mean().item())
        assert set(mixed[i].unique().tolist()) <= {float(i), 3.0 - i}


def test_label_smoothing_spreads_its_share_over_all_classes():
    module = classifier(mixing=Mixing(label_smoothing=0.3))
    module.log = lambda *args, **kwargs: None
    images, labels = data()
    probabilities = module(images).log_softmax(1)
    targets = torch.full((24, 10), 0.03).scatter(1, labels[:, None], 0.73)
    torch.testing.assert_close(
        module.training_step((images, labels), 0), -(targets * probabilities).sum(1).mean()
    )


# --- checkpoints, configuration, subclasses


def test_a_checkpoint_alone_brings_the_classifier_back(tmp_path):
    module = classifier(mixing=Mixing(mixup=0.1), lr=0.003)
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    run.fit(module, loader())
    again = ImageClassifier.load_from_checkpoint(run.checkpoint_callback.best_model_path)
    images, _ = data()
    assert torch.equal(again.eval()(images), module.eval()(images))
    assert (again.mixing, again.lr, again.hparams) == (module.mixing, 0.003, module.hparams)


def test_reading_a_checkpoint_downloads_nothing(tmp_path, monkeypatch):
    module = classifier()
    module.hparams["pretrained"] = True
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert ImageClassifier.load_from_checkpoint(tmp_path / "it.ckpt").hparams["pretrained"] is False
    assert module.hparams["pretrained"] is True


def test_a_network_of_ones_own_is_trained_as_it_is(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    module = ImageClassifier(network, num_classes=10, layer_decay=1.0)
    assert module.model is network
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    twin = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    again = ImageClassifier.load_from_checkpoint(tmp_path / "it.ckpt", model=twin)
    assert torch.equal(again.model[1].weight, network[1].weight)


def test_a_subclass_may_override_any_step(tmp_path):
    class Mine(ImageClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("twice", 2 * loss)
            return 2 * loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    run = trainer(tmp_path, max_steps=1)
    run.fit(Mine(NAME, num_classes=10, model_kwargs=TINY), loader())
    assert run.callback_metrics["twice"] == 2 * run.callback_metrics["train_loss"]
    assert type(run.optimizers[0]) is torch.optim.SGD


def test_sgd_steps_as_torch_does_with_a_momentum_of_0_9(tmp_path):
    torch.manual_seed(0)
    network, twin = (nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)) for _ in range(2))
    twin.load_state_dict(network.state_dict())
    options = {"lr": 0.1, "weight_decay": 0.01, "layer_decay": 1.0, "warmup": 0, "optimizer": "sgd"}
    trainer(tmp_path, max_epochs=1).fit(ImageClassifier(network, num_classes=10, **options), loader())
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for step, (images, labels) in enumerate(loader()):
        loss = F.cross_entropy(twin(images), labels)
        for p, v, g in zip(
            twin.parameters(), velocity, torch.autograd.grad(loss, [*twin.parameters()]), strict=True
        ):
            v.mul_(0.9).add_(g + (0.01 * p.detach() if p.ndim > 1 else 0))
            p.data.sub_(0.1 * warmup_cosine(step, 0, 3) * v)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_built_from_yaml(tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageClassifier, "model")
    (tmp_path / "it.yaml").write_text(
        "model:\n  model: vit_tiny_patch16_224\n  num_classes: 3\n  warmup: 5\n  mixing: {mixup: 0.2}\n"
        "  model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}\n"
    )
    parsed = parser.parse_path(tmp_path / "it.yaml")
    module = parser.instantiate(parsed).model
    assert (module.num_classes, module.warmup, module.mixing) == (3, 5, Mixing(mixup=0.2))


# --- what is refused

REFUSED = [
    (lambda: classifier(num_classes=1), "num_classes must be at least 2, got 1"),
    (lambda: classifier(lr=0), "lr must be above 0"),
    (lambda: classifier(weight_decay=-1), "weight_decay must be at least 0"),
    (lambda: classifier(layer_decay=0.0), r"layer_decay must be in \(0, 1\]"),
    (lambda: classifier(warmup=1.0), "warmup must be a share"),
    (lambda: classifier(optimizer="adam"), "optimizer must be 'adamw' or 'sgd', got 'adam'"),
    (lambda: classifier(lr=-1, warmup=-1), "lr must be above 0, got -1; warmup must be"),
    (lambda: Mixing(mixup=-0.1), "alphas must be at least 0"),
    (lambda: Mixing(label_smoothing=1.0), "label_smoothing must be in"),
    (lambda: ImageClassifier("vit_tinny_patch16_224", num_classes=2), "Did you mean 'vit_tiny_patch16_224'"),
    (lambda: ImageClassifier(nn.Flatten(), num_classes=2, pretrained=True), "are for a timm name"),
    (
        lambda: ImageClassifier(classifier().model, num_classes=3),
        "num_classes=3, but the network you gave has 10",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_that_is_neither_a_name_nor_a_network_is_a_type_error():
    with pytest.raises(TypeError, match="got int"):
        ImageClassifier(3, num_classes=2)


@pytest.mark.parametrize("batch", [{"pixels": 1}, torch.zeros(2), (1, 2, 3)])
def test_a_batch_of_another_form_is_refused_with_the_forms_that_work(batch):
    with pytest.raises(ValueError, match=r"a batch must be \(images, labels\)"):
        classifier().validation_step(batch, 0)


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs the length of the run"):
        trainer(tmp_path, max_epochs=-1).fit(classifier(), loader())
