"""The k-NN evaluation, with the architecture of `tiny_training` registered."""

import sys

import tests.helpers.tiny_training  # noqa: F401
from dinov3.eval.knn import main

__all__ = ["main"]

if __name__ == "__main__":
    main(sys.argv[1:])
