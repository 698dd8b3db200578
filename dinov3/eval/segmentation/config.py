"""Configuration of semantic segmentation: plain dataclasses, the single source of keys and defaults.

Which combinations make sense is for the code that uses them; YAML files with published settings are in `configs/`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dinov3.configs.model import ModelConfig
from dinov3.models.features import BackboneLayersSet

DEFAULT_MEAN = (123.675, 116.28, 103.53)
"""Of red, green and blue over ImageNet, for values in [0, 255]."""
DEFAULT_STD = (58.395, 57.12, 57.375)
"""Likewise."""

# OmegaConf's mark of a value that must be given; written out, since code at this level works without OmegaConf.
_MANDATORY = "???"


class ModelDtype(Enum):
    """What the frozen backbone and the head compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass
class OptimizerConfig:
    """AdamW, and the bound of the gradient's norm. Norms and embeddings of Mask2Former have no weight decay."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-2
    gradient_clip: float = 35.0
    """Largest norm of the gradient of all parameters together; `inf`: no bound."""


@dataclass
class SchedulerConfig:
    """Learning rate over the training."""

    type: str = "WarmupOneCycleLR"
    """A class of `optim.lr_schedulers`."""
    total_iter: int = 40_000
    """Number of optimizer steps."""
    constructor_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetsConfig:
    """Dataset strings, completed by `:root=<root>`."""

    root: str = _MANDATORY
    train: str = ""
    val: str = ""


@dataclass
class DecoderConfig:
    """The head, and what it sees of the backbone."""

    type: str = "m2f"
    """`linear` or `m2f` (Mask2Former behind a ViT-Adapter)."""
    backbone_out_layers: BackboneLayersSet = BackboneLayersSet.LAST
    use_batchnorm: bool = True
    """Linear head: normalise features over the batch."""
    use_cls_token: bool = False
    """Linear head: add the class token to every position."""
    use_backbone_norm: bool = True
    """Apply the backbone's final norm to the features of every layer."""
    num_classes: int = 150
    hidden_dim: int = 2048
    """Width of the Mask2Former head."""
    dropout: float = 0.1
    """Linear head: probability that a channel is dropped."""


@dataclass
class TrainTransformConfig:
    """Training images. Sizes in pixels."""

    img_size: Any = None
    """Shorter side, or [height, width]; None: as they are."""
    random_img_size_ratio_range: tuple[float, ...] | None = None
    """Bounds of a random factor of `img_size`."""
    crop_size: tuple[int, ...] | None = None
    """[height, width]."""
    flip_prob: float = 0.0


@dataclass
class EvalTransformConfig:
    """Evaluation images. Sizes in pixels."""

    img_size: Any = None
    """Shorter side, or [height, width]; None: as they are."""
    tta_ratios: tuple[float, ...] = (1.0,)
    """Factors of the size, one view each, with `eval.use_tta`."""


@dataclass
class TransformsConfig:
    """From images and labels to tensors."""

    train: TrainTransformConfig = field(default_factory=TrainTransformConfig)
    eval: EvalTransformConfig = field(default_factory=EvalTransformConfig)
    mean: tuple[float, ...] = DEFAULT_MEAN
    std: tuple[float, ...] = DEFAULT_STD


@dataclass
class Mask2FormerLossConfig:
    """Losses of Mask2Former, and the costs that its queries are assigned to segments by; see `mask2former_loss`."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    """Weight of queries without segment in the classification."""
    n_points: int = 12544
    """Points that masks are compared at, 112 * 112."""
    oversample_ratio: float = 3.0
    """So many times more points are looked at, to find uncertain ones."""
    importance_sample_ratio: float = 0.75
    """Part of the points that are the least certain ones."""


@dataclass
class TrainConfig:
    """Losses, and what is saved. Dice replaces cross-entropy (linear head) when its weight is positive."""

    diceloss_weight: float = 0.0
    celoss_weight: float = 1.0
    m2f: Mask2FormerLossConfig = field(default_factory=Mask2FormerLossConfig)
    checkpoint_interval: int | None = None
    """Training steps between checkpoints; None: `eval.eval_interval`."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder."""


@dataclass
class EvalConfig:
    """How predictions are made and measured. Sizes in pixels."""

    compute_metric_per_image: bool = False
    """Average the metrics of single images instead of measuring all pixels together."""
    reduce_zero_label: bool = True
    """Labels count from 1 and 0 is unlabelled, as in ADE20K."""
    mode: str = "slide"
    """`slide`: windows over the image; `whole`: the image in one forward."""
    crop_size: int | None = 512
    """Side of the windows."""
    stride: int | None = 341
    """Step between windows."""
    eval_interval: int = 40_000
    """Training steps between evaluations."""
    use_tta: bool = False
    """Average over the sizes `transforms.eval.tta_ratios` and their mirror images."""
    n_pictures: int = 8
    """Images of the validation set to draw in the end: image, truth, prediction."""


@dataclass
class SegmentationConfig:
    """Training of a head, or evaluation of a trained one with `load_from`."""

    model: ModelConfig | None = None
    """The frozen backbone; may be absent with `load_from=dinov3_vit7b16_ms`."""
    bs: int = 2
    """Images per process and step."""
    n_gpus: int = 8
    """Number of GPUs the settings were chosen for (information only)."""
    num_workers: int = 6
    model_dtype: ModelDtype = ModelDtype.FLOAT32
    seed: int = 100
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    metric_to_save: str = "mIoU"
    """Decides which evaluation is the best."""
    decoder_head: DecoderConfig = field(default_factory=DecoderConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    transforms: TransformsConfig = field(default_factory=TransformsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str | None = None
    load_from: str | None = None
    """Evaluate this head instead of training one: `dinov3_vit7b16_ms`, or a file."""
