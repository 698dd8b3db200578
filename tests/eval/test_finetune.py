"""Fine-tuning: it learns, resumes exactly, and what it leaves behind gives the same predictions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.distributed.stopping import Stopped
from dinov3.eval import finetune as module
from dinov3.eval.config import ModelConfig, TransformConfig
from dinov3.eval.finetune import FineTuneConfig, FineTuneOptimizerConfig, FineTuneTrainConfig, LoraConfig, Method
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.eval.toys import write_colour_folders


def _backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    backbone = DinoVisionTransformer(
        embed_dim=32, depth=2, num_heads=2, patch_size=8, drop_path_rate=0.3, pos_embed_rope_dtype="fp32"
    )
    backbone.init_weights()
    return backbone


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_colour_folders(root / "train", per_class=8)
    write_colour_folders(root / "val", per_class=4, seed=1)
    return root


def _config(images: Path, out: Path, **changes: Any) -> FineTuneConfig:
    train = FineTuneTrainConfig(
        dataset=f"ImageFolder:root={images / 'train'}",
        val_dataset=f"ImageFolder:root={images / 'val'}",
        batch_size=8,
        num_workers=0,
        epochs=changes.pop("epochs", 8),
    )
    optimizer = FineTuneOptimizerConfig(lr=0.1)
    sizes = TransformConfig(resize_size=32, crop_size=32)
    return FineTuneConfig(
        model=ModelConfig(), train=train, optimizer=optimizer, transform=sizes, output_dir=str(out), **changes
    )


def _run(config: FineTuneConfig) -> float:
    (accuracy,) = module.finetune(backbone=_backbone(), autocast_dtype=torch.float32, config=config).values()
    return accuracy


@pytest.mark.parametrize("method", list(Method))
def test_it_learns_and_leaves_a_backbone_that_predicts_the_same(images: Path, tmp_path: Path, method: Method) -> None:
    config = _config(images, tmp_path, method=method, lora=LoraConfig(rank=4))
    assert _run(config) > 90
    backbone, classifier = _backbone().eval(), torch.load(tmp_path / "classifier.pth", weights_only=True)
    load_weights(backbone, read_weights(tmp_path / "backbone.pth"))
    model = module.FineTunedClassifier(backbone, 32, 3).eval()
    model.classifier.load_state_dict(classifier)
    dataset = module.make_dataset(
        dataset_str=config.train.val_dataset,
        transform=module.make_classification_eval_transform(resize_size=32, crop_size=32),
    )
    with torch.no_grad():
        right = [int(model(image[None]).argmax()) == label for image, label in dataset]
    assert sum(right) > 0.9 * len(right)


def test_an_interrupted_run_goes_on_exactly(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run(_config(images, tmp_path / "whole", epochs=3))
    step = module._FineTuning.step

    def stop_at_5(self: Any, batch: Any) -> Any:
        if self.iteration == 5:
            raise Stopped(0)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module._FineTuning, "step", stop_at_5)
        with pytest.raises(Stopped):
            _run(_config(images, tmp_path / "stopped", epochs=3))
    assert _run(_config(images, tmp_path / "stopped", epochs=3)) == whole
    first, second = (read_weights(tmp_path / name / "backbone.pth") for name in ("whole", "stopped"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_deeper_layers_learn_faster_and_norms_do_not_decay() -> None:
    model = module.FineTunedClassifier(_backbone(), 32, 3)
    config = FineTuneOptimizerConfig(layerwise_decay=0.5, weight_decay=0.1)
    groups = module.parameter_groups(model, config, lr=1.0)
    by_parameter = {id(group["params"][0]): group for group in groups}
    first = by_parameter[id(model.backbone.blocks[0].attn.qkv.weight)]  # type: ignore[index, union-attr]
    assert (first["lr"], first["weight_decay"]) == (0.25, 0.1)
    assert by_parameter[id(model.classifier.weight)]["lr"] == 1.0
    assert by_parameter[id(model.classifier.bias)]["weight_decay"] == 0.0


def test_errors_say_what_to_change(images: Path, tmp_path: Path) -> None:
    config = _config(images, tmp_path)
    config.train.batch_size = 100
    with pytest.raises(ValueError, match=r"24 images, fewer than one batch of 100"):
        _run(config)
    with pytest.raises(ValueError, match="use method=full"):
        module.add_adapters(torch.nn.Linear(2, 2), LoraConfig())
