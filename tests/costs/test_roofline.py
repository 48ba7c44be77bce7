from __future__ import annotations

import pytest
import torch

from lightning_nas.costs import Device, Roofline
from tests.costs.networks import residual

X = torch.zeros(1, 5, 4)


def test_the_time_is_that_of_each_operation_by_hand():
    supernet = residual()
    roofline = Roofline(supernet, X, Device(peak_flops=160, bandwidth=400, overhead=0.5))
    # 8 units; up: 320 FLOPs, and 32 + 80 + 128 + 160 bytes of bias, input, weight and output;
    # ReLU: 160 + 160 bytes; down: 320 FLOPs, and 16 + 160 + 128 + 80 bytes; sum: 3 * 80 bytes
    seconds = max(320 / 160, 400 / 400) + 320 / 400 + max(320 / 160, 384 / 400) + 240 / 400 + 4 * 0.5
    assert roofline(supernet.space.largest) == pytest.approx(1e3 * seconds, rel=1e-12)
    wide = Roofline(supernet, X, Device(peak_flops=1e30, bandwidth=400))
    assert wide(supernet.space.largest) == pytest.approx(1e3 * (400 + 320 + 384 + 240) / 400, rel=1e-12)


def test_a_better_device_is_never_slower():
    supernet = residual()

    def time(**better):
        limits = {"peak_flops": 160.0, "bandwidth": 400.0, "overhead": 0.5} | better
        return Roofline(supernet, X, Device(**limits))(supernet.space.largest)

    assert time(peak_flops=320) < time()
    assert time(bandwidth=800) < time()
    assert time(overhead=0) < time()


def test_a_device_is_written_and_read_as_json():
    device = Device(1e12, 5e10, 2e-6, "phone")
    assert Device.from_json(device.to_json()) == device


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Device(0, 1), r"peak_flops must be positive, got 0"),
        (lambda: Device(1, float("nan")), r"bandwidth must be positive, got nan"),
        (lambda: Device(1, 1, -1), r"overhead must be 0 or more seconds, got -1"),
        (lambda: Device.from_json('{"peak": 1}'), r"not a device .*'peak'.*Expected for example"),
        (lambda: Device.from_json("phone"), r"not a device"),
    ],
)
def test_what_is_no_device_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_name_is_no_device():
    with pytest.raises(TypeError, match=r"must be a Device\(peak_flops, bandwidth\), got 'phone'"):
        Roofline(residual(), X, "phone")
