"""A training that takes seconds: tiny network, tiny images, the real script.

    python -m tests.helpers.tiny_training --config-file CONFIG --output-dir OUT [key=value ...]

runs `dinov3.train.train.main` with the architectures `vit_tiny_test` and `vit_tiny_wide_test` registered.
"""

import sys
from pathlib import Path
from typing import Any

from dinov3.models.vision_transformer import DinoVisionTransformer, register_vit
from dinov3.train.train import main
from tests.helpers.images import write_image_folder

CONFIG = """
compute_precision: {param_dtype: fp32}
student:
  {arch: vit_tiny_test, patch_size: 4, drop_path_rate: 0.2, n_storage_tokens: 1, pos_embed_rope_rescale_coords: 2}
dino: {head_n_prototypes: 16, head_bottleneck_dim: 8, head_hidden_dim: 24}
ibot: {head_n_prototypes: 12, head_bottleneck_dim: 8, head_hidden_dim: 24}
crops: {local_crops_number: 2, global_crops_size: 16, local_crops_size: 8}
optim: {epochs: 3, warmup_epochs: 1}
train: {batch_size_per_gpu: 4, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 5, compile: false}
teacher: {warmup_teacher_temp_epochs: 1}
checkpointing: {period: 4, max_to_keep: 2}
evaluation: {eval_period_iterations: 10}
"""
N_ITERATIONS = 15


def vit_tiny_test(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """A ViT of 2 blocks, 16 wide."""
    return DinoVisionTransformer(patch_size=patch_size, embed_dim=16, depth=2, num_heads=2, ffn_ratio=2, **kwargs)


def vit_tiny_wide_test(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """A ViT of 3 blocks, 24 wide."""
    return DinoVisionTransformer(patch_size=patch_size, embed_dim=24, depth=3, num_heads=2, ffn_ratio=2, **kwargs)


def prepare(folder: Path) -> list[str]:
    """Write images and a configuration into `folder`; returns the arguments of a training without `--output-dir`."""
    images, config = folder / "images", folder / "tiny.yaml"
    if not images.exists():
        write_image_folder(images, classes=2, per_class=7, size=24, seed=0)
        config.write_text(f"{CONFIG}")
    return ["--config-file", str(config), f"train.dataset_path=ImageFolder:root={images}"]


def with_output(arguments: list[str], output_dir: Path, *overrides: str) -> list[str]:
    """The arguments with an output folder before, and more overrides after."""
    return ["--output-dir", str(output_dir), *arguments, *overrides]


register_vit("vit_tiny_test", vit_tiny_test)
register_vit("vit_tiny_wide_test", vit_tiny_wide_test)

if __name__ == "__main__":
    main(sys.argv[1:])
