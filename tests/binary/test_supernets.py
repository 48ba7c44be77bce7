import warnings

import pytest
import timm
import torch
from torch import nn

import lightning_nas as nas
from lightning_nas.binary import Activations, Weights
from tests.binary.test_transform import tiny_bert
from tests.user_modules import tiny_vit


def centred_as_bit(weight):
    """By the mean of the whole layer, whose sum depends on the order of memory."""
    return weight - weight.mean()


FORMS = [
    (Weights(), 32),
    (Weights(scale="layer", treatment=centred_as_bit), 32),
    (Weights(scale="layer", treatment="standardised"), Activations(has_threshold=True)),
    (Weights(scale="learned", treatment="centred"), Activations(scale="xnor")),
    (Weights(bits=2, scale="learned"), Activations(has_threshold=True)),
]


def vit():
    return tiny_vit(embed_dim=24).eval(), torch.randn(2, 1, 8, 8)


def bert():
    return tiny_bert().eval(), torch.randint(0, 30, (2, 5))


def resnet():
    return timm.create_model("resnet10t", num_classes=2).eval(), torch.randn(2, 3, 32, 32)


def marked():
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 2)
    ).eval()
    return model, torch.randn(3, 6)


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize("make", [vit, bert, resnet, marked])
@pytest.mark.parametrize(("weights", "activations"), FORMS)
def test_an_extracted_binary_network_equals_its_subnetwork_to_the_last_bit(make, weights, activations):
    model, x = make()
    for parameter in model.parameters():  # at its start a branch of a ResNet is zero
        parameter.data.normal_(std=0.3)
    nas.binarize(model, weights=weights, activations=activations, example_inputs=(x,))
    if make is marked:
        nas.elastic(model[1], out=(3, 12))
    for layer in nas.binary.layers(model).values():  # values that betray a wrong row or column
        for name in {"weight_scale", "input_threshold"} & layer._parameters.keys():
            layer._parameters[name].data += 0.1 * torch.rand_like(layer._parameters[name])
    whole = output(model, x)
    supernet = nas.Supernet(model)
    assert torch.equal(output(model, x), whole)
    smallest = supernet.space.smallest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batch-norm statistics are those of the whole network
        with supernet.using(smallest):
            part = output(model, x)
        small = supernet.extract(smallest)
    assert torch.equal(output(small, x), part)
    assert not torch.equal(part, whole)
    for layer in nas.binary.layers(small).values():
        assert layer.scale.shape in ((), (len(layer.weight),))
        assert layer.binary_weight.unique().tolist() in ([-1, 1], [-1, 0, 1])
    supernet.release()
    assert torch.equal(output(model, x), whole)


def test_scales_and_thresholds_move_with_the_units_that_are_reordered():
    model, x = vit()
    nas.binarize(model.double(), weights=Weights(scale="learned"), activations=FORMS[2][1])
    x = x.double()
    model(x)
    for layer in nas.binary.layers(model).values():
        layer.weight_scale.data.uniform_(0.5, 1.5)
        layer.input_threshold.data.uniform_(-0.1, 0.1)
    whole = model(x)
    nas.Supernet(model, order="magnitude")
    torch.testing.assert_close(model(x), whole)


def test_what_is_masked_would_count_so_masking_is_refused():
    model, _ = vit()
    nas.binarize(model)
    with pytest.raises(nas.UnsupportedError, match="blocks.0.attn.qkv codes its weights"):
        nas.Supernet(model, execution="mask")
    supernet = nas.Supernet(model)
    with (
        pytest.raises(nas.UnsupportedError, match="codes its weights"),
        supernet.mixture([supernet.space.largest]),
    ):
        pass


def test_an_elastic_network_is_to_be_binarized_first():
    model, _ = vit()
    supernet = nas.Supernet(model)
    with pytest.raises(nas.NASError, match=r"Supernet\(binarize\(model\)\)"):
        nas.binarize(model)
    supernet.release()
    nas.Supernet(nas.binarize(model))
