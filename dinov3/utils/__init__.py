"""Helpers that know nothing of the package: tensors, modules, dtypes, devices, seeds. They need torch alone."""

from dinov3.utils.dtype import as_torch_dtype
from dinov3.utils.info import get_conda_env, get_sha
from dinov3.utils.modules import count_parameters, has_batchnorms, named_apply, named_replace
from dinov3.utils.reproducibility import fix_random_seeds
from dinov3.utils.tensors import cat_keep_shapes, uncat_with_shapes

__all__ = [
    "as_torch_dtype",
    "cat_keep_shapes",
    "count_parameters",
    "fix_random_seeds",
    "get_conda_env",
    "get_sha",
    "has_batchnorms",
    "named_apply",
    "named_replace",
    "uncat_with_shapes",
]
