"""Writers of backbone weights: Meta's, Hugging Face's and timm's layout, as a torch or safetensors file or a folder."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.checkpointer.layouts import rope_periods, to_hf, to_timm
from dinov3.utils.files import atomically

FORMATS = ("meta", "hf", "timm")


def export_backbone(
    backbone: nn.Module | Mapping[str, Tensor],
    destination: str | os.PathLike[str],
    format: str = "meta",
    *,
    config: Mapping[str, Any] | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Path:
    """Write a backbone's weights for others to use; readers never see a file half written.

    Args:
        backbone: the module, or its state dict (as from `read_weights`).
        destination: a file for "meta" and "timm", in safetensors form if its name ends in `.safetensors`, else in
            that of torch.save; a folder for "hf".
        format: `"meta"`: as Meta releases backbones; `"timm"`: timm's names; `"hf"`: a folder with `config.json` and
            `model.safetensors`, as `transformers.AutoModel.from_pretrained` reads, and `preprocessor_config.json`, as
            `AutoImageProcessor` does.
        config: content of `config.json`, needed for "hf" if `backbone` is a state dict; default `hf_config(backbone)`.
        statistics: mean and standard deviation of the images that the weights expect, in [0, 1], for "hf"; without
            them there is no `preprocessor_config.json`.

    Returns:
        The path written.

    Raises:
        ValueError: unknown format, a model for which the layout has no place, or a state dict without `config`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    state = backbone.state_dict() if isinstance(backbone, nn.Module) else dict(backbone)
    path = Path(destination).expanduser()
    if format == "hf":
        if config is None and not isinstance(backbone, nn.Module):
            raise ValueError("a state dict does not say all that config.json needs: pass the module, or config=")
        config = dict(config or hf_config(backbone))  # type: ignore[arg-type]
        tensors = to_hf(state)
        _refuse_other_periods(state, config)
        write_safetensors(tensors, path / "model.safetensors")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        with atomically(path / "config.json") as file:
            file.write_text(text, encoding="utf-8")
        if statistics is not None:
            text = json.dumps(hf_preprocessor_config(*statistics), indent=2) + "\n"
            with atomically(path / "preprocessor_config.json") as file:
                file.write_text(text, encoding="utf-8")
        return path
    tensors = to_timm(state) if format == "timm" else state
    if path.suffix == ".safetensors":
        write_safetensors(tensors, path)
    else:
        plain = {key: _without_neighbours(value.detach().cpu()) for key, value in tensors.items()}
        with atomically(path) as file:
            torch.save(plain, file)
    return path


def hf_preprocessor_config(mean: Sequence[float], std: Sequence[float], size: int = 224) -> dict[str, Any]:
    """The content of a Hugging Face `preprocessor_config.json`: bilinear resize to a square, scale, normalise."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",  # the name in all versions; newer ones drop "Fast"
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def hf_config(module: nn.Module) -> dict[str, Any]:
    """The content of a Hugging Face `config.json` that describes a `DinoVisionTransformer` or a `ConvNeXt`.

    Raises:
        ValueError: options that `transformers` has no counterpart for.
    """
    state = module.state_dict()
    first = next(iter(state.values()))
    common = {
        "image_size": 224,
        "initializer_range": 0.02,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "torch_dtype": str(first.dtype).removeprefix("torch."),
    }
    if "downsample_layers.0.0.weight" in state:
        return common | _convnext_config(module, state)
    return common | _vit_config(module, state)


def _convnext_config(module: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "model_type": "dinov3_convnext",
        "architectures": ["DINOv3ConvNextModel"],
        "depths": [len(stage) for stage in module.stages],
        "hidden_sizes": list(module.embed_dims),
        "layer_norm_eps": module.norm.eps,
        "layer_scale_init_value": 1e-6 if any(key.endswith(".gamma") for key in state) else 0.0,
        "num_channels": state["downsample_layers.0.0.weight"].shape[1],
    }


def _vit_config(module: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    rope = module.rope_embed
    if rope.base is None or rope.normalize_coords != "separate":
        raise ValueError(
            "transformers knows RoPE with a base and coordinates normalised separately; this model has "
            f"base={rope.base}, normalize_coords={rope.normalize_coords!r}"
        )
    block = "blocks.0"
    gated = f"{block}.mlp.w1.weight" in state
    qkv_bias = f"{block}.attn.qkv.bias" in state
    return {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "attention_dropout": 0.0,
        "hidden_size": module.embed_dim,
        "intermediate_size": state[f"{block}.mlp.{'w1' if gated else 'fc1'}.weight"].shape[0],
        "num_hidden_layers": module.n_blocks,
        "num_attention_heads": module.num_heads,
        "patch_size": module.patch_size,
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "num_register_tokens": module.n_storage_tokens,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": qkv_bias,
        "key_bias": qkv_bias and f"{block}.attn.qkv.bias_mask" not in state,
        "value_bias": qkv_bias,
        "proj_bias": f"{block}.attn.proj.bias" in state,
        "mlp_bias": f"{block}.mlp.{'w1' if gated else 'fc1'}.bias" in state,
        "layer_norm_eps": module.norm.eps,
        "layerscale_value": 1.0,
        "rope_theta": float(rope.base),
        "pos_embed_shift": rope.shift_coords,
        "pos_embed_jitter": rope.jitter_coords,
        "pos_embed_rescale": rope.rescale_coords,
    }


def _refuse_other_periods(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """transformers computes the RoPE periods itself, so other ones than it computes would be lost."""
    if "rope_embed.periods" in state and "rope_theta" in config:
        periods = state["rope_embed.periods"].float().cpu()
        if not torch.allclose(periods, rope_periods(len(periods), config["rope_theta"]), rtol=2**-8, atol=0):
            raise ValueError(
                "rope_embed.periods are not those of the base, and have no place in the Hugging Face layout"
            )


def _without_neighbours(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of a larger piece of memory, all of which `torch.save` would write."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, from any device, to a safetensors file."""
    from safetensors.torch import save_file

    # The library refuses tensors that share memory (the thirds of a qkv weight, the norm with two names).
    shared = [value.untyped_storage().data_ptr() for value in state.values()]
    plain = {}
    for (key, value), storage in zip(state.items(), shared, strict=True):
        value = value.detach().cpu().contiguous()
        plain[key] = value.clone() if shared.count(storage) > 1 else value

    with atomically(path) as file:
        file.touch()
        mode = file.stat().st_mode
        save_file(plain, file, metadata={"format": "pt"})
        file.chmod(mode)  # the library makes files that only their owner can read
