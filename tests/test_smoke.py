"""The shortest way through everything, for machines that run nothing else: import, torch.hub, one training step."""

from pathlib import Path

import torch

from dinov3.train.train import main
from tests.helpers import tiny_training
from tests.helpers.source import ROOT


def test_hub_gives_a_backbone_that_runs() -> None:
    backbone = torch.hub.load(str(ROOT), "dinov3_vits16", source="local", pretrained=False, depth=2).eval()
    with torch.inference_mode():
        features = backbone.forward_features(torch.randn(2, 3, 48, 32))
    assert features["x_norm_clstoken"].shape == (2, 384)
    assert features["x_norm_patchtokens"].shape == (2, 6, 384)
    assert all(value.isfinite().all() for value in features.values() if value is not None)


def test_one_training_step(tmp_path: Path) -> None:
    arguments = tiny_training.prepare(tmp_path)
    one = (
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "teacher.warmup_teacher_temp_epochs=0",
        "train.OFFICIAL_EPOCH_LENGTH=1",
    )
    main(tiny_training.with_output(arguments, tmp_path / "out", *one))
    weights = torch.load(tmp_path / "out/teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert all(value.isfinite().all() for value in weights.values())
