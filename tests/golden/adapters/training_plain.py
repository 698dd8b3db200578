"""Golden cases whose results are plain data: configuration, schedules, parameter groups, run time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

Params = Mapping[str, Any]

LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration; lists are values."""
    from omegaconf import OmegaConf

    data = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def load_config(p: Params) -> Any:
    """The defaults with the recipe `config` (a file name below `configs/train`) and `overrides`."""
    import dinov3.configs
    from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args, get_default_config

    overrides = list(p.get("overrides", []))
    if "config" not in p:
        from omegaconf import OmegaConf

        return OmegaConf.merge(get_default_config(), OmegaConf.from_cli(overrides))
    path = Path(dinov3.configs.__file__).parent / "train" / p["config"]
    args = DinoV3SetupArgs(config_file=str(path), output_dir=None, opts=overrides)
    return get_cfg_from_args(args, strict=False)


def default_config(_: str, __: Params, ___: Path) -> dict[str, Any]:
    from dinov3.configs import get_default_config

    return {"expected": flatten(get_default_config())}


def config(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.configs import get_default_config

    flat = flatten(load_config(p))
    if p.get("diff_only"):
        defaults = flatten(get_default_config())
        flat = {key: value for key, value in flat.items() if key not in defaults or defaults[key] != value}
    return {"expected": flat}


def scaling(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.configs import apply_scaling_rules_to_cfg

    cfg = load_config(p)
    apply_scaling_rules_to_cfg(cfg)
    return {"expected": {"optim.lr": cfg.optim.lr}}


def schedules(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.configs import apply_scaling_rules_to_cfg
    from dinov3.train.train import build_schedulers

    cfg = load_config(p)
    apply_scaling_rules_to_cfg(cfg)
    iterations = range(0, cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH, p.get("stride", 1))
    names = ("lr", "wd", "momentum", "teacher_temp", "last_layer_lr")
    return {
        name: torch.tensor([schedule[i] for i in iterations], dtype=torch.float64)
        for name, schedule in zip(names, build_schedulers(cfg), strict=True)
    }


def cosine_scheduler(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.train.cosine_lr_scheduler import CosineScheduler

    schedule = CosineScheduler(**p["init"])
    values = [schedule[i] for i in range(p["init"]["total_iters"] + 2)]
    return {"values": torch.tensor(values, dtype=torch.float64)}


def warmup_cosine(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.train.cosine_lr_scheduler import linear_warmup_cosine_decay

    return {"values": torch.from_numpy(linear_warmup_cosine_decay(**p["call"]))}


def groups(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay_fsdp

    with torch.device("meta"):
        model = _build(p["arch"], p["kwargs"])
    names = {id(param): name for name, param in model.named_parameters()}
    single = get_params_groups_with_decay_fsdp(model, **p["call"])
    merged = [{**group, "params": [names[id(x)] for x in group["params"]]} for group in fuse_params_groups(single)]
    keys = ("name", "lr_multiplier", "wd_multiplier", "is_last_layer")
    return {"expected": {"groups": [[group[key] for key in keys] for group in single], "fused": merged}}


def _build(arch: str, kwargs: Params) -> nn.Module:
    if arch == "head":
        from dinov3.layers.dino_head import DINOHead

        return DINOHead(**kwargs)
    if arch.startswith("convnext"):
        from dinov3.models.convnext import get_convnext_arch

        return get_convnext_arch(arch)(**kwargs)
    from dinov3.models import vision_transformer

    return getattr(vision_transformer, arch, vision_transformer.DinoVisionTransformer)(**kwargs)


def names(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.train.param_groups import remove_fsdp_compile_names

    return {"expected": {name: remove_fsdp_compile_names(name) for name in p["names"]}}


def state_dict(_: str, p: Params, __: Path) -> dict[str, Any]:
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    with torch.device("meta"):
        model = SSLMetaArch(load_config(p))
    keys = _described(model)
    parts = {"student", "teacher", "model_ema"}
    student = _described(model.student)
    return {
        "expected": {
            "student": student,
            "same_keys_and_shapes_under": {
                part: list(getattr(model, part)) if _described(getattr(model, part)) == student else []
                for part in ("teacher", "model_ema")
            },
            "others": {key: value for key, value in keys.items() if key.split(".")[0] not in parts},
            "first_keys": list(keys)[:4],
        }
    }


def _described(model: nn.Module) -> dict[str, Any]:
    return {key: [list(x.shape), str(x.dtype).removeprefix("torch.")] for key, x in model.state_dict().items()}


def metric_logger(_: str, p: Params, tmp_path: Path) -> dict[str, Any]:
    from dinov3.logging import MetricLogger, SmoothedValue

    output = tmp_path / "metrics.json"
    logger = MetricLogger(delimiter="  ", output_file=str(output))
    for i in logger.log_every(range(p["n"]), p["print_freq"], "header"):
        logger.update(loss=(7 * i) % 11 + 0.5, lr=0.1 / (i + 1))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    smoothed = SmoothedValue(window_size=4)  # the window that the stored average was made with
    for value in p["values"]:
        smoothed.update(value)
    statistics = {name: getattr(smoothed, name) for name in ("median", "avg", "global_avg", "max", "value")}
    return {
        "expected": {
            "keys_in_order": list(rows[0]),
            "rows": [{key: row[key] for key in ("iteration", "loss", "lr")} for row in rows],
            "smoothed": {**statistics, "str": str(smoothed)},
            "str": str(logger),
        }
    }


def ckpt_dirs(_: str, p: Params, tmp_path: Path) -> dict[str, Any]:
    from dinov3.checkpointer import (
        find_all_checkpoints,
        find_latest_checkpoint,
        keep_checkpoint_copy,
        keep_last_n_checkpoints,
    )

    for name in p["dirs"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "77").write_text("a file, not a checkpoint")
    found = [Path(path).name for path in find_all_checkpoints(tmp_path)]
    latest = Path(find_latest_checkpoint(tmp_path))
    keep_checkpoint_copy(latest)
    nlink = (latest / "file").stat().st_nlink
    keep_last_n_checkpoints(tmp_path, p["keep"])
    left = sorted(path.name for path in tmp_path.iterdir())
    return {"expected": {"found": found, "latest": latest.name, "nlink": nlink, "left": left}}


def launch_env(_: str, p: Params, tmp_path: Path) -> dict[str, Any]:
    from dinov3.distributed import TorchDistributedEnvironment

    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM", "TORCHELASTIC")) and key not in LAUNCH_VARIABLES
    }
    if "nodes" in p:  # what `scontrol show hostnames` answers on this cluster
        scontrol = tmp_path / "scontrol"
        scontrol.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(p["nodes"]) + "\n")
        scontrol.chmod(0o755)
        clean["PATH"] = f"{tmp_path}{os.pathsep}{clean['PATH']}"
    with patch.dict(os.environ, clean | p["env"], clear=True):
        env = TorchDistributedEnvironment()
    fields = ("job_id", "master_addr", "master_port", "rank", "world_size", "local_rank", "local_world_size")
    described = {field: getattr(env, field) for field in fields}
    return {"expected": {**described, "job_type": env.job_type.value, "str": str(env)}}


KINDS = {
    fn.__name__: fn
    for fn in (
        default_config, config, scaling, schedules, cosine_scheduler, warmup_cosine, groups, names, state_dict,
        metric_logger, ckpt_dirs, launch_env,
    )
}  # fmt: skip
