r"""Configuration of depth: plain dataclasses, the single source of keys and defaults.

    # train a linear head on NYU Depth v2, then test it
    python dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu.yaml datasets.root=<NYU> \
        model.dino_hub=dinov3_vits16 output_dir=<OUT>

    # test the released DPT head
    python dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu-synthmix-dpt-inference.yaml \
        datasets.root=<NYU> load_from=dinov3_vit7b16_dd output_dir=<OUT>

Which combinations make sense is for the code that uses them; YAML files with published settings are in `configs/`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dinov3.configs.model import ModelConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue, for values in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Likewise."""


class PatchSizeAdaptationStrategy(Enum):
    """What to do with images whose sides are no multiples of the patch."""

    CENTER_PADDING = "center_padding"
    STRETCH = "stretch"
    NO_ADAPTATION = "never"


class ModelDtype(Enum):
    """What the frozen backbone and the head compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ResultExtension(Enum):
    """Files that show a prediction: a picture, or tensors."""

    JPG = "jpg"
    PNG = "png"
    PTH = "pth"


@dataclass
class OptimizerConfig:
    """AdamW, and the bound of the gradient's norm."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    gradient_clip: float = 35.0
    """Largest norm of the gradient of all parameters together."""


@dataclass
class SchedulerConfig:
    """Learning rate over the training."""

    type: str = "WarmupOneCycleLR"
    """A class of `optim.lr_schedulers`."""
    total_iter: int = 38_400
    """Number of optimizer steps."""
    constructor_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetsConfig:
    """Dataset strings."""

    root: str = ""
    """Completes the strings, by `:root=<root>`; needed unless they name their roots."""
    train: str = ""
    val: str = ""
    """Measured during the training. Empty: nothing is."""
    test: str = ""


@dataclass
class DecoderConfig:
    """The head, and what it sees of the backbone. Depths in metres."""

    min_depth: float = 0.001
    max_depth: float = 80.0
    bins_strategy: str = "linear"
    """`linear`, `log`, `chmv2_mixlog`."""
    norm_strategy: str = "linear"
    """`linear`, `softmax`, `sigmoid`, `chmv2_mixlog`."""
    type: str = "linear"
    """`linear` or `dpt`."""
    n_output_channels: int = 256
    """Number of bins; 1: depth itself."""
    backbone_out_layers: Any = "FOUR_EVEN_INTERVALS"
    """`LAST`, `FOUR_LAST`, `FOUR_EVEN_INTERVALS`, or a list of block indices."""
    adapt_to_patch_size: PatchSizeAdaptationStrategy = PatchSizeAdaptationStrategy.CENTER_PADDING
    """What happens to images whose sides are no multiples of the patch."""
    use_backbone_norm: bool = True
    """Apply the backbone's final norm to the features of every layer."""
    use_batchnorm: bool = False
    """Normalise features over the batch."""
    use_cls_token: bool = False
    """Let the class token take part."""
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the head."""


@dataclass
class TrainTransformConfig:
    """Training images. Sizes in pixels."""

    img_size: Any = None
    """Shorter side, or [height, width]; None: as they are."""
    random_crop: tuple[int, ...] | None = None
    """[height, width]; None: no crop, so images must have one size."""
    brightness_range: tuple[float, ...] = (0.9, 1.1)
    rotation_angle: float = 2.5
    """Largest angle, degrees."""
    fixed_crop: str = "FULL"
    """`FULL`, or `NYU`: without the white frame of these images."""
    eval_mask: str = "FULL"
    """Which part of the image the loss sees, see `EvalTransformConfig`."""


@dataclass
class EvalTransformConfig:
    """Evaluation images. Sizes in pixels."""

    img_size: Any = None
    """Shorter side, or [height, width], of the image; depth maps keep their size. None: as they are."""
    fixed_crop: str = "FULL"
    eval_mask: str = "FULL"
    """Which part of the image counts: `FULL`, `NYU_EIGEN`, `KITTI_EIGEN`, `GARG`."""


@dataclass
class TransformsConfig:
    """From images and depth maps to tensors."""

    train: TrainTransformConfig | None = None
    """Must be given to train."""
    eval: EvalTransformConfig = field(default_factory=EvalTransformConfig)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    normalization_constant: float = 1000.0
    """What stored depths are divided by to give metres."""


@dataclass
class EvalConfig:
    """How predictions are measured. Depths in metres."""

    ignored_value: float = 0.0
    """Marks pixels without a true depth."""
    align_least_squares: bool = False
    """Fit scale and shift of each prediction first."""
    min_depth: float = 0.001
    max_depth: float = 10.0
    """True depths outside the range don't count; predictions are clamped to it."""
    use_tta: bool = True
    """Average over an image and its mirror image, in tests."""
    eval_interval: int = 1600
    """Training steps between evaluations, and between checkpoints."""
    batch_size: int = 1
    """Images of equal size predicted at once."""


@dataclass
class ResultConfig:
    """Pictures of predictions."""

    save_results: bool = False
    extension: ResultExtension = ResultExtension.JPG
    save_resolution: int | None = None
    """Length of the shorter side [pixels]; None: that of the depth map."""
    overlay_alpha: float = 1.0
    """Opacity of colours over the image."""
    save_separate_files: bool = False
    """Also image, prediction and truth in files of their own."""
    save_error_maps: bool = False
    """Also panels of image, truth, prediction and error with scales in metres."""


@dataclass
class DepthConfig:
    """Training and test of a head, or test of a trained one with `load_from`."""

    model: ModelConfig | None = None
    """The frozen backbone; may be absent where `load_from` is a hub model."""
    bs: int = 2
    """Images per process and step."""
    n_gpus: int = 8
    """Number of GPUs the settings were chosen for (information only)."""
    num_workers: int = 2
    seed: int = 321
    model_dtype: ModelDtype | None = None
    """None: float32 for hub models, the training's dtype for others."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    decoder_head: DecoderConfig = field(default_factory=DecoderConfig)
    losses: dict[str, float] | None = None
    """Name of the loss (`SIGLOSS`, `GRADIENT_LOSS`, `GRADIENT_LOG_LOSS`, `L1`) -> weight."""
    metrics: list[str] = field(default_factory=lambda: ["rmse", "abs_rel", "a1"])
    """What validations during training log; tests report all."""
    transforms: TransformsConfig = field(default_factory=TransformsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    result_config: ResultConfig = field(default_factory=ResultConfig)
    load_from: str | None = None
    """Test this head instead of training one: `dinov3_vit7b16_dd`, `dinov3_vitl16_chmv2`, or a path."""
    head_weights: str | None = None
    """Of a hub model: path or address instead of the released head."""
    backbone_weights: str | None = None
    """Of a hub model: path or address instead of the released backbone."""
    output_dir: str = ""
