"""Networks as users write them, with marked layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_nas as nas
from lightning_nas.errors import UnsupportedError
from lightning_nas.space import Choice, Depth, SearchSpace
from lightning_nas.supernet import Supernet, default_space, family_of, supports
from lightning_nas.testing import FamilyConformance, randomise


class MLPBlock(nn.Module):
    def __init__(self, width=8, hidden=12, out=(0.5, 1.0)):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nas.elastic(nn.Linear(width, hidden), out=out), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    def __init__(self, depth=(2, 3)):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nas.elastic(nn.Sequential(*(MLPBlock() for _ in range(3))), depth=depth)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))


class Squeeze(nn.Module):
    def __init__(self, width, choice):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nas.elastic(nn.Conv2d(4, width, 1), out=choice)

    def forward(self, x):
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class InvertedBlock(nn.Module):
    """Expand, a depthwise convolution that doubles the channels, squeeze and excitation, project."""

    def __init__(self, name, stream):
        super().__init__()
        expand = Choice(f"{name}.expand", (4, 8))
        self.expand = nas.elastic(nn.Conv2d(8, 8, 1, bias=False), out=expand)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(8)
        self.squeeze = Squeeze(8, expand)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.project = nas.elastic(nn.Conv2d(16, 8, 1), out=stream)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.squeeze(F.relu6(self.norm1(self.expand(x))))
        y = F.hardswish(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y)) * self.scale
        y += x
        return y


class ConvNet(nn.Module):
    """With an elastic width of the stream, which ends in a layer that reads flattened maps."""

    def __init__(self):
        super().__init__()
        width = Choice("width", (5, 8))
        self.stem = nn.Sequential(nas.elastic(nn.Conv2d(3, 8, 3), out=width), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nas.elastic(
            nn.ModuleList(InvertedBlock(f"blocks.{i}", width) for i in range(2)),
            depth=Choice("depth", (1, 2)),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))


class Attention(nn.Module):
    """Nothing that could be traced."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        if x.isnan().any():
            raise ValueError("nan")
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class TransformerBlock(nn.Module):
    """A gated MLP, whose two halves are one decision."""

    def __init__(self, hidden, mlp):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.RMSNorm(8), nn.LayerNorm(8), Attention(8)
        self.gate = nas.elastic(nn.Linear(8, hidden), out=mlp)
        self.up = nas.elastic(nn.Linear(8, hidden), out=mlp)
        self.inner, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, 8)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(self.inner(F.silu(self.gate(y)) * self.up(y)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        mlp = Choice("mlp", (3, 7, 12))
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nas.elastic(
            nn.ModuleList(TransformerBlock(12, mlp) for _ in range(4)), depth=(0.5, 1.0)
        )

    def forward(self, x):
        x = self.stem(x)
        for i in range(len(self.blocks)):
            if len(x) > 0:  # as long as it is data
                x = self.blocks[i](x)
        return self.head(x)


TOKENS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))
NETWORKS = {"mlp": (ResidualMLP, TOKENS), "conv": (ConvNet, IMAGES), "transformer": (Transformer, TOKENS)}


@pytest.mark.parametrize("kind", NETWORKS)
class TestUsersNetworks(FamilyConformance):
    @pytest.fixture
    def network(self, kind):
        cls, inputs = NETWORKS[kind]
        return randomise(cls()).eval(), inputs


def test_the_space_is_what_is_marked():
    assert default_space(ResidualMLP()).names == ("blocks.depth", *(f"blocks.{i}.up.out" for i in range(3)))
    space = default_space(Transformer())
    assert {choice.name: choice.values for choice in space} == {"blocks.depth": (2, 4), "mlp": (3, 7, 12)}
    assert space["blocks.depth"].kept(2) == (0, 2)
    space = default_space(ConvNet())
    assert space.names == ("width", "depth", "blocks.0.expand", "blocks.1.expand")
    assert space["depth"].kept(1) == (0,)


def test_a_space_of_the_users_own_may_ask_for_other_sizes_of_what_is_marked():
    supernet = Supernet(Transformer(), SearchSpace([Choice("mlp", (2, 12))]))
    assert supernet.extract({"mlp": 2}).blocks[0].down.in_features == 2
    with pytest.raises(ValueError, match=r"'mlp' cannot be 13, only an integer from 1 to 12"):
        Supernet(Transformer(), SearchSpace([Choice("mlp", (2, 13))]))


def test_marked_layers_can_be_excluded():
    model = ResidualMLP()
    supernet = Supernet(model, exclude=("blocks.0.*", "blocks.depth"))
    assert supernet.space.names == ("blocks.1.up.out", "blocks.2.up.out")
    assert type(model.blocks[0].up) is nn.Linear


def test_a_subnetwork_is_the_network_with_smaller_layers_written_by_hand():
    model = randomise(ResidualMLP(Depth("depth", (2, 3), keeps=((0, 2), (0, 1, 2))))).double().eval()

    def by_hand(x):
        x = model.stem(x)
        for i, units in ((0, 6), (2, 12)):
            block = model.blocks[i]
            y = F.linear(block.norm(x), block.up.weight[:units], block.up.bias[:units]).relu()
            x = x + F.linear(y, block.down.weight[:, :units], block.down.bias)
        return model.head(x.mean(1))

    expected = by_hand(TOKENS.double())
    supernet = Supernet(model)
    architecture = supernet.space.architecture({"depth": 2, "blocks.0.up.out": 6})
    with supernet.using(architecture):
        torch.testing.assert_close(model(TOKENS.double()), expected)


def test_what_a_subnetwork_leaves_out_gets_no_gradient_from_it():
    model = randomise(ConvNet())
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):
        model(IMAGES).square().sum().backward()
    block = model.blocks[0]
    used = {"expand": 4, "depthwise": 8, "project": 5}
    for name, units in used.items():
        rows = block.get_submodule(name)._parameters["weight"].grad.flatten(1).abs().sum(1)
        assert bool((rows[:units] > 0).all()), name
        assert torch.equal(rows[units:], torch.zeros(len(rows) - units)), name
    assert [parameter.grad for parameter in model.blocks[1].parameters()] == [None] * 16


def test_copies_pickles_and_a_released_network_are_marked_still_and_an_extracted_one_is_not():
    model = ResidualMLP()
    supernet = Supernet(model)
    extracted = supernet.extract(supernet.space.smallest)
    supernet.release()
    for marked in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert default_space(marked) == supernet.space
    assert not supports(extracted)
    with pytest.raises(UnsupportedError, match="mark its layers with nas.elastic"):
        Supernet(extracted)


def test_making_a_network_elastic_leaves_nothing_of_the_tracing_behind():
    class Remembering(MLPBlock):
        def forward(self, x):
            self.last = self.up(x)
            self.calls = getattr(self, "calls", 0) + 1
            return self.down(self.last)

    model = nn.Sequential(Remembering())
    model[0].up.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before = set(vars(model[0]))
    Supernet(model).release()
    assert set(vars(model[0])) == before


def test_what_only_training_computes_is_followed_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nas.elastic(nn.Linear(5, 12), out=(6, 12))
            self.down, self.auxiliary = nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x):
            y = self.up(x)
            return self.down(y) + self.auxiliary(y) if self.training else self.down(y)

    model = Auxiliary().eval()
    supernet = Supernet(model)
    model.train()
    with supernet.using(supernet.space.smallest):
        model(TOKENS).sum().backward()
    assert model.auxiliary._parameters["weight"].grad[:, 6:].abs().sum() == 0


# --- libraries' networks


def resnet18():
    model = torchvision.models.resnet18(num_classes=3)
    for name, block in model.named_modules():
        if isinstance(block, torchvision.models.resnet.BasicBlock):
            channels = block.conv1.out_channels
            nas.elastic(block.conv1, out=Choice(f"{name}.expand", (channels // 2, channels)))
    return model


def vit():
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)
    for block in model.encoder.layers:
        nas.elastic(block.mlp[0], out=(0.5, 1.0))
    return model


def mobilenet():
    setting = [
        torchvision.models.mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, True, "RE", 1, 1, 1.0),
        torchvision.models.mobilenetv3.InvertedResidualConfig(16, 5, 32, 24, False, "HS", 2, 1, 1.0),
    ]
    model = torchvision.models.MobileNetV3(setting, 32, num_classes=3)
    first, second = model.features[1].block, model.features[2].block
    expand = Choice("expand", (16, 32))
    nas.elastic(first[0][0], out=expand)
    nas.elastic(first[2].fc2, out=expand)
    nas.elastic(second[0][0], out=(16, 32))
    return model


@pytest.mark.parametrize("build", [resnet18, vit, mobilenet])
class TestTorchvision(FamilyConformance):
    @pytest.fixture
    def network(self, build):
        torch.backends.mha.set_fastpath_enabled(False)  # the counter sees no fused attention
        with sdpa_kernel(SDPBackend.MATH):
            yield randomise(build()).eval(), torch.randn(2, 3, 32, 32)
        torch.backends.mha.set_fastpath_enabled(True)


# --- what is told, where nothing can be traced


class Untraceable(nn.Module):
    def __init__(self, **told):
        super().__init__()
        self.up = nas.elastic(nn.Linear(5, 12), out=(6, 12), **told)
        self.inner, self.down = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        y = self.inner(self.up(x))
        return self.down(y) if y.sum() > 0 else self.down(-y)


class TestToldNetwork(FamilyConformance):
    @pytest.fixture
    def network(self):
        model = nn.Sequential(Untraceable(into="down", through=("inner",)))
        return randomise(model).eval(), TOKENS


def test_where_nothing_can_be_traced_it_is_said_with_the_cause():
    with pytest.raises(
        UnsupportedError, match=r"the outputs of 0\.up go somewhere in 0, which cannot be traced"
    ) as e:
        Supernet(nn.Sequential(Untraceable()))
    assert "control flow" in str(e.value.__cause__)


def test_a_layer_of_torch_that_cannot_be_traced_can_be_told():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    nas.elastic(layer.linear1, out=(6, 12), into=["linear2"])
    model, tokens = randomise(nn.TransformerEncoder(layer, 2)).eval(), torch.randn(2, 4, 8)
    supernet = Supernet(model)
    with supernet.using(supernet.space.smallest):
        active = model(tokens)
    torch.testing.assert_close(supernet.extract(supernet.space.smallest)(tokens), active)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"into": "dawn"}, r"the network has no 'dawn'\. Did you mean 'down'"),
        ({"into": "down", "through": ["up"]}, r"the outputs of up go into up, which takes 5 entries"),
    ],
)
def test_what_is_told_must_be_so(told, message):
    with pytest.raises(UnsupportedError, match=message):
        Supernet(Untraceable(**told))


# --- refusals


class Chain(nn.Module):
    """A marked layer, what happens to its outputs, and layers that may read them."""

    def __init__(self, happens, layer=None, **layers):
        super().__init__()
        self.up = nas.elastic(nn.Linear(5, 12) if layer is None else layer, out=(6, 12))
        self.other, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        for name, module in layers.items():
            setattr(self, name, module)
        self.happens = happens

    def forward(self, x):
        return self.happens(self, x)


def conv(**settings):
    return nn.Conv2d(3, 12, 3, **settings)


REFUSED = {
    "a reshape": (lambda m, x: m.down(m.up(x).reshape(2, 4, 3, 4)), r"into reshape in the network"),
    "a concatenation": (lambda m, x: m.down(torch.cat([m.up(x), x], -1)), r"into cat in the network"),
    "a halved layer": (lambda m, x: m.down(F.glu(m.up(x))), r"into glu in the network"),
    "a sum": (lambda m, x: m.down(m.up(x) + m.other(x)), r"into add in .* with another tensor \(other\)"),
    "a gate": (lambda m, x: m.down(m.other(x) * m.up(x)), r"into mul in .* with another tensor \(other\)"),
    "the output": (lambda m, x: m.up(x), r"out of the network"),
    "one of the outputs": (lambda m, x: (m.down(m.up(x)), {"y": m.up(x)}), r"out of the network"),
    "nothing": (lambda m, x: m.down(m.other(x)), r"nowhere: no forward pass calls it"),
    "no layer": (lambda m, x: m.down(m.other(x) * m.up(x).shape[-1]), r"nowhere: no layer reads them"),
    "its mean": (lambda m, x: m.down(m.up(x).mean(-1)), r"into mean in the network, which mixes them"),
    "a mean of any": (
        lambda m, x: m.down(m.up(x).mean(1)),
        r"into mean .*dimensions, from the end \(dim=-2\)",
    ),
    "a softmax": (lambda m, x: m.down(m.up(x).softmax(-1)), r"into softmax in the network"),
    "a layer called twice": (
        lambda m, x: m.down(m.up(x)) + m.down(m.other(x)),
        r"into down, which is called without them too",
    ),
    "its own weight": (lambda m, x: F.linear(m.up(x), m.up.weight.t()), r"into linear in the network"),
    "a sum of its weight": (
        lambda m, x: m.down(m.up(x)) * m.up.weight.sum(),
        r"where .* the weight of up by it",
    ),
    "a sum of a weight": (
        lambda m, x: m.down(m.up(x)) * m.down.weight.sum(),
        r"where .* weight of down by it",
    ),
    "flattened tokens": (lambda m, x: m.down(m.up(x).flatten(1)), r"into flatten or view in .*mixes them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_outputs_that_cannot_be_followed_are_refused_with_the_place(case):
    happens, message = REFUSED[case]
    model = Chain(happens)
    with pytest.raises(UnsupportedError, match=rf"elastic: the outputs of up go {message}"):
        Supernet(model)
    assert type(model.up) is nn.Linear


LAYERS = {
    "attention": (nn.Linear(5, 12), nn.MultiheadAttention(12, 2), r"a torch.nn.modules.activation.Multihead"),
    "group norm": (conv(), nn.GroupNorm(4, 12), r"a norm over groups of channels"),
    "grouped convolution": (
        conv(),
        nn.Conv2d(12, 12, 3, groups=4),
        r"which convolves in groups of 3 channels",
    ),
    "norm of tokens": (nn.Linear(5, 12), nn.LayerNorm((4, 12)), r"which takes 48 entries"),
    "transposed": (conv(), nn.ConvTranspose2d(12, 3, 3), r"a torch.nn.modules.conv.ConvTranspose2d"),
    "an activation with weights": (conv(), nn.PReLU(12), r"a torch.nn.modules.activation.PReLU"),
    "a linear layer over pixels": (conv(), nn.Linear(7, 3), r"a Linear, in dimension -3"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_that_cannot_do_with_fewer_units_are_refused_by_name(case):
    layer, then, message = LAYERS[case]
    model = Chain(lambda m, x: m.then(*[m.up(x)] * (3 if case == "attention" else 1)), layer, then=then)
    with pytest.raises(UnsupportedError, match=f"the outputs of up go into then, {message}"):
        Supernet(model)


def test_flattened_maps_are_read_by_channel_and_no_other_way():
    wrong = nn.Sequential(conv(), nn.Flatten(2), nn.Linear(49, 3))
    nas.elastic(wrong[0], out=(6, 12))
    with pytest.raises(UnsupportedError, match=r"into flatten or view in 1, which mixes them"):
        Supernet(wrong)


def test_layers_whose_units_come_together_need_one_named_choice():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = (nas.elastic(nn.Linear(5, 12), out=(6, 12)) for _ in range(2))
            self.down = nn.Linear(12, 3)

        def forward(self, x):
            return self.down(self.gate(x) * self.up(x))

    with pytest.raises(UnsupportedError, match=r"gate and of up come together \(mul in .*nas\.Choice"):
        Supernet(Gated())


def test_one_name_means_one_choice():
    model = nn.Sequential(MLPBlock(out=Choice("mlp", (6, 12))), MLPBlock(out=Choice("mlp", (4, 12))))
    with pytest.raises(ValueError, match=r"'mlp' has the options \(6, 12\) at 0.up and \(4, 12\) at 1.up"):
        Supernet(model)


def test_a_depth_inside_a_depth_is_refused():
    inner = nas.elastic(nn.Sequential(MLPBlock(), MLPBlock()), depth=(1, 2))
    outer = nas.elastic(nn.Sequential(MLPBlock(), inner), depth=(1, 2))
    with pytest.raises(UnsupportedError, match=r"0\.1 is inside 0, and both are marked with depth="):
        Supernet(nn.Sequential(outer))


def test_a_block_in_two_places_is_refused():
    block = MLPBlock()
    with pytest.raises(UnsupportedError, match=r"0\.up and 1\.up are one module"):
        Supernet(nn.Sequential(block, block))


def test_a_network_of_a_known_class_is_not_marked():
    import timm

    model = timm.create_model("test_vit")
    nas.elastic(model.blocks[0].mlp.fc1, out=(0.5, 1.0))
    with pytest.raises(UnsupportedError, match=r"blocks.0.mlp.fc1 is marked with nas.elastic, but .*own"):
        Supernet(model)


def test_the_space_of_marks_has_no_presets_and_no_options():
    with pytest.raises(ValueError, match=r"what its layers are marked with.*got 'ofa'"):
        Supernet(ResidualMLP(), "ofa")
    with pytest.raises(ValueError, match=r"got depth, mlp"):
        default_space(ResidualMLP(), depth=(1, 2), mlp=(0.5, 1.0))


def test_a_network_that_cannot_be_masked_is_not_run_as_a_mixture():
    model = nn.Sequential(nas.elastic(nn.Conv2d(3, 8, 3), out=(4, 8)), nn.ReLU(), nn.Conv2d(8, 3, 3))
    assert family_of(model).executions == ("slice",)
    supernet = Supernet(model)
    with (
        pytest.raises(UnsupportedError, match=r"a Sequential cannot be masked"),
        supernet.mixture([supernet.space.smallest]),
    ):
        pass
