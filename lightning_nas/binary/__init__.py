"""Binary layers, and the change of whole networks into networks of them."""

from lightning_nas.binary.activations import RPReLU, RSign, rprelu
from lightning_nas.binary.forms import Activations, Weights
from lightning_nas.binary.layers import BinaryConv1d, BinaryConv2d, BinaryEmbedding, BinaryLayer, BinaryLinear
from lightning_nas.binary.products import binary_matmul
from lightning_nas.binary.scales import least_squares_scale, mean_magnitude, power_of_two, window_magnitude
from lightning_nas.binary.transform import Plan, binarize, calibrate, layers, plan, release, report, set_bits
from lightning_nas.binary.treatments import ReCU, centred, standardised

__all__ = [
    "Activations",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryEmbedding",
    "BinaryLayer",
    "BinaryLinear",
    "Plan",
    "RPReLU",
    "RSign",
    "ReCU",
    "Weights",
    "binarize",
    "binary_matmul",
    "calibrate",
    "centred",
    "layers",
    "least_squares_scale",
    "mean_magnitude",
    "plan",
    "power_of_two",
    "release",
    "report",
    "rprelu",
    "set_bits",
    "standardised",
    "window_magnitude",
]
