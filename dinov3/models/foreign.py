"""Models of timm and torchvision behind the backbone protocol, as students of a distillation.

The model inside stays as its library builds it, classifier included, so its weights keep the names that the library
reads: `backbone.model.state_dict()`.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.models.backbone import resolve_layer_indices

Features = dict[str, Any]

# Where torchvision's models hold their last feature map; of several names the first counts.
_TORCHVISION_FEATURES = ("norm", "layer4", "features", "encoder", "trunk_output", "conv5", "blocks")
_PROBE_PX = 224


class ForeignBackbone(nn.Module):
    """A network whose last feature map gives the patch tokens, and their mean the class token if it has none.

    Args:
        build: makes the model with the weights that its library starts from.
        layer: sub-module whose output is the last feature map: `[B, C, h, w]`, `[B, h, w, C]`, or tokens `[B, N, C]`
            behind `n_prefix` others; None: `model.forward_features` returns it.
        n_prefix: tokens before the patches; the first of them is the class token.
        device: of all parameters and buffers; None: where `build` makes them.

    Raises:
        ValueError: the output of that layer is neither a map nor tokens.
    """

    n_blocks = 1
    n_storage_tokens = 0
    patch_size = None

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *,
        layer: str | None = None,
        n_prefix: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.build, self.layer, self.n_prefix = build, layer, n_prefix
        self.channels_last = False
        with torch.device("cpu"):  # some libraries read values of tensors while building
            self.model = build()
        self.embed_dim, self.stride = self._probe()
        if device is not None:
            self.model.to(device)

    @classmethod
    def from_name(cls, name: str, device: torch.device | str | None = None) -> "ForeignBackbone":
        """From `timm:<model>` or `torchvision:<model>`, optionally with `/<layer>`; weights are random.

        Raises:
            ValueError: another library, no such model, or no layer of a known name.
        """
        library, _, rest = name.partition(":")
        model_name, _, layer = rest.partition("/")
        if library == "timm":
            build: Callable[[], nn.Module] = partial(_build_timm, model_name)
            model = build()
            n_prefix = 0 if layer else int(getattr(model, "num_prefix_tokens", 0))
            return cls(build, layer=layer or None, n_prefix=n_prefix, device=device)
        if library == "torchvision":
            build = partial(_build_torchvision, model_name)
            children = dict(build().named_children())
            layer = layer or next((child for child in _TORCHVISION_FEATURES if child in children), "")
            if not layer:
                raise ValueError(
                    f"which layer of {name} holds the last feature map? Name it: {name}/<one of {', '.join(children)}>"
                )
            return cls(build, layer=layer, n_prefix=int(layer == "encoder"), device=device)
        raise ValueError(f"got {name!r}, expected timm:<model> or torchvision:<model>")

    def _probe(self) -> tuple[int, int]:
        """Width and stride, from the shape of the features of an image (on the meta device: nothing is computed)."""
        probe = copy.copy(self)
        probe._modules = {"model": copy.deepcopy(self.model).eval().to("meta")}
        features = probe._feature_map(torch.empty(1, 3, _PROBE_PX, _PROBE_PX, device="meta"))
        if features.ndim == 4:
            # square images: the two equal sides are the spatial ones
            self.channels_last = features.shape[1] == features.shape[2] != features.shape[3]
            channels, side = (features.shape[3 if self.channels_last else 1], features.shape[2])
        elif features.ndim == 3:
            channels, side = features.shape[2], round((features.shape[1] - self.n_prefix) ** 0.5)
        else:
            raise ValueError(
                f"the layer {self.layer or 'forward_features'} gives {list(features.shape)} for an image; expected a "
                "map [B, C, h, w] or [B, h, w, C], or tokens [B, N, C]: name another one behind a slash"
            )
        return channels, round(_PROBE_PX / side)

    @property
    def embed_dims(self) -> list[int]:
        """The width."""
        return [self.embed_dim]

    def wrap_units(self) -> list[nn.Module]:
        """None: the model is sharded and compiled as a whole."""
        return []

    def checkpoint_units(self) -> list[nn.Module]:
        """None."""
        return []

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start from the weights that the library gives a new model, buffers included."""
        with torch.device("cpu"):
            fresh = self.build()
        self.model.load_state_dict(fresh.state_dict())
        self.reset_buffers(fresh)

    @torch.no_grad()
    def reset_buffers(self, fresh: nn.Module | None = None) -> None:
        """Give buffers outside the state dict (tables, say) the values they have in a new model."""
        if fresh is None:
            with torch.device("cpu"):
                fresh = self.build()
        in_state = self.model.state_dict()
        for (name, mine), theirs in zip(self.model.named_buffers(), fresh.buffers(), strict=True):
            if name not in in_state:
                mine.copy_(theirs)

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """Class tokens `[B, D]` (a list for a list); with `is_training` what `forward_features` returns."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [entry["x_norm_clstoken"] for entry in features]
        return features["x_norm_clstoken"]

    def forward_features(self, x: Tensor | Sequence[Tensor], masks: Any = None) -> Features | list[Features]:
        """Tokens, as in `DinoVisionTransformer.forward_features`.

        Raises:
            ValueError: masks were given: these models have no mask token.
        """
        if isinstance(x, Tensor):
            return self._forward_one(x, masks)
        masks = [None] * len(x) if masks is None else list(masks)
        return [self._forward_one(images, mask) for images, mask in zip(x, masks, strict=True)]

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
        """The last feature map, as `DinoVisionTransformer.get_intermediate_layers` returns it; there is no other."""
        resolve_layer_indices(n, self.n_blocks)
        features = self._forward_one(x, None)
        patches = features["x_norm_patchtokens"]
        if reshape:
            patches = patches.transpose(1, 2).unflatten(2, features["grid"])
        parts = [patches]
        parts += [features["x_norm_clstoken"]] if return_class_token else []
        parts += [features["x_storage_tokens"]] if return_extra_tokens else []
        return (parts[0] if len(parts) == 1 else tuple(parts),)

    def _forward_one(self, images: Tensor, masks: Any) -> Features:
        if masks is not None:
            raise ValueError("models of timm and torchvision have no mask token: pass masks=None")
        features = self._feature_map(images)
        if features.ndim == 4:
            grid = tuple(features.shape[1:3] if self.channels_last else features.shape[2:])
            patches = features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)
            cls = patches.mean(dim=1)
        else:
            patches = features[:, self.n_prefix :]
            cls = features[:, 0] if self.n_prefix else patches.mean(dim=1)
            grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        return {
            "x_norm_clstoken": cls,
            "x_storage_tokens": patches[:, :0],
            "x_norm_patchtokens": patches,
            "x_prenorm": features,
            "masks": None,
            "grid": grid,
        }

    def _feature_map(self, images: Tensor) -> Tensor:
        if images.dtype != next(self.model.parameters()).dtype:
            # Float32 parameters (batch norms can't be cast) with images of lower precision: as usual, autocast.
            with torch.autocast(images.device.type, images.dtype):
                return self._last_layer(images)
        return self._last_layer(images)

    def _last_layer(self, images: Tensor) -> Tensor:
        if self.layer is None:
            return self.model.forward_features(images)  # type: ignore[operator]
        seen: list[Tensor] = []
        handle = self.model.get_submodule(self.layer).register_forward_hook(lambda *call: seen.append(call[2]))
        try:
            self.model(images)
        finally:
            handle.remove()
        return seen[-1]


def _build_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} needs timm: pip install timm") from error

    if name not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}; timm.list_models() names them")
    return timm.create_model(name, pretrained=False)


def _build_torchvision(name: str) -> nn.Module:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"torchvision has no model {name!r}; torchvision.models.list_models() names them")
    return torchvision.models.get_model(name, weights=None)
