"""The backbones of the tasks' examples: that of the quick start where it is there, else a small random one.

Random features keep what patches look like; a head on them learns something, but much less than on trained ones.
"""

import logging
from pathlib import Path

import torch

from dinov3.eval.setup import setup_and_build_model
from dinov3.utils.files import atomically

logger = logging.getLogger("dinov3")

QUICKSTART = Path("runs/quickstart/training")


def quickstart_backbone() -> list[str] | None:
    """Arguments of an evaluation for the backbone of the quick start; None, and a warning, if there is none."""
    weights = QUICKSTART / "teacher_checkpoint.pth"
    if weights.is_file():
        return [f"model.config_file={QUICKSTART / 'config.yaml'}", f"model.pretrained_weights={weights}"]
    logger.warning("%s is not there: the backbone is random; `make quickstart` trains one in minutes", weights)
    return None


def write_random_backbone(
    folder: Path, seed: int = 0, *, patch_size: int, layerscale: float = 1e-5
) -> tuple[Path, Path]:
    """A small ViT with random weights: a training's configuration, and a file as a training exports it.

    Args:
        folder: of both files; made when needed.
        seed: of the weights.
        patch_size: [pixels].
        layerscale: initial factor of what blocks add. With 1e-5 features are patches, projected at random.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = folder / "backbone.yaml", folder / "backbone.pth"
    config.write_text(f"student: {{arch: vit_nano, patch_size: {patch_size}}}\n")
    torch.manual_seed(seed)
    backbone, _ = setup_and_build_model(str(config))
    with atomically(weights) as file:
        torch.save({"teacher": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}}, file)
    return config, weights
