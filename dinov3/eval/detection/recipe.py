"""Object detection on a frozen backbone: train a head, or evaluate a trained one by COCO's figures.

    python dinov3/eval/detection/run.py config=dinov3/eval/detection/configs/config-coco.yaml model.dino_hub=<backbone>
        datasets.root=<COCO> output_dir=<OUT>
    python dinov3/eval/detection/run.py load_from=dinov3_vit7b16_de datasets.root=<COCO> output_dir=<OUT>
        head_weights=<file> backbone_weights=<file> transforms.eval.short_side=2048 transforms.eval.max_size=null

With `load_from=<hub entry, head file, output folder or checkpoint>` a detector is evaluated, otherwise one is trained
and then evaluated. Data sets are strings such as `CocoDetection:split=val2017` (completed by `datasets.root`) or
`CocoDetection:root=<DIR>:annotations=<JSON file>:images=<FOLDER>`. `head.<name>=` sets any field of
`DetectionHeadConfig` (`config.py`); `head.num_classes` follows from the training set. Values come from the defaults,
then the YAML file, then the command line.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dinov3.configs.model import ModelConfig
from dinov3.eval.detection.transforms import IMAGENET_MEAN, IMAGENET_STD


class ModelDtype(Enum):
    """What the frozen backbone computes in; the head is trained in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass
class DatasetsConfig:
    """Dataset strings, completed by `:root=<root>`."""

    root: str = ""
    train: str = "CocoDetection:split=train2017"
    val: str = "CocoDetection:split=val2017"


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 2e-4
    weight_decay: float = 0.05
    wd_norm_mult: float = 0.0
    """Factor of the weight decay of norms, biases, position networks and embeddings."""
    gradient_clip: float = 0.1
    """Largest norm of the gradient of all parameters together; `inf`: no bound."""


@dataclass
class SchedulerConfig:
    """Learning rate: a linear warm-up, then a division at each milestone."""

    epochs: float = 12.0
    """Passes over the training set."""
    warmup_iters: int = 1000
    milestones: list[float] = field(default_factory=lambda: [11.0])
    """Epochs."""
    gamma: float = 0.1


@dataclass
class LossesConfig:
    """Weights of the losses."""

    ce: float = 2.0
    bbox: float | None = None
    """None: 1 if boxes are in pixels, else 5."""
    giou: float = 2.0
    cls_loss: str = "focal"
    """"focal", or "ia_bce" (aware of the overlap)."""


@dataclass
class TrainTransformConfig:
    """Random changes of training images."""

    short_side: list[int] = field(default_factory=lambda: [480, 800])
    """Range of the shorter side [pixels]."""
    max_size: int | None = 1333
    """Of the longer side [pixels]."""
    crop_probability: float = 0.5
    min_area: float = 0.6
    """Smallest part of the image that a crop keeps."""
    flip_probability: float = 0.5


@dataclass
class EvalTransformConfig:
    """Size of images at evaluation; both sides are then rounded up to multiples of the patch."""

    short_side: int = 800
    max_size: int | None = 1333


@dataclass
class TransformsConfig:
    """Sizes and statistics of images."""

    train: TrainTransformConfig = field(default_factory=TrainTransformConfig)
    eval: EvalTransformConfig = field(default_factory=EvalTransformConfig)
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """Of red, green and blue, for images in [0, 1]."""
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))


@dataclass
class EvalConfig:
    """Evaluations, during a training and in the end."""

    eval_interval: int | None = None
    """Iterations between evaluations and checkpoints. None: one epoch."""
    topk: int | None = None
    """Detections per image. None: what the head says."""
    use_tta: bool = False
    """In the end: several sizes, each also mirrored, merged by soft-NMS."""
    tta_short_sides: list[int] = field(default_factory=lambda: [1536, 1728, 1920, 2112, 2304, 2496, 2688, 2880])
    save_predictions: bool = True
    """Write `predictions.json`."""
    n_pictures: int = 8
    """How many images to draw."""
    picture_score: float = 0.3
    """Detections below, after soft-NMS, are not drawn."""


def _default_matcher() -> dict[str, float | None]:
    return {"class": 2.0, "bbox": None, "giou": 2.0}


@dataclass
class DetectionConfig:
    """A training with its evaluation, or an evaluation alone."""

    model: ModelConfig | None = None
    """The frozen backbone."""
    head: dict[str, Any] = field(default_factory=dict)
    """Fields of `DetectionHeadConfig`."""
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    bs: int = 16
    """Images per process."""
    num_workers: int = 4
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    matcher: dict[str, float | None] = field(default_factory=_default_matcher)
    """Weights of the matching cost: `class`, `bbox` (None: 1 if boxes are in pixels, else 5), `giou`."""
    transforms: TransformsConfig = field(default_factory=TransformsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    model_dtype: ModelDtype | None = None
    """Of the backbone. None: that of its training; float32 on a CPU in any case."""
    init_from: str | None = None
    """Checkpoint of an earlier stage to start from. Class heads start anew if the number of classes differs."""
    load_from: str | None = None
    """Evaluate this detector: a hub entry, a head file, an output folder, or a checkpoint (which needs `head`)."""
    head_weights: str | None = None
    """With a hub entry: weights of the head. None: the released ones."""
    backbone_weights: str | None = None
    """With a hub entry: weights of the backbone."""
    output_dir: str = ""
