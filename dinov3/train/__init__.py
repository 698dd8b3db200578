"""Self-supervised training: `train.py` (script), `loop.py`, and the objective `SSLMetaArch`."""

from dinov3.train.multidist_meta_arch import MultiDistillationMetaArch
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import get_args_parser, main

__all__ = ["MultiDistillationMetaArch", "SSLMetaArch", "get_args_parser", "main"]
