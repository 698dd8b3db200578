"""Every key of a training configuration: type, default and meaning. The single source of defaults.

`ssl_default_config.yaml` repeats the defaults for people who read YAML (a test keeps it equal). Keys that old files
carry and nothing reads are in `legacy.py`. This module needs nothing but Python.

A field whose default is `ABSENT` is known, but not part of the defaults: `"schedules" in cfg` tells whether a file has
it. "v1" marks keys that count only without a section `schedules`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


class _Absent:
    """The default of a key that is known, but not part of the defaults."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()


_DEFAULTS_OF_SECTION = object()


def _section(cls: type, *, default: Any = _DEFAULTS_OF_SECTION, repeated: bool = False) -> Any:
    """A field that holds the keys of `cls` (a list of such mappings if `repeated`)."""
    metadata = {"section": cls, "repeated": repeated}
    if default is _DEFAULTS_OF_SECTION:
        return field(default_factory=cls, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Model:
    """`MODEL`: which training."""

    META_ARCHITECTURE: str = "SSLMetaArch"
    """`SSLMetaArch` (one student), `MultiDistillationMetaArch` (several students of one frozen teacher), or
    `FeatureDistillation` (a student that learns the features of a backbone without heads)."""


@dataclass
class ComputePrecision:
    """`compute_precision`: dtypes of the computation. Parameters, EMA and optimizer state are always float32."""

    param_dtype: str = "bf16"
    """fp32, fp16 or bf16: dtype of batches, forward and backward. CPUs without such instructions use fp32 instead."""
    reduce_dtype: str = "fp32"
    """fp32, fp16 or bf16: dtype in which gradients are summed over processes."""
    sharding_strategy: str = "SHARD_GRAD_OP"
    """Must keep this value. The name is historical: parameters are resharded after the forward pass as well."""


@dataclass
class Schedule:
    """A schedule: linear from start to peak, cosine from peak to end, then constant."""

    start: float = ABSENT
    """Value at iteration 0."""
    peak: float = ABSENT
    """Value after the warm-up."""
    end: float = ABSENT
    """Final value."""
    warmup_epochs: float = ABSENT
    """Length of the linear part in epochs."""
    cosine_epochs: float | None = ABSENT
    """Length of the cosine part in epochs; default: all that remain."""


@dataclass
class WeightSchedule(Schedule):
    """The schedule of a loss weight, with defaults."""

    start: float = 0.5
    peak: float = 0.5
    end: float = 0.5
    warmup_epochs: float = 0


@dataclass
class Dino:
    """`dino`: loss on the CLS token, its head, and KoLeo."""

    loss_weight: float = 1.0
    """Weight of the DINO loss."""
    global_ignore_diagonal: bool = True
    """Leave out the pairs of the same crop in the loss between global crops."""
    head_n_prototypes: int = 65536
    """Outputs of the head."""
    head_bottleneck_dim: int = 256
    """Width before the last layer."""
    head_nlayers: int = 3
    """Linear layers of the head's MLP."""
    head_hidden_dim: int = 2048
    """Width of the MLP."""
    koleo_loss_weight: float = 0.1
    """Weight of KoLeo, per global crop; 0.1 spreads the features of a batch."""
    koleo_loss_distributed: bool = False
    """Look for nearest neighbours among the samples of several processes."""
    koleo_topk: int = 1
    """Neighbours per sample; other values than 1 need `koleo_loss_distributed`."""
    koleo_distributed_replicas: int = 0
    """Must be 0 with `koleo_loss_distributed`."""
    koleo_distributed_loss_group_size: int | None = None
    """Samples among which neighbours are looked for; null: the global batch."""
    reweight_dino_local_loss: bool = False
    """Multiply the loss of the local crops by the schedule below."""
    local_loss_weight_schedule: WeightSchedule = _section(WeightSchedule)
    """Weight of the loss of the local crops, in epochs."""


@dataclass
class Ibot:
    """`ibot`: loss on masked patches and its head."""

    loss_weight: float = 1.0
    """Weight of the iBOT loss."""
    mask_sample_probability: float = 0.5
    """Fraction of the global crops that are masked."""
    mask_ratio_min_max: list[float] = field(default_factory=lambda: [0.1, 0.5])
    """Range of the fraction of masked patches of such a crop."""
    mask_random_circular_shift: bool = False
    """Roll the masks by a random offset."""
    separate_head: bool = True
    """Must be true: iBOT has a head of its own."""
    head_n_prototypes: int = 65536
    """Outputs of the head."""
    head_bottleneck_dim: int = 256
    """Width before the last layer."""
    head_nlayers: int = 3
    """Linear layers of the head's MLP."""
    head_hidden_dim: int = 2048
    """Width of the MLP."""


@dataclass
class Gram:
    """`gram`: keeping patch similarities near those of an earlier teacher (paper, section 4)."""

    use_loss: bool = False
    """Whether there is a Gram loss."""
    compute_stats: bool = False
    """Log the loss on masked and unmasked patches separately."""
    loss_weight: float = 1.0
    """Weight of the loss, without `loss_weight_schedule`."""
    ema_teacher: bool = False
    """Use the EMA teacher itself as Gram teacher."""
    ckpt: str | None = None
    """Weights of the Gram teacher: whatever `student.pretrained_weights` may be, or a DCP directory."""
    it_load_ema_teacher: int = -1
    """Iteration at whose start the EMA teacher is copied into the Gram teacher; negative: never."""
    rep_update: bool = True
    """Refresh the Gram teacher from the EMA teacher repeatedly."""
    update_frequency: int = 50000
    """Iterations between refreshes."""
    it_first_update: int = 0
    """Iterations before the first refresh."""
    max_updates: int | None = None
    """Number of refreshes; null: no limit."""
    normalized: bool = True
    """L2-normalise patch features before comparing."""
    img_level: bool = False
    """Compare patches within each image; false: within the whole batch of the process."""
    remove_neg: bool = False
    """Set negative similarities of both to 0."""
    remove_only_teacher_neg: bool = False
    """Set negative similarities of the target to 0."""
    tokens_used: str = "all"
    """all, masked or unmasked patches; the last two need `img_level: false`."""
    global_teacher_resize_method: str = "bicubic"
    """Interpolation from the Gram teacher's patch grid to the student's."""
    global_teacher_resize_antialias: bool = False
    """Smooth when that makes the grid smaller."""
    loss_weight_schedule: Schedule | None = _section(Schedule, default=None)
    """Weight of the loss over time, in epochs; null: constant."""


@dataclass
class Train:
    """`train`: data, batch and execution."""

    batch_size_per_gpu: int = 64
    """Images per process and iteration."""
    dataset_path: str | None = "ImageNet:split=TRAIN"
    """Dataset string, such as `ImageFolder:root=<folder>`."""
    output_dir: str = "."
    """Set from `--output-dir`."""
    seed: int = 0
    """Seed of the data order, crops and masks (`--seed` is that of weights and of the processes)."""
    num_workers: int = 10
    """Processes that load data, per process that trains."""
    OFFICIAL_EPOCH_LENGTH: int = 1250
    """Iterations that count as one epoch."""
    centering: str = "sinkhorn_knopp"
    """Must keep this value."""
    checkpointing: bool = False
    """Activation checkpointing of the student's blocks: less memory, more time."""
    checkpointing_full: bool = False
    """Recompute everything, instead of all but the results of matrix products and attention."""
    compile: bool = True
    """Compile blocks and heads with `torch.compile`."""
    cudagraphs: bool = False
    """Record the compiled blocks of ViTs as CUDA graphs."""
    sharded_eval_checkpoint: bool = False
    """Export the teacher as a DCP directory instead of a file."""
    cache_dataset: bool = False
    """Give each process a fixed shard of the data, so that it can cache it."""
    sinks: list[str] = ABSENT
    """Further places for metrics: tensorboard, wandb, mlflow. One that fails is closed, the training goes on."""
    gradient_accumulation: int = ABSENT
    """Parts in which a process computes its batch, one after the other (1): less memory, the same number of images."""


@dataclass
class Student:
    """`student`: the trained backbone. The EMA teacher has the same architecture."""

    arch: str = "vit_large"
    """Function of `dinov3.models.vision_transformer`, or a size of ConvNeXt."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    drop_path_rate: float = 0.3
    """Stochastic depth; the student's only."""
    layerscale: float | None = 1.0e-05
    """First value of the layer scale."""
    ffn_layer: str = "mlp"
    """mlp, swiglu, swiglu32, swiglu64 or swiglu128."""
    ffn_ratio: float = 4.0
    """Fixed by the architecture; another value is warned of."""
    resume_from_teacher_chkpt: str = ""
    """Teacher to start from, heads included: a teacher checkpoint or a DCP directory, of the same network."""
    pretrained_weights: str = ""
    """Backbone to start from, with fresh heads: hub name, file, Hugging Face folder or name, or teacher checkpoint."""
    frozen_blocks: int = ABSENT
    """First blocks that don't learn, nor do patch embedding and tokens then (0); ViTs only."""
    qkv_bias: bool = True
    """Bias of the projections to queries, keys and values."""
    proj_bias: bool = True
    """Bias of the projection after attention."""
    ffn_bias: bool = True
    """Biases of the feed-forward layers."""
    norm_layer: str = "layernorm"
    """layernorm, layernormbf16 or rmsnorm."""
    n_storage_tokens: int = 0
    """Storage (register) tokens."""
    mask_k_bias: bool = False
    """Keep the bias of the keys at zero."""
    untie_cls_and_patch_norms: bool = False
    """A final norm of its own for CLS and storage tokens."""
    untie_global_and_local_cls_norm: bool = False
    """A final norm of its own for the CLS token of local crops."""
    in_chans: int = 3
    """Channels of the images."""
    pos_embed_rope_base: float | None = 100.0
    """Base of the RoPE periods; null if `min_period` and `max_period` are given."""
    pos_embed_rope_min_period: float | None = None
    """Shortest RoPE period."""
    pos_embed_rope_max_period: float | None = None
    """Longest RoPE period."""
    pos_embed_rope_normalize_coords: str = "separate"
    """min, max or separate: which side of the grid spans [-1, 1]."""
    pos_embed_rope_shift_coords: float | None = None
    """Training: shift coordinates by up to this."""
    pos_embed_rope_jitter_coords: float | None = None
    """Training: scale each axis by up to this factor, at random."""
    pos_embed_rope_rescale_coords: float | None = None
    """Training: scale both axes by up to this factor, at random."""
    pos_embed_rope_dtype: str = "bf16"
    """fp32, fp16 or bf16: dtype of the position tables."""
    fp8_enabled: bool = False
    """Linear layers in float8 (needs a GPU that can, and widths that are multiples of 64)."""
    fp8_filter: str = "blocks"
    """Regular expression on the names of the modules that use float8."""


@dataclass
class Teacher:
    """`teacher`: the EMA teacher (v1)."""

    momentum_teacher: float | None = 0.992
    """v1: first EMA momentum."""
    final_momentum_teacher: float | None = 1
    """v1: last EMA momentum."""
    warmup_teacher_temp: float | None = 0.04
    """v1: first temperature."""
    teacher_temp: float | None = 0.07
    """v1: temperature after the warm-up."""
    warmup_teacher_temp_epochs: float | None = 30
    """v1: length of that warm-up in epochs."""


@dataclass
class Distillation:
    """`distillation`: a frozen teacher instead of the EMA teacher."""

    enabled: bool = False
    """Distil from a frozen teacher."""
    full_cfg_path: str = ""
    """The teacher's configuration file, merged over the defaults; relative to the working directory."""
    checkpoint_path: str = ""
    """The teacher's weights, or `ignore`: random ones."""
    cls_loss_weight: float = ABSENT
    """`FeatureDistillation`: weight of the loss on class tokens (1)."""
    patch_loss_weight: float = ABSENT
    """`FeatureDistillation`: weight of the loss on patch tokens (1)."""


@dataclass
class DistilledStudent:
    """One entry of `multidistillation.students`."""

    name: str = ABSENT
    """Name of its folder below the output folder."""
    config_path: str = ABSENT
    """Its configuration file, relative to the working directory."""
    ranks_range: list[int] = ABSENT
    """[first, last): the processes that train it."""


@dataclass
class MultiDistillation:
    """`multidistillation`: several students in one job, one per subgroup of processes."""

    enabled: bool = False
    """Train several students."""
    global_batch_size: int = ABSENT
    """Images per iteration, the same for each student."""
    students: list[DistilledStudent] = _section(DistilledStudent, default=ABSENT, repeated=True)
    """The students."""


@dataclass
class Optim:
    """`optim`: AdamW and its schedules."""

    epochs: int = 100
    """Length of the training, in epochs of `train.OFFICIAL_EPOCH_LENGTH` iterations."""
    weight_decay: float | None = 0.04
    """v1: first weight decay."""
    weight_decay_end: float | None = 0.4
    """v1: last weight decay."""
    lr: float | None = 0.001
    """v1: learning rate after the warm-up, before `scaling_rule`."""
    warmup_epochs: float | None = 10
    """v1: length of the learning rate's warm-up."""
    min_lr: float | None = 1.0e-06
    """v1: last learning rate."""
    schedule_trunc_extra: float | None = 0.0
    """v1: stretch the cosine by this fraction and cut it off."""
    clip_grad: float | None = 3.0
    """Largest gradient norm, of backbone and heads separately; 0 or null: no clipping."""
    freeze_backbone_epochs: float = ABSENT
    """Epochs at the beginning in which the heads learn and the backbone doesn't (0)."""
    freeze_last_layer_epochs: float | None = 1
    """v1: epochs in which the last layers of the heads don't learn."""
    scaling_rule: str | None = "sqrt_wrt_1024"
    """sqrt_wrt_1024 or linear_wrt_256: how the learning rate follows the global batch; anything else: not."""
    patch_embed_lr_mult: float = 0.2
    """Factor on the learning rate of the patch embedding."""
    dino_head_wd_multiplier: float = 1.0
    """Factor on the weight decay of the DINO head."""
    layerwise_decay: float = 0.9
    """Factor on the learning rate per layer, from the last to the first."""
    multi_tensor_optim: bool = True
    """Merge equal parameter groups and update their tensors together."""
    adamw_beta1: float = 0.9
    """Decay of the first moment."""
    adamw_beta2: float = 0.999
    """Decay of the second moment."""


@dataclass
class Crops:
    """`crops`: the views of an image. Sizes may be lists of equal length: several resolutions, one per iteration."""

    global_crops_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])
    """Range of the area of a global crop, as a fraction of the image."""
    local_crops_number: int = 8
    """Local crops per image."""
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    """Range of the area of a local crop."""
    global_crops_size: int | list[int] = 224
    """Side of a global crop in pixels."""
    local_crops_size: int | list[int] = 96
    """Side of a local crop in pixels."""
    global_local_crop_pairs_ratios: float | list[float] = 1.0
    """How often each resolution is drawn; sums to 1."""
    gram_teacher_crops_size: int | list[int | None] | None = None
    """Side of the Gram teacher's crops in pixels; null: none are made (several resolutions: a null for each)."""
    localcrops_subset_of_globalcrops: bool = False
    """Cut local crops out of global ones."""
    share_color_jitter: bool = False
    """The same colours in all views of an image."""
    horizontal_flips: bool = True
    """Flip views at random."""
    gram_teacher_no_distortions: bool = False
    """No colour changes and blur in the Gram teacher's crops."""
    rgb_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Subtracted from the channels (of values in [0, 1])."""
    rgb_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """The channels are divided by it."""
    teacher_to_student_resolution_scale: float = 1.0
    """Distillation: the teacher sees global crops of 1 / this resolution."""
    augmentation: str = ABSENT
    """Who computes the crops: "tensor", quick (the default); "pil", by Pillow as for the released models, equal
    up to rounding; "device", distortions in batches on the accelerator."""


@dataclass
class OnlineKnnOptions:
    """`evaluation.online_knn`: k-NN accuracy of the EMA teacher during the training."""

    train_dataset: str = ABSENT
    """Dataset string of the labelled images among which neighbours are looked for."""
    val_dataset: str = ABSENT
    """Dataset string of the labelled images that are classified."""
    period: int = 1250
    """Iterations between evaluations."""
    k: int = 20
    """Neighbours that vote."""
    batch_size: int = 64
    """Images per process and forward pass."""
    resize_size: int = 256
    """Shorter side of the images in pixels."""
    crop_size: int = 224
    """Side of the central crop in pixels."""


@dataclass
class Evaluation:
    """`evaluation`: exports of the teacher, and what is measured on it during the training."""

    eval_period_iterations: int = 12500
    """Iterations between exports; 0 or less: only at the end."""
    online_knn: OnlineKnnOptions = _section(OnlineKnnOptions, default=ABSENT)
    """Absent: no such evaluation."""


@dataclass
class Checkpointing:
    """`checkpointing`: what a killed run continues from."""

    period: int = 3750
    """Iterations between checkpoints."""
    max_to_keep: int | None = 3
    """Newest checkpoints that are kept; null: all."""
    keep_every: int = 99999999999999999
    """Iterations between checkpoints that are kept for good."""
    in_background: bool = ABSENT
    """Write checkpoints beside the training (true), from one more copy of the state in the CPU's memory."""


@dataclass
class LrSchedule(Schedule):
    """`schedules.lr`; `peak` and `end` are scaled by `optim.scaling_rule`."""

    freeze_last_layer_epochs: float = ABSENT
    """Epochs in which the last layers of the heads don't learn."""


@dataclass
class Schedules:
    """`schedules` (v2): replaces the keys marked v1 in `optim` and `teacher`."""

    lr: LrSchedule = _section(LrSchedule, default=ABSENT)
    """Learning rate."""
    weight_decay: Schedule = _section(Schedule, default=ABSENT)
    """Weight decay."""
    momentum: Schedule = _section(Schedule, default=ABSENT)
    """EMA momentum of the teacher."""
    teacher_temp: Schedule = _section(Schedule, default=ABSENT)
    """Temperature of the teacher."""


@dataclass
class SSLConfig:
    """A whole training configuration."""

    MODEL: Model = _section(Model)
    """Which training."""
    compute_precision: ComputePrecision = _section(ComputePrecision)
    """Dtypes."""
    dino: Dino = _section(Dino)
    """Loss on the CLS token, and KoLeo."""
    ibot: Ibot = _section(Ibot)
    """Loss on masked patches."""
    gram: Gram = _section(Gram)
    """Gram anchoring."""
    train: Train = _section(Train)
    """Data, batch and execution."""
    student: Student = _section(Student)
    """The trained backbone."""
    teacher: Teacher = _section(Teacher)
    """The EMA teacher (v1)."""
    distillation: Distillation = _section(Distillation)
    """A frozen teacher."""
    multidistillation: MultiDistillation = _section(MultiDistillation)
    """Several students."""
    optim: Optim = _section(Optim)
    """AdamW and its schedules."""
    crops: Crops = _section(Crops)
    """The views of an image."""
    evaluation: Evaluation = _section(Evaluation)
    """Exports of the teacher."""
    checkpointing: Checkpointing = _section(Checkpointing)
    """Checkpoints."""
    schedules: Schedules = _section(Schedules, default=ABSENT)
    """Schedules (v2); the keys marked v1 count if there is no such section."""


def default_values(section: Any = None) -> dict[str, Any]:
    """The defaults as nested plain data, without the keys that are absent by default and without legacy keys.

    Args:
        section: an instance of one of the classes above; default: a whole configuration.
    """
    section = SSLConfig() if section is None else section
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if value is ABSENT:
            continue
        values[spec.name] = default_values(value) if dataclasses.is_dataclass(value) else value
    return values


def known_keys(cls: type = SSLConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys; those of list entries contain `[]`, as `multidistillation.students[].name`."""
    for spec in dataclasses.fields(cls):
        yield prefix + spec.name
        section = spec.metadata.get("section")
        if section is not None:
            yield from known_keys(section, f"{prefix}{spec.name}{'[]' if spec.metadata['repeated'] else ''}.")


def unknown_keys(config: Mapping[str, Any], cls: type = SSLConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all entries of a nested configuration that the schema doesn't have."""
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    for name, value in config.items():
        key, spec = f"{prefix}{name}", specs.get(str(name))
        if spec is None:
            yield key, value
            continue
        section = spec.metadata.get("section")
        if section is None:
            continue
        if spec.metadata["repeated"] and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from unknown_keys(item, section, f"{key}[{i}].")
        elif isinstance(value, Mapping):
            yield from unknown_keys(value, section, f"{key}.")
