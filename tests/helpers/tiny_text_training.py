"""A training of dino.txt that takes seconds: tiny towers, tiny images, the real script."""

from pathlib import Path
from typing import Any

from dinov3.eval.text.config import TextTrainConfig
from dinov3.eval.text.train_dinotxt import parse
from dinov3.models.vision_transformer import DinoVisionTransformer, register_vit
from tests.helpers.images import class_image
from tests.helpers.tiny_dinotxt import TEXT_BACKBONE, byte_vocabulary

CONFIG = """\
embed_dim: 128
vision_backbone_config: {folder}/vision.yaml
vision_model_freeze_backbone: false
vision_model_train_img_size: 16
vision_model_use_patch_tokens: true
vision_model_num_head_blocks: 1
vision_model_head_blocks_drop_path: 0.5
text_backbone_config: {folder}/text.yaml
text_model_tokens_pooler_type: argmax
text_model_use_linear_projection: true
text_vocab_path_or_url: {folder}/bytes.txt.gz
train_dataset_str: CaptionList:file={folder}/captions.csv
batch_size: 4
num_workers: 0
max_iteration: 6
warmup_length: 1
lr: 1.0e-3
checkpointing_period: 2
max_checkpoints_to_keep: 2
eval_freq: 0
vision_model_use_gram_loss: true
vision_model_gram_loss_weight: 0.5
vision_model_patch_sampling_rate_for_gram_loss: 0.5
"""
# A bias of the keys has no gradient but rounding, which Adam would enlarge: masked, as in the released backbones.
VISION = """\
student: {arch: vit_tiny_text_test, patch_size: 8, layerscale: 1.0, mask_k_bias: true}
crops: {global_crops_size: 16}
"""


def prepare(folder: Path) -> list[str]:
    """Write pairs and configurations into `folder`; returns the arguments of a training without its output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(6):
        class_image(i, 0).save(folder / f"{i}.png")
        rows += [f"{i}.png,number {i}", f"{i}.png,class {i}"]
    (folder / "captions.csv").write_text("path,caption\n" + "\n".join(rows) + "\n")
    (folder / "vision.yaml").write_text(VISION)
    (folder / "text.yaml").write_text("\n".join(f"{key}: {value}" for key, value in TEXT_BACKBONE.items()))
    byte_vocabulary(folder / "bytes.txt.gz")
    (folder / "training.yaml").write_text(CONFIG.format(folder=folder))
    return [f"trainer_config_file={folder}/training.yaml"]


def config_of(arguments: list[str], output_dir: Path, **changes: Any) -> TextTrainConfig:
    """The configuration of a training."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return parse([*arguments, f"output_dir={output_dir}", *overrides])


def vit_tiny_text_test(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """A ViT of 2 blocks, 64 wide."""
    return DinoVisionTransformer(patch_size=patch_size, embed_dim=64, depth=2, num_heads=2, ffn_ratio=2, **kwargs)


register_vit("vit_tiny_text_test", vit_tiny_text_test)
