"""Networks in place together with their search spaces."""

from lightning_nas.supernet.adapter import Adapter, Preset, Reader
from lightning_nas.supernet.anatomy import Anatomy, Family, Group, Operation, Part, Segment, Stage
from lightning_nas.supernet.annotation import elastic
from lightning_nas.supernet.evaluator import SupernetEvaluator
from lightning_nas.supernet.families import families, family_of, supported_networks, supports
from lightning_nas.supernet.initialisation import zero_residual_branches
from lightning_nas.supernet.kernels import add_kernel_transforms
from lightning_nas.supernet.ordering import Permutation, permute_like
from lightning_nas.supernet.prefixes import SharedPrefixes
from lightning_nas.supernet.supernet import Supernet, default_space

__all__ = [
    "Adapter",
    "Anatomy",
    "Family",
    "Group",
    "Operation",
    "Part",
    "Permutation",
    "Preset",
    "Reader",
    "Segment",
    "SharedPrefixes",
    "Stage",
    "Supernet",
    "SupernetEvaluator",
    "add_kernel_transforms",
    "default_space",
    "elastic",
    "families",
    "family_of",
    "permute_like",
    "supported_networks",
    "supports",
    "zero_residual_branches",
]
