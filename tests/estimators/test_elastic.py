import math

import pytest
import torch

from lightning_nas.estimators import Elastic, elastic_codes, scale_gradient, sign


@pytest.mark.parametrize(
    ("levels", "x", "y", "dx", "dscale"),
    [
        ((0, 1), -0.1, 0.0, 0, 0.0),
        ((0, 1), 0.2, 0.0, 1, -0.4),
        ((0, 1), 0.25, 0.0, 1, -0.5),
        ((0, 1), 0.3, 0.5, 1, 0.4),
        ((0, 1), 0.7, 0.5, 0, 1.0),
        ((-1, 1), 0.3, 0.5, 1, 1.0),
        ((-1, 1), -0.7, -0.5, 0, -1.0),
        ((-1, 0, 1), 0.2, 0.0, 1, -0.4),
        ((-1, 0, 1), -0.3, -0.5, 1, -0.4),
        ((-1, 0, 1), -0.7, -0.5, 0, -1.0),
    ],
)
def test_elastic_codes_have_the_gradients_of_the_method(levels, x, y, dx, dscale):
    x = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    out = scale * elastic_codes(x, scale, levels)
    out.sum().backward()
    found = (out.item(), x.grad.item(), scale.grad.item())
    assert found == (pytest.approx(y), pytest.approx(dx), pytest.approx(dscale))


@pytest.mark.parametrize(("signed", "factor"), [(True, 2.0), (False, 4.0)])
def test_an_elastic_scale_starts_at_the_first_training_batch_and_is_kept(signed, factor):
    module = Elastic(signed=signed)
    x = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) - (0.5 if signed else 0.0)
    module.eval()(x)
    assert module.scale.item() == 1.0  # evaluation starts nothing
    module.train()(x)
    assert module.scale.item() == pytest.approx(factor * x.abs().mean().item())
    first = module.scale.item()
    module(10 * x)
    assert module.scale.item() == first
    loaded = Elastic(signed=signed)
    loaded.load_state_dict(module.state_dict())
    loaded(10 * x)
    assert loaded.scale.item() == first
    assert set(module(x).tolist()[0]) <= ({-1.0, 1.0} if signed else {0.0, 1.0})


def test_the_scale_of_elastic_codes_gets_its_gradient_divided_by_the_root_of_their_number():
    module, x = Elastic(), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    (module(x) * module.scale).sum().backward()
    assert module.size.grad.item() == pytest.approx(sign(x).sum().item() / math.sqrt(128), rel=1e-5)


def test_a_shift_is_added_before_the_codes():
    module = Elastic(channels=4)
    with torch.no_grad():
        module.shift.copy_(torch.tensor([5.0, -5.0, 0.0, 0.0]))
    x = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    assert module(x).tolist() == [[1.0, -1.0, 1.0, -1.0]]


def test_scale_gradient_changes_the_gradient_alone():
    x = torch.tensor([3.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward()
    assert (y.item(), x.grad.item()) == (3.0, 0.25)


def test_a_scale_that_went_below_zero_counts_as_tiny_and_still_has_its_gradient():
    module = Elastic().eval()
    with torch.no_grad():
        module.size.fill_(-0.1)
    codes = module(torch.ones(2, 8))
    assert module.scale.item() == pytest.approx(1e-5)
    (codes * module.scale).sum().backward()
    assert module.size.grad.item() == pytest.approx(16 / math.sqrt(16))


def test_the_smallest_negative_number_keeps_its_sign_whatever_the_scale():
    x = torch.tensor([-1e-45, 1e-45, -0.0])
    assert elastic_codes(x, torch.tensor(100.0)).tolist() == [-1.0, 1.0, 1.0]


@pytest.mark.parametrize("levels", [(0, 2), (1,), (1, 0), (-1, 0, 2)])
def test_levels_that_are_not_whole_numbers_in_a_row_are_refused(levels):
    with pytest.raises(ValueError, match=r"levels must be .* got \("):
        elastic_codes(torch.ones(1), torch.ones(()), levels)
