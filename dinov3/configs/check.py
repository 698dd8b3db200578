"""What is wrong with a training configuration, all of it at once, before anything expensive starts.

The checks know keys and numbers only. What needs other knowledge is checked where that is: names of architectures in
`models`, dataset strings in `data`, the number of processes in `distributed`.
"""

import dataclasses
import logging
import math
import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any

from dinov3.configs import schema
from dinov3.configs.multidistillation import DistillationPlan
from dinov3.configs.schema import SSLConfig

logger = logging.getLogger("dinov3")

Config = Mapping[str, Any]

DTYPES = ("fp32", "fp16", "bf16")
SCHEDULES = ("lr", "weight_decay", "momentum", "teacher_temp")
V1_OPTIM = (
    "lr",
    "min_lr",
    "warmup_epochs",
    "weight_decay",
    "weight_decay_end",
    "schedule_trunc_extra",
    "freeze_last_layer_epochs",
)
V1_TEACHER = (
    "momentum_teacher",
    "final_momentum_teacher",
    "warmup_teacher_temp",
    "teacher_temp",
    "warmup_teacher_temp_epochs",
)
RESOLUTION_KEYS = (
    "global_crops_size",
    "local_crops_size",
    "gram_teacher_crops_size",
    "global_local_crop_pairs_ratios",
)


def check_config(cfg: Any) -> None:
    """Refuse a configuration that contradicts itself; warn of settings that have no effect.

    Args:
        cfg: a merged training configuration (OmegaConf or nested mappings).

    Raises:
        ValueError: one line per problem, each naming its keys.
    """
    plain = _to_plain(cfg)
    found = list(_wrong_types(plain)) or list(_contradictions(plain))
    if found:
        raise ValueError("the configuration can't be used:\n" + "\n".join(f"- {problem}" for problem in found))
    for remark in _without_effect(plain):
        logger.warning("%s", remark)


def _to_plain(cfg: Any) -> Any:
    if isinstance(cfg, dict):
        return cfg
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)


# -- Types ------------------------------------------------------------------------------------------------------------


def _wrong_types(cfg: Config, cls: type = SSLConfig, prefix: str = "", optional: bool = False) -> Iterator[str]:
    """Values of another type than the schema says, sections and keys that are missing (unless all are `optional`)."""
    types = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        key, section = f"{prefix}{spec.name}", spec.metadata.get("section")
        if spec.name not in cfg:
            if spec.default is not schema.ABSENT and not optional:
                yield f"{key} is missing: merge the file over the defaults (get_cfg_from_args does)"
            continue
        value = cfg[spec.name]
        if section is not None and not spec.metadata["repeated"]:
            if isinstance(value, Mapping):
                in_defaults = spec.default is dataclasses.MISSING
                yield from _wrong_types(value, section, f"{key}.", optional=not in_defaults)
            elif not (value is None and spec.default is None):
                yield f"{key} must be a section with keys of its own, got {value!r}"
        elif section is None and not _fits(value, types[spec.name]):
            yield f"{key} must be {_name(types[spec.name])}, got {value!r}"


def _fits(value: Any, expected: Any) -> bool:
    if isinstance(expected, UnionType):
        return any(_fits(value, option) for option in typing.get_args(expected))
    if typing.get_origin(expected) is list:
        (item,) = typing.get_args(expected)
        return isinstance(value, list) and all(_fits(entry, item) for entry in value)
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    if expected is float:
        return isinstance(value, int | float)
    return isinstance(value, expected)


def _name(expected: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    if isinstance(expected, UnionType):
        return " or ".join(_name(option) for option in typing.get_args(expected))
    if typing.get_origin(expected) is list:
        return f"a list (each entry {_name(typing.get_args(expected)[0])})"
    return names[expected]


# -- Contradictions ---------------------------------------------------------------------------------------------------


def _contradictions(cfg: Config) -> Iterator[str]:
    yield from _placeholders(cfg)
    yield from _execution(cfg)
    yield from _losses(cfg)
    yield from _masking(cfg["ibot"])
    yield from _crops(cfg)
    yield from _student(cfg["student"])
    yield from _training_schedules(cfg)
    yield from _loss_schedules(cfg)
    if cfg["gram"]["use_loss"]:
        yield from _gram(cfg)
    yield from _distillation(cfg)


def _placeholders(cfg: Config, prefix: str = "") -> Iterator[str]:
    """Recipes leave paths as `<WHAT/BELONGS/HERE>`."""
    for name, value in cfg.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _placeholders(value, f"{key}.")
        elif isinstance(value, list):
            yield from _placeholders({f"{i}": item for i, item in enumerate(value)}, f"{key}.")
        elif isinstance(value, str) and value.startswith("<") and value.endswith(">"):
            yield f"{key} is the placeholder {value}: give the value on the command line"


def _execution(cfg: Config) -> Iterator[str]:
    train, precision = cfg["train"], cfg["compute_precision"]
    yield from _one_of("MODEL.META_ARCHITECTURE", cfg["MODEL"]["META_ARCHITECTURE"], _META_ARCHITECTURES)
    yield from _one_of("train.centering", train["centering"], ("sinkhorn_knopp",))
    yield from _one_of("compute_precision.sharding_strategy", precision["sharding_strategy"], ("SHARD_GRAD_OP",))
    for key in ("param_dtype", "reduce_dtype"):
        yield from _one_of(f"compute_precision.{key}", precision[key], DTYPES)
    if not train["dataset_path"]:
        yield "train.dataset_path is empty: name the data, such as train.dataset_path=ImageFolder:root=<folder>"
    positive = {
        "train.batch_size_per_gpu": train["batch_size_per_gpu"],
        "train.OFFICIAL_EPOCH_LENGTH": train["OFFICIAL_EPOCH_LENGTH"],
        "optim.epochs": cfg["optim"]["epochs"],
        "checkpointing.period": cfg["checkpointing"]["period"],
        "checkpointing.keep_every": cfg["checkpointing"]["keep_every"],
        "gram.update_frequency": cfg["gram"]["update_frequency"],
    }
    yield from (f"{key} must be positive, got {value}" for key, value in positive.items() if value <= 0)
    not_negative = {
        "train.num_workers": train["num_workers"],
        "checkpointing.max_to_keep": cfg["checkpointing"]["max_to_keep"] or 0,
        "optim.clip_grad": cfg["optim"]["clip_grad"] or 0,
    }
    yield from (f"{key} must not be negative, got {value}" for key, value in not_negative.items() if value < 0)


_META_ARCHITECTURES = ("SSLMetaArch", "MultiDistillationMetaArch", "FeatureDistillation")


def _losses(cfg: Config) -> Iterator[str]:
    dino, ibot = cfg["dino"], cfg["ibot"]
    if not ibot["separate_head"]:
        yield "ibot.separate_head must be true: a head shared with DINO isn't supported"
    if dino["koleo_loss_distributed"]:
        if dino["koleo_distributed_replicas"] != 0:
            yield "dino.koleo_distributed_replicas must be 0 with dino.koleo_loss_distributed"
        size, batch = dino["koleo_distributed_loss_group_size"], cfg["train"]["batch_size_per_gpu"]
        if size is not None and (size <= 0 or size % batch):
            yield (
                f"dino.koleo_distributed_loss_group_size {size} must be a multiple of train.batch_size_per_gpu {batch}"
            )
    elif dino["koleo_topk"] != 1:
        yield f"dino.koleo_topk is {dino['koleo_topk']}: other values than 1 need dino.koleo_loss_distributed: true"
    if dino["koleo_topk"] < 1:
        yield f"dino.koleo_topk must be positive, got {dino['koleo_topk']}"
    for name, section in (("dino", dino), ("ibot", ibot)):
        for key in ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim"):
            if section[key] <= 0:
                yield f"{name}.{key} must be positive, got {section[key]}"


def _masking(ibot: Config) -> Iterator[str]:
    ratios = ibot["mask_ratio_min_max"]
    if len(ratios) != 2 or not 0 <= ratios[0] < ratios[1] <= 1:
        yield f"ibot.mask_ratio_min_max must be [min, max] with 0 <= min < max <= 1, got {ratios}"
    if not 0 <= ibot["mask_sample_probability"] <= 1:
        yield f"ibot.mask_sample_probability must be in [0, 1], got {ibot['mask_sample_probability']}"


def _crops(cfg: Config) -> Iterator[str]:
    crops = cfg["crops"]
    if crops["local_crops_number"] <= 0:
        yield f"crops.local_crops_number must be positive, got {crops['local_crops_number']}"
    for key in ("global_crops_scale", "local_crops_scale"):
        scale = crops[key]
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            yield f"crops.{key} must be [min, max] with 0 < min <= max <= 1, got {scale}"
    for key in ("rgb_mean", "rgb_std"):
        if len(crops[key]) != cfg["student"]["in_chans"]:
            yield f"crops.{key} must have one entry per channel ({cfg['student']['in_chans']}), got {crops[key]}"
    scale = crops["teacher_to_student_resolution_scale"]
    if not 0 < scale < math.inf or cfg["student"]["patch_size"] > 0 and cfg["student"]["patch_size"] * scale < 1:
        yield f"crops.teacher_to_student_resolution_scale must leave patches of at least one pixel, got {scale}"
        return
    lengths = {f"crops.{key}": len(_as_list(crops[key])) for key in RESOLUTION_KEYS}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key}: {n}" for key, n in lengths.items())
        yield f"lists of crop sizes and ratios must have the same length (a single value counts as 1), got {counts}"
    yield from _ratios(_as_list(crops["global_local_crop_pairs_ratios"]))
    yield from _patch_multiples(cfg)


def _ratios(ratios: list[float]) -> Iterator[str]:
    if any(ratio < 0 for ratio in ratios) or not math.isclose(sum(ratios), 1, abs_tol=1e-6):
        yield f"crops.global_local_crop_pairs_ratios must be >= 0 and sum to 1, got {ratios} (sum {sum(ratios):g})"


def _patch_multiples(cfg: Config) -> Iterator[str]:
    """Masks and Gram features need crops that patches cover; local crops may lose their last pixels (see warnings)."""
    crops, patch = cfg["crops"], cfg["student"]["patch_size"]
    if patch <= 0:
        yield f"student.patch_size must be positive, got {patch}"
        return
    for key in ("global_crops_size", "local_crops_size", "gram_teacher_crops_size"):
        divisor = int(patch * crops["teacher_to_student_resolution_scale"]) if key == "global_crops_size" else patch
        for size in _as_list(crops[key]):
            if size is None:
                continue
            if size <= 0:
                yield f"crops.{key} must be positive, got {size}"
            elif size % divisor and key != "local_crops_size":
                near = size // divisor * divisor
                choice = f"{near} or {near + divisor}" if near else f"{divisor}"
                yield f"crops.{key} {size} is not a multiple of the patch size {divisor}: take {choice}"


def _student(student: Config) -> Iterator[str]:
    yield from _one_of("student.pos_embed_rope_dtype", student["pos_embed_rope_dtype"], DTYPES)
    normalize = student["pos_embed_rope_normalize_coords"]
    yield from _one_of("student.pos_embed_rope_normalize_coords", normalize, ("min", "max", "separate"))
    periods = [student["pos_embed_rope_min_period"], student["pos_embed_rope_max_period"]]
    given = [period is not None for period in periods]
    if any(given) != all(given) or (student["pos_embed_rope_base"] is None) != all(given):
        yield "give either student.pos_embed_rope_base or both student.pos_embed_rope_{min,max}_period, the other null"
    if student["pretrained_weights"] and student["resume_from_teacher_chkpt"]:
        yield "student.pretrained_weights and student.resume_from_teacher_chkpt exclude each other"
    if student.get("frozen_blocks", 0) < 0:
        yield f"student.frozen_blocks must not be negative, got {student['frozen_blocks']}"
    if not 0 <= student["drop_path_rate"] < 1:
        yield f"student.drop_path_rate must be in [0, 1), got {student['drop_path_rate']}"


def _training_schedules(cfg: Config) -> Iterator[str]:
    frozen, epochs = cfg["optim"].get("freeze_backbone_epochs", 0), cfg["optim"]["epochs"]
    if not 0 <= frozen <= epochs:
        yield f"optim.freeze_backbone_epochs must be between 0 and optim.epochs {epochs}, got {frozen}"
    if "schedules" not in cfg:
        for section, keys in (("optim", V1_OPTIM), ("teacher", V1_TEACHER)):
            nulls = [f"{section}.{key}" for key in keys if cfg[section][key] is None]
            if nulls:
                yield f"{', '.join(nulls)}: null is allowed only with a section `schedules`, which is missing"
        warmup = cfg["optim"]["warmup_epochs"] or 0
        if warmup > cfg["optim"]["epochs"]:
            yield f"optim.warmup_epochs {warmup} exceeds optim.epochs {cfg['optim']['epochs']}"
        return
    for name in SCHEDULES:
        schedule = cfg["schedules"].get(name)
        if schedule is None:
            yield f"schedules.{name} is missing: a section `schedules` needs {', '.join(SCHEDULES)}"
            continue
        wanted = ("start", "peak", "end", "warmup_epochs", *(("freeze_last_layer_epochs",) if name == "lr" else ()))
        missing = [key for key in wanted if key not in schedule]
        if missing:
            yield f"schedules.{name} lacks {', '.join(missing)}"
        else:
            yield from _lengths(f"schedules.{name}", schedule, cfg["optim"]["epochs"])


def _loss_schedules(cfg: Config) -> Iterator[str]:
    used = {}
    if cfg["dino"]["reweight_dino_local_loss"]:
        used["dino.local_loss_weight_schedule"] = cfg["dino"]["local_loss_weight_schedule"]
    if cfg["gram"]["use_loss"] and cfg["gram"]["loss_weight_schedule"] is not None:
        used["gram.loss_weight_schedule"] = cfg["gram"]["loss_weight_schedule"]
    for key, schedule in used.items():
        if missing := [name for name in ("start", "peak", "end", "warmup_epochs") if name not in schedule]:
            yield f"{key} lacks {', '.join(missing)}"
        else:
            yield from _lengths(key, schedule, cfg["optim"]["epochs"])


def _lengths(key: str, schedule: Config, epochs: float) -> Iterator[str]:
    warmup, cosine = schedule["warmup_epochs"], schedule.get("cosine_epochs") or 0
    if min(warmup, cosine) < 0 or warmup + cosine > epochs:
        yield (
            f"{key}: warmup_epochs {warmup} and cosine_epochs {cosine} must not be negative nor exceed "
            f"optim.epochs {epochs} together"
        )


def _gram(cfg: Config) -> Iterator[str]:
    gram, sizes = cfg["gram"], _as_list(cfg["crops"]["gram_teacher_crops_size"])
    yield from _one_of("gram.tokens_used", gram["tokens_used"], ("all", "masked", "unmasked"))
    if gram["tokens_used"] != "all" and gram["img_level"]:
        yield f"gram.tokens_used: {gram['tokens_used']} needs gram.img_level: false"
    if gram["remove_neg"] and gram["remove_only_teacher_neg"]:
        yield "gram.remove_neg and gram.remove_only_teacher_neg exclude each other"
    if gram["ema_teacher"]:
        if gram["ckpt"]:
            yield "gram.ema_teacher and gram.ckpt exclude each other"
        if gram["rep_update"]:
            yield "gram.ema_teacher needs gram.rep_update: false: the EMA teacher changes in each iteration anyway"
        if any(size is not None for size in sizes):
            yield "gram.ema_teacher needs crops.gram_teacher_crops_size: null: it sees the global crops"
        return
    if None in sizes:
        yield "gram.use_loss needs crops.gram_teacher_crops_size (or gram.ema_teacher)"
    if gram["ckpt"] == "ignore":
        yield "gram.ckpt is `ignore`: name the Gram teacher's weights on the command line, gram.ckpt=<file or folder>"
    elif not gram["ckpt"] and gram["it_load_ema_teacher"] < 0:
        yield "gram.use_loss needs gram.ckpt=<file or folder>, or gram.it_load_ema_teacher >= 0"


def _distillation(cfg: Config) -> Iterator[str]:
    distillation, multi = cfg["distillation"], cfg["multidistillation"]["enabled"]
    if distillation["enabled"]:
        teacher = distillation["full_cfg_path"]
        if not teacher and cfg["MODEL"]["META_ARCHITECTURE"] != "FeatureDistillation":
            yield "distillation.enabled needs distillation.full_cfg_path, the teacher's configuration file"
        if not distillation["checkpoint_path"]:
            yield "distillation.enabled needs distillation.checkpoint_path, its weights (`ignore`: random ones)"
    if cfg["MODEL"]["META_ARCHITECTURE"] == "FeatureDistillation":
        yield from _feature_distillation(cfg)
    if multi and not distillation["enabled"]:
        yield "multidistillation.enabled needs distillation.enabled: the students share a frozen teacher"
    if not multi:
        return
    if cfg["MODEL"]["META_ARCHITECTURE"] != "MultiDistillationMetaArch":
        yield "multidistillation.enabled needs MODEL.META_ARCHITECTURE: MultiDistillationMetaArch"
    if cfg["dino"]["koleo_loss_distributed"]:
        yield "multidistillation.enabled needs dino.koleo_loss_distributed: false"
    try:
        yield from DistillationPlan.from_config(cfg).problems()
    except ValueError as error:
        yield str(error)


def _feature_distillation(cfg: Config) -> Iterator[str]:
    if not cfg["distillation"]["enabled"]:
        yield "MODEL.META_ARCHITECTURE: FeatureDistillation needs distillation.enabled: true"
    if cfg["gram"]["use_loss"]:
        yield "MODEL.META_ARCHITECTURE: FeatureDistillation has no Gram loss: set gram.use_loss: false"
    if cfg["student"]["resume_from_teacher_chkpt"]:
        yield "MODEL.META_ARCHITECTURE: FeatureDistillation starts its student from student.pretrained_weights"
    weights = [cfg["distillation"].get(f"{kind}_loss_weight", 1.0) for kind in ("cls", "patch")]
    if min(weights) < 0 or not any(weights):
        yield f"distillation.cls_loss_weight and patch_loss_weight must be >= 0 and not both 0, got {weights}"


# -- Remarks ----------------------------------------------------------------------------------------------------------


def _without_effect(cfg: Config) -> Iterator[str]:
    train, crops, patch = cfg["train"], cfg["crops"], cfg["student"]["patch_size"]
    if train["checkpointing_full"] and not train["checkpointing"]:
        yield "train.checkpointing_full has no effect without train.checkpointing"
    if train["cudagraphs"] and not train["compile"]:
        yield "train.cudagraphs has no effect without train.compile"
    for size in _as_list(crops["local_crops_size"]):
        if "vit" in cfg["student"]["arch"] and size % patch:
            yield f"crops.local_crops_size {size} is not a multiple of student.patch_size {patch}: edge pixels are lost"


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        expected = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
        yield f"{key} must be {expected}, got {value!r}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
