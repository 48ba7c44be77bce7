import pytest
import timm
import torch
from lightning_nas.recipes.digits import mnist_part
from torch import nn
from torch.nn import functional as F

import lightning_nas as nas
from lightning_nas import models
from lightning_nas.binary import Activations
from lightning_nas.errors import UnsupportedError

SMALL = {
    "ResNet-20 of ReSTE": lambda: models.resnet20(in_chans=1),
    "ResNet-20 with Bi-Real's shortcuts": lambda: models.resnet20(in_chans=1, shortcut="convolution"),
    "ResNet-20 of IR-Net": lambda: models.resnet20(in_chans=1, order="norm-hardtanh"),
    "ResNet-18 of Bi-Real": lambda: models.bireal_resnet18(10, 1, stem="small", downsample="pad"),
    "ResNet-18 of ReActNet": lambda: models.reactnet_resnet18(10, 1, stem="small"),
    "VGG-small": lambda: models.vgg_small(10, 1, image_size=10),
}


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def digits():
    data = mnist_part("train", pool=2)
    return torch.stack([data[i][0] for i in range(16)])


# --- sizes


def test_resnet20_has_the_size_that_papers_give():
    assert round(size(models.resnet20()) / 1e6, 2) == 0.27
    assert size(models.resnet20(shortcut="convolution")) == size(models.resnet20())


def test_resnet18_for_imagenet_has_the_size_of_the_one_that_everybody_has():
    assert size(models.bireal_resnet18()) == size(timm.create_model("resnet18"))
    shifts_and_slopes = (
        3 * 4 * (64 + 128 + 256 + 512)
    )  # RPReLU: three a channel, behind four additions a stage
    assert size(models.reactnet_resnet18()) == size(models.bireal_resnet18()) + shifts_and_slopes


def test_resnet18_for_cifar_has_11_17_million_parameters_and_about_bipers_11_01_with_padded_shortcuts():
    assert round(size(models.bireal_resnet18(10, stem="small")) / 1e6, 2) == 11.17
    assert size(models.bireal_resnet18(10, stem="small", downsample="pad")) == pytest.approx(
        11.01e6, rel=2e-3
    )


def test_vgg_small_has_the_size_that_papers_give():
    assert round(size(models.vgg_small()) / 1e6, 2) == 4.66


# --- structure


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_what_each_binary_convolution_sees_has_both_signs_on_real_images(make, digits):
    model = make()
    chosen = nas.binary.plan(model, example_inputs=digits)
    seen = {}
    for name in chosen.binary:
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.update({name: float((inputs[0] < 0).float().mean())})
        )
    model.train()(digits)
    assert seen.keys() == {*chosen.binary}
    assert all(0.02 < share < 0.98 for share in seen.values()), seen


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_all_convolutions_but_the_first_and_those_of_shortcuts_become_binary(make):
    model = make()
    binary = set(nas.binary.plan(model).binary)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    first, *_ = convolutions
    of_shortcuts = {name for name, conv in convolutions.items() if conv.kernel_size == (1, 1)}
    assert binary == convolutions.keys() - {first} - of_shortcuts


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_one_step_moves_the_weights_of_every_binary_layer(make, digits):
    model = nas.binarize(make(), "bireal", activations=Activations(scale=None))
    F.cross_entropy(model.train()(digits), torch.arange(16) % 10).backward()
    for name, layer in nas.binary.layers(model).items():
        assert layer.weight.grad.abs().sum() > 0, name


def test_the_hardtanh_before_a_convolution_changes_no_code(digits):
    model = nas.binarize(SMALL["ResNet-18 of Bi-Real"](), activations=Activations(scale=None)).train()
    expected = model(digits)
    for block in model.modules():
        if isinstance(block, nn.Hardtanh):
            block.forward = lambda x: x
    torch.testing.assert_close(model(digits), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shortcut", ["block", "convolution"])
def test_a_block_is_what_the_paper_writes(shortcut):
    block = models.ResNet((1, 1), (4, 6), shortcut=shortcut).stages[1][0].train()
    x = torch.randn(5, 4, 8, 8)
    padded = torch.zeros(5, 6, 4, 4)  # every second pixel; one new channel of 0 before and one behind
    padded[:, 1:5] = x[:, :, ::2, ::2]

    def branch(layers, x, stride):
        x = F.conv2d(x, layers.conv.weight, stride=stride, padding=1).relu()
        return F.batch_norm(x, None, None, training=True)

    inner = branch(block.branch1, x, 2)
    if shortcut == "block":
        expected = branch(block.branch2, inner, 1) + padded
    else:
        inner = inner + padded
        expected = branch(block.branch2, inner, 1) + inner
    torch.testing.assert_close(block(x), expected)


def test_a_reactnet_block_has_an_rprelu_behind_each_addition():
    block = models.ResNet((1,), (4,), order="reactnet", shortcut="convolution").stages[0][0].train()
    x = torch.randn(5, 4, 8, 8)
    for act in (block.act1, block.act2):
        for parameter in act.parameters():
            nn.init.normal_(parameter)

    def half(layers, act, x):
        y = F.batch_norm(F.conv2d(x, layers.conv.weight, padding=1), None, None, training=True) + x
        shift, slope, offset = (p.view(-1, 1, 1) for p in (act.shift, act.slope, act.offset))
        return F.relu(y - shift) - slope * F.relu(shift - y) + offset

    torch.testing.assert_close(block(x), half(block.branch2, block.act2, half(block.branch1, block.act1, x)))


@pytest.mark.parametrize("stem", ["small", "large"])
def test_shapes_of_images_and_logits(stem):
    model = models.ResNet((1, 1), (4, 8), 7, 2, stem=stem, downsample="convolution")
    assert model(torch.zeros(3, 2, 33, 40)).shape == (3, 7)


# --- files


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_float_network_is_saved_and_loaded(make, digits, tmp_path):
    model = make().train()
    model(digits)  # moves batch norms
    loaded = nas.load(nas.save(model.eval(), tmp_path))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(digits), model(digits))


def test_a_changed_network_is_not_saved(tmp_path):
    model = models.resnet20()
    model.stages[0] = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"'stages.0\.?.*cannot be rebuilt"):
        nas.save(model, tmp_path / "it")


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.resnet20(order="norm-relu"), "unknown order 'norm-relu'.*Did you mean"),
        (lambda: models.resnet20(shortcut="none"), "unknown shortcut 'none'"),
        (lambda: models.bireal_resnet18(stem="tiny"), "unknown stem 'tiny'"),
        (lambda: models.ResNet((1, 1), (4,)), "equally many"),
        (lambda: models.vgg_small(image_size=4), "at least 8"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
