"""Layouts of backbone state dicts: which one a dict is in, and the way from each to Meta's and back.

Meta's names (those of `dinov3.models`) are the canonical ones; Hugging Face transformers and timm name, split and
leave out tensors in their own way. A layout is recognised by the tensors that only it has. Nothing here knows files
or models.
"""

import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Layout(Enum):
    """Who named the tensors."""

    META = "meta"
    HF_VIT = "hf-vit"
    HF_CONVNEXT = "hf-convnext"
    TIMM_VIT = "timm-vit"
    TIMM_CONVNEXT = "timm-convnext"


# Meta's name, the other name; `{i}`-like fields are copied, `{*}` is the rest of the name ("weight", "bias").
_HF_VIT = [
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.{*}", "embeddings.patch_embeddings.{*}"),
    ("blocks.{i}.attn.proj.{*}", "layer.{i}.attention.o_proj.{*}"),
    ("blocks.{i}.ls{j}.gamma", "layer.{i}.layer_scale{j}.lambda1"),
    ("blocks.{i}.norm{j}.{*}", "layer.{i}.norm{j}.{*}"),
    ("norm.{*}", "norm.{*}"),
]
_HF_MLP = [
    ("blocks.{i}.mlp.fc1.{*}", "layer.{i}.mlp.up_proj.{*}"),
    ("blocks.{i}.mlp.fc2.{*}", "layer.{i}.mlp.down_proj.{*}"),
]
_HF_GATED_MLP = [
    ("blocks.{i}.mlp.w1.{*}", "layer.{i}.mlp.gate_proj.{*}"),
    ("blocks.{i}.mlp.w2.{*}", "layer.{i}.mlp.up_proj.{*}"),
    ("blocks.{i}.mlp.w3.{*}", "layer.{i}.mlp.down_proj.{*}"),
]
_HF_CONVNEXT = [
    ("stages.{i}.{j}.dwconv.{*}", "stages.{i}.layers.{j}.depthwise_conv.{*}"),
    ("stages.{i}.{j}.pwconv{k}.{*}", "stages.{i}.layers.{j}.pointwise_conv{k}.{*}"),
    ("stages.{i}.{j}.norm.{*}", "stages.{i}.layers.{j}.layer_norm.{*}"),
    ("stages.{i}.{j}.gamma", "stages.{i}.layers.{j}.gamma"),
    ("downsample_layers.{i}.{j}.{*}", "stages.{i}.downsample_layers.{j}.{*}"),
    ("norm.{*}", "layer_norm.{*}"),
]
_TIMM_VIT = [
    ("cls_token", "cls_token"),
    ("storage_tokens", "reg_token"),
    ("patch_embed.proj.{*}", "patch_embed.proj.{*}"),
    ("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    ("blocks.{i}.attn.proj.{*}", "blocks.{i}.attn.proj.{*}"),
    ("blocks.{i}.ls{j}.gamma", "blocks.{i}.gamma_{j}"),
    ("blocks.{i}.norm{j}.{*}", "blocks.{i}.norm{j}.{*}"),
    ("norm.{*}", "norm.{*}"),
]
_TIMM_MLP = [
    ("blocks.{i}.mlp.fc1.{*}", "blocks.{i}.mlp.fc1.{*}"),
    ("blocks.{i}.mlp.fc2.{*}", "blocks.{i}.mlp.fc2.{*}"),
]
_TIMM_GATED_MLP = [
    ("blocks.{i}.mlp.w1.{*}", "blocks.{i}.mlp.fc1_g.{*}"),
    ("blocks.{i}.mlp.w2.{*}", "blocks.{i}.mlp.fc1_x.{*}"),
    ("blocks.{i}.mlp.w3.{*}", "blocks.{i}.mlp.fc2.{*}"),
]
_TIMM_CONVNEXT = [
    ("stages.{i}.{j}.dwconv.{*}", "stages.{i}.blocks.{j}.conv_dw.{*}"),
    ("stages.{i}.{j}.pwconv{k}.{*}", "stages.{i}.blocks.{j}.mlp.fc{k}.{*}"),
    ("stages.{i}.{j}.norm.{*}", "stages.{i}.blocks.{j}.norm.{*}"),
    ("stages.{i}.{j}.gamma", "stages.{i}.blocks.{j}.gamma"),
    ("downsample_layers.0.{j}.{*}", "stem.{j}.{*}"),
    ("downsample_layers.{i}.{j}.{*}", "stages.{i}.downsample.{j}.{*}"),
    ("norm.{*}", "head.norm.{*}"),
]

_RECOMPUTED = ("rope_embed.periods", ".bias_mask")


def recognise(state: Mapping[str, Any]) -> Layout:
    """The layout of a backbone's state dict; Meta's if no other layout is seen."""
    names = {key.removeprefix("model.") for key in state}

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if "embeddings.cls_token" in names and has(r"^layer\.\d+\.attention\.\w_proj\."):
        return Layout.HF_VIT
    if has(r"^stages\.\d+\.layers\.\d+\.depthwise_conv\."):
        return Layout.HF_CONVNEXT
    if has(r"^stages\.\d+\.blocks\.\d+\.conv_dw\."):
        return Layout.TIMM_CONVNEXT
    if "patch_embed.proj.weight" in names and has(r"^reg_token$|\.gamma_1$|\.mlp\.fc1_g\.|\.attn\.q_bias$"):
        return Layout.TIMM_VIT
    return Layout.META


# --- To Meta's layout ------------------------------------------------------------------------------------------------


def to_meta(
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    like: Mapping[str, Tensor] | None = None,
    round_periods: bool = True,
) -> dict[str, Tensor]:
    """A backbone's state dict in Meta's layout, whatever layout it comes in.

    What a layout leaves out is put back as the released models have it: RoPE periods, the mask of the key bias (the key
    part itself is 0), `mask_token` (0, timm), the second name of the ConvNeXt norm.

    Args:
        state: in any layout of `Layout`; in Meta's it is returned as it is.
        config: content of a Hugging Face `config.json`; gives the number of heads and the RoPE base.
        like: state dict of the model the tensors are meant for (shapes only, meta tensors will do). With it the
            length of the periods is the model's, a qkv bias that timm's plain variants dropped is 0, and
            `local_cls_norm` is a copy of `norm`. Without `like` and `config`, heads are taken to have 64 channels
            (128 if there are 4096 in all), as all released models have.
        round_periods: RoPE periods rounded to bfloat16, as in the files that Meta released (default), or exact.

    Raises:
        ValueError: names that the recognised layout doesn't have.
    """
    layout = recognise(state)
    if layout is Layout.META:
        return dict(state)
    source = {key.removeprefix("model."): value for key, value in state.items()}
    if layout is Layout.TIMM_VIT and "cls_token" not in source:
        raise ValueError("a timm ViT without cls_token is not a DINOv3 backbone")
    config, like = config or {}, like or {}
    if layout is Layout.HF_CONVNEXT:
        return _with_second_norm(_rename(source, _HF_CONVNEXT, layout))
    if layout is Layout.TIMM_CONVNEXT:
        return _with_second_norm(_rename(source, _TIMM_CONVNEXT, layout))
    meta = _vit_from_hf(source) if layout is Layout.HF_VIT else _vit_from_timm(source, like)
    meta["rope_embed.periods"] = _periods(meta["cls_token"].shape[-1], config, like, round_periods)
    if "local_cls_norm.weight" in like:
        meta |= {f"local_cls_norm.{name}": meta[f"norm.{name}"].clone() for name in ("weight", "bias")}
    return meta


def _vit_from_hf(source: dict[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.gate_proj." in key for key in source)
    projections = {key: source.pop(key) for key in list(source) if re.search(r"\.attention\.[qkv]_proj\.", key)}
    meta = _rename(source, _HF_VIT + (_HF_GATED_MLP if gated else _HF_MLP), Layout.HF_VIT)
    if "mask_token" in meta:
        meta["mask_token"] = meta["mask_token"].flatten(0, 1)  # [1, 1, D] -> [1, D]
    if "storage_tokens" in meta and meta["storage_tokens"].shape[1] == 0:
        del meta["storage_tokens"]
    for i in range(_depth(meta)):
        weights, biases = (
            [projections.get(f"layer.{i}.attention.{part}_proj.{name}") for part in "qkv"]
            for name in ("weight", "bias")
        )
        missing = [part for part, weight in zip("qkv", weights, strict=True) if weight is None]
        if missing:
            raise ValueError(f"layer.{i}.attention has no weight for {', '.join(missing)}; the file is not complete")
        meta[f"blocks.{i}.attn.qkv.weight"] = torch.cat([weight for weight in weights if weight is not None])
        meta |= _qkv_bias(i, *biases)
    return meta


def _vit_from_timm(source: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gated = any(".mlp.fc1_g." in key for key in source)
    biases = {key: source.pop(key) for key in list(source) if re.search(r"\.attn\.[qv]_bias$", key)}
    meta = _rename(source, _TIMM_VIT + (_TIMM_GATED_MLP if gated else _TIMM_MLP), Layout.TIMM_VIT)
    meta["mask_token"] = torch.zeros_like(meta["cls_token"][0])  # only training uses it
    for i in range(_depth(meta)):
        q, v = (biases.get(f"blocks.{i}.attn.{part}_bias") for part in "qv")
        if q is None and v is None and f"blocks.{i}.attn.qkv.bias" in like:
            q = v = torch.zeros_like(meta["cls_token"].flatten())
        meta |= _qkv_bias(i, q, None, v)
    return meta


def _qkv_bias(i: int, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> dict[str, Tensor]:
    """The joint bias of block `i`; without a key part it has a mask, which the layers multiply it with."""
    if q is None and k is None and v is None:
        return {}
    if q is None or v is None:
        raise ValueError(f"block {i} has a bias for some of query and value only; expected both or none")
    bias = {f"blocks.{i}.attn.qkv.bias": torch.cat([q, torch.zeros_like(q) if k is None else k, v])}
    if k is None:
        ones, zeros = torch.ones_like(q), torch.zeros_like(q)
        bias[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([ones, zeros, ones])
    return bias


def _periods(dim: int, config: Mapping[str, Any], like: Mapping[str, Tensor], round_periods: bool) -> Tensor:
    """RoPE periods of a model that is `dim` wide."""
    if "rope_embed.periods" in like:
        n_periods = like["rope_embed.periods"].shape[0]
    elif "num_attention_heads" in config:
        n_heads = config["num_attention_heads"]
        if not isinstance(n_heads, int) or not 1 <= n_heads <= dim:
            raise ValueError(f"config.json: num_attention_heads is {n_heads!r}, the network is {dim} wide")
        n_periods = dim // n_heads // 4
    else:
        n_periods = (128 if dim == 4096 else 64) // 4
    rope = config.get("rope_parameters")
    base = config.get("rope_theta") or (rope.get("rope_theta") if isinstance(rope, Mapping) else None) or 100.0
    if not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ValueError(f"config.json: rope_theta is {base!r}, expected a positive number")
    base = float(base)
    periods = rope_periods(n_periods, base)
    return periods.bfloat16().float() if round_periods else periods


def rope_periods(n_periods: int, base: float) -> Tensor:
    """The periods base^(i / n), i < n, of one axis: n = d/4 for heads of d channels."""
    return base ** (torch.arange(n_periods, dtype=torch.float32) / n_periods)


def _with_second_norm(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """ConvNeXt registers its final norm twice, and released files hold both names."""
    return meta | {f"norms.3.{name}": meta[f"norm.{name}"] for name in ("weight", "bias") if f"norm.{name}" in meta}


# --- From Meta's layout ----------------------------------------------------------------------------------------------


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state dict (Meta's layout) with the names and shapes of the Hugging Face files.

    Raises:
        ValueError: the model has parts for which that layout has no place.
    """
    if _is_convnext(state):
        return _rename(_without(state, "norms."), _HF_CONVNEXT, Layout.META)
    _refuse_untied_norm(state)
    gated = any(".mlp.w1." in key for key in state)
    source = _without(state, *_RECOMPUTED, "local_cls_norm.", ".attn.qkv.")
    hf = _rename(source, _HF_VIT + (_HF_GATED_MLP if gated else _HF_MLP), Layout.META)
    cls_token, mask_token = hf["embeddings.cls_token"], hf["embeddings.mask_token"]
    hf["embeddings.mask_token"] = mask_token.unsqueeze(0)  # [1, D] -> [1, 1, D]
    hf.setdefault("embeddings.register_tokens", cls_token.new_empty(1, 0, cls_token.shape[-1]))
    for i in range(_depth(state)):
        for part, weight in zip("qkv", state[f"blocks.{i}.attn.qkv.weight"].chunk(3), strict=True):
            hf[f"layer.{i}.attention.{part}_proj.weight"] = weight
        for part, bias in _split_bias(state, i).items():
            hf[f"layer.{i}.attention.{part}_proj.bias"] = bias
        for j in (1, 2):  # no layer scale is a layer scale of 1
            hf.setdefault(f"layer.{i}.layer_scale{j}.lambda1", torch.ones_like(cls_token.flatten()))
    return hf


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state dict (Meta's layout) with the names of timm.

    A ViT with a qkv bias fits timm's `_qkvb` variants, one without the plain ones.

    Raises:
        ValueError: the model has parts for which that layout has no place.
    """
    if _is_convnext(state):
        return _rename(_without(state, "norms."), _TIMM_CONVNEXT, Layout.META)
    _refuse_untied_norm(state)
    gated = any(".mlp.w1." in key for key in state)
    source = _without(state, *_RECOMPUTED, "local_cls_norm.", "mask_token", ".attn.qkv.bias")
    timm = _rename(source, _TIMM_VIT + (_TIMM_GATED_MLP if gated else _TIMM_MLP), Layout.META)
    for i in range(_depth(state)):
        biases = _split_bias(state, i)
        if "k" in biases:
            raise ValueError("timm has no key bias: only a model whose key bias is masked (mask_k_bias) can be written")
        timm |= {f"blocks.{i}.attn.{part}_bias": bias for part, bias in biases.items()}
    return timm


def _split_bias(state: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """The parts of the qkv bias of block `i` that act: q and v, and k where it isn't masked."""
    bias = state.get(f"blocks.{i}.attn.qkv.bias")
    if bias is None:
        return {}
    parts = dict(zip("qkv", bias.chunk(3), strict=True))
    mask = state.get(f"blocks.{i}.attn.qkv.bias_mask")
    if mask is not None:
        q, k, v = (part.double().unique().tolist() for part in mask.chunk(3))
        if (q, k, v) != ([1.0], [0.0], [1.0]):
            raise ValueError(
                f"blocks.{i}.attn.qkv.bias_mask is not 1 for q and v and 0 for k; was the model initialised?"
            )
        del parts["k"]
    return parts


def _refuse_untied_norm(state: Mapping[str, Tensor]) -> None:
    if any(key.startswith("cls_norm.") for key in state):
        raise ValueError("cls_norm (untie_cls_and_patch_norms) has no place in the Hugging Face and timm layouts")
    if "norm.bias" not in state:
        raise ValueError("the norms have no bias (rmsnorm), which the Hugging Face and timm layouts do not know")


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _is_convnext(state: Mapping[str, Tensor]) -> bool:
    return "downsample_layers.0.0.weight" in state


def _depth(state: Mapping[str, Tensor]) -> int:
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    return max(blocks, default=-1) + 1


def _without(state: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The entries whose key holds none of `parts`."""
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def _rename(state: Mapping[str, Tensor], table: list[tuple[str, str]], layout: Layout) -> dict[str, Tensor]:
    """Rename by the table: from Meta's names if `layout` is Meta's, else to them.

    Raises:
        ValueError: a name that the table doesn't have.
    """
    pairs = table if layout is Layout.META else [(other, meta) for meta, other in table]
    rules = [(_pattern(old), new.replace("{*}", "{rest}")) for old, new in pairs]
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, new in rules:
            if match := pattern.fullmatch(key):
                renamed[new.format(**match.groupdict())] = value
                break
        else:
            unknown.append(key)
    if unknown:
        shown = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        raise ValueError(f"names that the {layout.value} layout of a DINOv3 backbone does not have: {shown}")
    return renamed


def _pattern(template: str) -> re.Pattern[str]:
    """`blocks.{i}.norm.{*}` as a regular expression: numbers for letters, any rest for the star."""
    escaped = re.escape(template).replace(r"\{\*\}", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", escaped))
