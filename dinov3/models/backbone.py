"""What every backbone offers. Code outside `models` depends on this and never on a class."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Backbone(Protocol):
    """A network from images to a class token and a grid of patch tokens.

    Attributes:
        embed_dim: width of the final tokens.
        embed_dims: width of the output of each block (each stage of a convolutional network).
        n_blocks: number of blocks, or stages.
        n_storage_tokens: extra tokens between the class token and the patches.
        patch_size: side of a patch [pixels]; None for the network's own stride, see `stride`.
        stride: what sides of images should be multiples of, so that no pixel is dropped.
    """

    embed_dim: int
    n_blocks: int
    n_storage_tokens: int

    @property
    def embed_dims(self) -> list[int]: ...

    @property
    def patch_size(self) -> int | None: ...

    @property
    def stride(self) -> int: ...

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """Class tokens `[B, D]`; with `is_training` what `forward_features` returns."""
        ...

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """For images `[B, C, H, W]` a dict of tensors; for a list of them (crops of several sizes) a list of dicts.

        Keys: `x_norm_clstoken` `[B, D]`, `x_storage_tokens` `[B, R, D]`, `x_norm_patchtokens` `[B, P, D]`, `x_prenorm`
        (tokens before the final norm), `masks` (as given: `[B, P]` booleans, or None).
        """
        ...

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Outputs of the last `n` blocks, or of the blocks numbered in `n`, in block order."""
        ...

    def init_weights(self) -> None:
        """Initialise every parameter and buffer, also of a model that came from the meta device by `to_empty`."""
        ...

    def wrap_units(self) -> list[nn.Module]:
        """The modules, in forward order, that sharding and compilation act on one by one."""
        ...

    def checkpoint_units(self) -> list[nn.Module]:
        """The modules whose activations are recomputed one by one; each is part of a wrap unit, or one itself."""
        ...


def resolve_layer_indices(n: int | Sequence[int], n_blocks: int) -> list[int]:
    """The block indices that `n` asks for, ascending.

    Args:
        n: the number of last blocks, or block indices; negative ones count from the end.
        n_blocks: how many blocks there are.

    Raises:
        ValueError: none, too many, repeated or non-existing blocks.
    """
    if isinstance(n, int):
        if not 1 <= n <= n_blocks:
            raise ValueError(f"asked for the last {n} blocks, expected a number from 1 to {n_blocks}")
        return list(range(n_blocks - n, n_blocks))
    indices = [int(i) for i in n]
    if wrong := [i for i in indices if not -n_blocks <= i < n_blocks]:
        raise ValueError(f"no blocks {wrong}: this backbone has {n_blocks}, numbered from 0")
    resolved = sorted(i % n_blocks for i in indices)
    if not resolved or len(set(resolved)) < len(resolved):
        raise ValueError(f"expected distinct block indices, at least one; got {indices}")
    return resolved
