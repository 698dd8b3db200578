"""Golden cases of the meta architecture: single steps, and short trainings with the loop's own step."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden import fill
from tests.golden.adapters.training_losses import by_rank, make_masks
from tests.helpers.distributed import run_distributed

Params = Mapping[str, Any]

PARTS = ("student", "teacher", "model_ema", "gram_teacher")
N_FIRST_OF_GRADIENT, N_FIRST_OF_OUTPUT, N_FIRST_OF_PARAMETER = 64, 256, 8


@contextlib.contextmanager
def registered(archs: Mapping[str, Callable[..., nn.Module]]) -> Iterator[None]:
    """Make architectures available to configurations, as functions of `vision_transformer`."""
    from dinov3.models import vision_transformer

    for name, build in archs.items():
        setattr(vision_transformer, name, build)
    try:
        yield
    finally:
        for name in archs:
            delattr(vision_transformer, name)


def tiny_vit(defaults: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> Callable[..., nn.Module]:
    """A builder of ViTs with the options of the configuration over `defaults`, and `fixed` ones over these."""

    def build(patch_size: int = 16, **options: Any) -> nn.Module:
        from dinov3.models.vision_transformer import DinoVisionTransformer

        return DinoVisionTransformer(patch_size=patch_size, **{**defaults, **options, **(fixed or {})})

    return build


def archs_of(p: Params) -> dict[str, Callable[..., nn.Module]]:
    return {name: tiny_vit(defaults) for name, defaults in p.get("arch", {}).items()}


def build_config(p: Params, tmp_path: Path) -> Any:
    from omegaconf import OmegaConf

    from dinov3.configs import get_default_config

    cfg = OmegaConf.merge(get_default_config(), p["cfg"], {"train": {"output_dir": str(tmp_path)}})
    if "teacher_cfg" in p:
        teacher_cfg = tmp_path / "teacher.yaml"
        OmegaConf.save(OmegaConf.create(p["teacher_cfg"]), teacher_cfg)
        distillation = {"enabled": True, "full_cfg_path": str(teacher_cfg), "checkpoint_path": "ignore"}
        cfg = OmegaConf.merge(cfg, {"distillation": distillation})
    return cfg


def build_model(cfg: Any, meta: str = "SSLMetaArch") -> Any:
    """The meta architecture on the CPU with weights made from their names, in training mode."""
    import dinov3.train

    with torch.device("meta"):
        model = getattr(dinov3.train, meta)(cfg)
    model.to_empty(device="cpu")
    model.dino_loss.init_weights()
    model.ibot_patch_loss.init_weights()
    for _, part in distinct_parts(model):
        part["backbone"].init_weights()  # constants
    fill_parts(model)
    model.gram_teacher_initialized = True  # its weights are those just made
    model.train()
    return model


def distinct_parts(model: Any) -> list[tuple[str, nn.ModuleDict]]:
    """Names and networks, each network once."""
    found: dict[int, tuple[str, nn.ModuleDict]] = {}
    for name in PARTS:
        part = getattr(model, name)
        if part is not None:
            found.setdefault(id(part), (name, part))
    return list(found.values())


@torch.no_grad()
def fill_parts(model: Any) -> None:
    for name, part in distinct_parts(model):
        for key, value in part.state_dict().items():
            if value.is_floating_point() and key.rsplit(".", 1)[-1] not in fill.KEEP:
                value.copy_(fill.weight(f"{name}.{key}", tuple(value.shape)))


def build_batch(cfg: Any, data: Params, tag: str, mask_samples: int | None = None) -> dict[str, Any]:
    """A collated batch of `data.b` samples, with masks for `mask_samples` (default: as many)."""
    crops, b = cfg.crops, data["b"]
    n_patches = (crops.global_crops_size // cfg.student.patch_size) ** 2
    rows = 2 * (b if mask_samples is None else mask_samples)
    masks = make_masks(tag, rows, n_patches, data["threshold"], data["empty"])
    batch = {
        "collated_global_crops": _images(f"{tag}.global", 2 * b, crops.global_crops_size),
        "collated_local_crops": _images(f"{tag}.local", crops.local_crops_number * b, crops.local_crops_size),
        **masks,
        "upperbound": len(masks["mask_indices_list"]),
        "global_batch_size": data.get("global_batch_size", b),
    }
    if crops.gram_teacher_crops_size:
        batch["collated_gram_teacher_crops"] = _images(f"{tag}.gram", 2 * b, crops.gram_teacher_crops_size)
    return batch


def _images(name: str, n: int, size: int) -> Tensor:
    return fill.tensor(name, (n, 3, size, size))


def step(case: str, p: Params, tmp_path: Path) -> dict[str, Any]:
    results, plain = _step(case, p, tmp_path, rank=0, mask_samples=None)
    return {**results, "expected": plain}


def step_multi(case: str, p: Params, tmp_path: Path) -> dict[str, Any]:
    per_rank = run_distributed(_step_rank, p["world"], tmp_path, case, p, tmp_path)
    return {
        **by_rank([results for results, _ in per_rank]),
        "expected": {f"rank{rank}": plain for rank, (_, plain) in enumerate(per_rank)},
    }


def _step_rank(case: str, p: Params, tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from dinov3 import distributed

    rank = distributed.get_rank()
    if "subgroups" in p:
        distributed.new_subgroups(p["subgroups"])
    folder = tmp_path / f"rank{rank}"
    folder.mkdir()
    mask_samples = p["data"]["global_batch_size"] // distributed.get_subgroup_size()
    return _step(case, p, folder, rank, mask_samples)


def _step(
    case: str, p: Params, tmp_path: Path, rank: int, mask_samples: int | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by output name, and the orders and absences that are stored as plain data."""
    iteration = p.get("iteration", 0)
    with registered(archs_of(p)):
        cfg = build_config(p, tmp_path)
        model = build_model(cfg, p.get("meta", "SSLMetaArch"))
    batch = build_batch(cfg, p["data"], f"{case}.it0.rank{rank}", mask_samples)  # `iteration` selects weights only
    teacher, student = _record(model, "get_teacher_output"), _record(model, "get_student_output")
    loss, metrics = model.forward_backward(batch, teacher_temp=p["teacher_temp"], iteration=iteration)

    params = dict(model.student.named_parameters())
    grads = {name: param.grad for name, param in params.items() if param.grad is not None}
    results = {"total_loss": loss, "metrics": torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)}
    results["grad_norms"] = torch.stack([grad.norm() for grad in grads.values()])
    results |= {f"grad.{name}": grad.flatten()[:N_FIRST_OF_GRADIENT] for name, grad in grads.items()}
    results |= _first_values("", teacher[0])
    for name, outputs in zip(("global", "local"), student[0], strict=True):
        results |= _first_values(f"student_{name}_", outputs)
    plain = {
        "metrics": list(metrics),
        "params": list(params),
        "no_grad": [name for name in params if name not in grads],
    }
    return {name: value.detach() for name, value in results.items()}, plain


def _first_values(prefix: str, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.flatten()[:N_FIRST_OF_OUTPUT] for name, value in outputs.items()}


def _record(model: Any, method: str) -> list[Any]:
    """What calls of a method of this model return, as they happen."""
    results: list[Any] = []
    original = getattr(model, method)

    def recording(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    setattr(model, method, recording)
    return results


def trajectory(case: str, p: Params, tmp_path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from dinov3.configs import apply_scaling_rules_to_cfg
    from dinov3.train.loop import TrainingRun

    with registered(archs_of(p)):
        cfg = build_config(p, tmp_path)
        apply_scaling_rules_to_cfg(cfg)
        model = build_model(cfg)
        if model.gram_teacher is not None:  # the loop reads its first weights from a file
            weights = tmp_path / "gram.pth"
            torch.save({"teacher": model.gram_teacher.state_dict()}, weights)
            cfg = OmegaConf.merge(cfg, {"gram": {"ckpt": str(weights)}})
            model = build_model(cfg)
    run = TrainingRun(cfg, model, resume=False)
    fill_parts(model)

    clip_order = list(model.student)
    losses, grad_norms, gram_updates_after = [], [], []
    for iteration in range(p["iterations"]):
        if model.gram_lifecycle.loads_ema_before(iteration):
            model.gram_load_ema_teacher()
        n_updates = run.n_gram_updates
        metrics = run.step(iteration, build_batch(cfg, p["data"], f"{case}.it{iteration}.rank0"))
        norms = {name: float(metrics.pop(f"{name}_grad_norm")) for name in clip_order}
        scheduled = {name: metrics.pop(name) for name in ("lr", "wd", "mom", "last_layer_lr")}
        assert len(scheduled) == 4
        for monitor in ("teacher_entropy", "feature_rank"):  # which this package adds
            metrics.pop(monitor, None)
        metrics["total_loss"] = metrics.pop("total_loss")  # the loop puts it first
        losses.append([float(value) for value in metrics.values()])
        grad_norms.append(list(norms.values()))
        if run.n_gram_updates > n_updates:
            gram_updates_after.append(iteration)

    networks = {name: dict(part.named_parameters()) for name, part in distinct_parts(model)}
    results: dict[str, Any] = {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "grad_norms": torch.tensor(grad_norms, dtype=torch.float64),
    }
    for name, params in networks.items():
        results[f"{name}.norms"] = torch.stack([param.detach().norm() for param in params.values()])
        results[f"{name}.first"] = torch.cat(
            [param.detach().flatten()[:N_FIRST_OF_PARAMETER] for param in params.values()]
        )
    groups = run.optimizer.param_groups
    results["expected"] = {
        "metrics": list(metrics),
        "clip_order": clip_order,
        "params": {name: list(params) for name, params in networks.items()},
        "gram_updates_after": gram_updates_after,
        "last_lr_wd_size": [[group["lr"], group["weight_decay"], len(group["params"])] for group in groups],
    }
    return results


KINDS = {fn.__name__: fn for fn in (step, step_multi, trajectory)}
