"""Binary layers, and the change of whole networks into networks of them."""

from lightning_nas.binary.activations import RPReLU, RSign, rprelu
from lightning_nas.binary.attention import (
    BiPFTAttention,
    BiTAttention,
    BiViTAttention,
    CodedAttention,
    attentions,
    row_scale,
    softmax_aware,
)
from lightning_nas.binary.forms import Activations, Weights
from lightning_nas.binary.layers import BinaryConv1d, BinaryConv2d, BinaryEmbedding, BinaryLayer, BinaryLinear
from lightning_nas.binary.products import binary_matmul
from lightning_nas.binary.scales import least_squares_scale, mean_magnitude, power_of_two, window_magnitude
from lightning_nas.binary.transform import Plan, binarize, calibrate, layers, plan, release, report, set_bits
from lightning_nas.binary.transformers import (
    attention_layers,
    binarize_attention,
    binarize_transformer,
    release_attention,
    set_parts,
)
from lightning_nas.binary.treatments import ReCU, centred, standardised

__all__ = [
    "Activations",
    "BiPFTAttention",
    "BiTAttention",
    "BiViTAttention",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryEmbedding",
    "BinaryLayer",
    "BinaryLinear",
    "CodedAttention",
    "Plan",
    "RPReLU",
    "RSign",
    "ReCU",
    "Weights",
    "attention_layers",
    "attentions",
    "binarize",
    "binarize_attention",
    "binarize_transformer",
    "binary_matmul",
    "calibrate",
    "centred",
    "layers",
    "least_squares_scale",
    "mean_magnitude",
    "plan",
    "power_of_two",
    "release",
    "release_attention",
    "report",
    "row_scale",
    "rprelu",
    "set_bits",
    "set_parts",
    "softmax_aware",
    "standardised",
    "window_magnitude",
]
