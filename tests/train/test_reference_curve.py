"""The CPU recipe follows its committed curve, and continued pretraining from its backbone loses nothing. Minutes.

    python -m tests.train.test_reference_curve

trains again and writes the curve: to be done only when a change of the training is meant to change it.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dinov3.checkpointer.export import export_backbone
from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.models.vision_transformer import vit_nano
from dinov3.train.train import main
from tests.helpers.textures import write_textures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CURVE = Path(__file__).with_name("reference_curve.json")
# Rounding differs between machines and versions of torch, and grows from iteration to iteration.
TOLERANCES = {"total_loss": 0.15, "teacher_entropy": 0.2}
KNN_TOLERANCE = 8.0  # percent of 180 images: 14 of them
PERIOD = 50
# The recipe for continued pretraining, at the size of the CPU recipe. Rates, momentum, weights of the losses, number of
# epochs and all else are the recipe's own.
TINY = [
    "compute_precision.param_dtype=fp32",
    "student.arch=vit_nano",
    "student.patch_size=8",
    "student.norm_layer=layernorm",
    *(f"{head}.{key}" for head in ("dino", "ibot") for key in ("head_n_prototypes=64", "head_bottleneck_dim=32")),
    *(f"{head}.head_hidden_dim=128" for head in ("dino", "ibot")),
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    "crops.gram_teacher_crops_size=32",
    "train.batch_size_per_gpu=32",
    "train.num_workers=0",
]
ONE_IMAGE = 0.6  # percent of accuracy


def write_data(folder: Path) -> Path:
    write_textures(folder / "train", per_class=80, seed=0)
    write_textures(folder / "val", per_class=30, seed=1)
    return folder


def arguments(recipe: str, data: Path, output_dir: Path, period: int) -> list[str]:
    knn = {
        "train_dataset": f"ImageFolder:root={data / 'train'}",
        "val_dataset": f"ImageFolder:root={data / 'val'}",
        "period": period,
        "k": 10,
        "resize_size": 32,
        "crop_size": 32,
    }
    return [
        "--config-file",
        f"dinov3/configs/train/{recipe}.yaml",
        "--output-dir",
        str(output_dir),
        f"train.dataset_path=ImageFolder:root={data / 'train'}",
        *(f"evaluation.online_knn.{key}={value}" for key, value in knn.items()),
    ]


def knn_of(output_dir: Path) -> list[float]:
    """The k-NN accuracies that a training has logged, in percent."""
    log = (output_dir / "logs" / "log.txt").read_text()
    return [float(value) for value in re.findall(r"Online k-NN of the EMA teacher: ([\d.]+) %", log)]


def curve_of(output_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]
    names = ("iteration", *TOLERANCES)
    return {name: [round(row[name], 4) for row in rows] for name in names} | {"knn": knn_of(output_dir)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def smoke(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the CPU recipe."""
    output_dir = tmp_path_factory.mktemp("smoke")
    main(arguments("cpu_smoke", data, output_dir, PERIOD))
    return output_dir


@pytest.fixture(scope="module")
def layouts(smoke: Path) -> dict[str, Path]:
    """The trained backbone in every layout."""
    backbone = vit_nano(8, n_storage_tokens=4, mask_k_bias=True, layerscale_init=1.0, pos_embed_rope_dtype="fp32")
    load_weights(backbone, read_weights(smoke / "teacher_checkpoint.pth"))
    return {
        "teacher": smoke / "teacher_checkpoint.pth",
        "training": smoke / "ckpt" / "199",
        "meta": export_backbone(backbone, smoke / "backbone.pth"),
        "safetensors": export_backbone(backbone, smoke / "backbone.safetensors"),
        "hf": export_backbone(backbone, smoke / "hf", "hf"),
        "timm": export_backbone(backbone, smoke / "timm.pth", "timm"),
    }


def test_the_cpu_recipe_follows_its_curve(smoke: Path) -> None:
    found, expected = curve_of(smoke), json.loads(CURVE.read_text())
    assert found["iteration"] == expected["iteration"]
    for name, tolerance in TOLERANCES.items():
        for i, (got, wanted) in enumerate(zip(found[name], expected[name], strict=True)):
            at = f"{name} at iteration {found['iteration'][i]}"
            # at first there is nothing to have grown apart
            assert got == pytest.approx(wanted, abs=1e-3 if i == 0 else tolerance), at
    assert found["knn"] == pytest.approx(expected["knn"], abs=KNN_TOLERANCE)
    assert found["knn"][-1] > 50  # 40 without training, 17 by chance
    assert found["total_loss"][-1] < found["total_loss"][0] - 0.8


@pytest.mark.parametrize("layout", ["teacher", "training", "meta", "safetensors", "hf", "timm"])
def test_continued_pretraining_starts_at_the_accuracy_of_the_backbone(
    smoke: Path, layouts: dict[str, Path], data: Path, tmp_path: Path, layout: str
) -> None:
    start = [f"student.pretrained_weights={layouts[layout]}", "train.OFFICIAL_EPOCH_LENGTH=1"]
    main([*arguments("continue_vits16", data, tmp_path, 1), *TINY, *start, "optim.epochs=3"])
    found = knn_of(tmp_path)
    assert found[0] == knn_of(smoke)[-1], "while only the heads learn, the backbone is the given one"
    assert len(found) == 3


def test_continued_pretraining_does_not_fall_below_the_accuracy_of_the_backbone(
    smoke: Path, layouts: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    start = [f"student.pretrained_weights={layouts['meta']}", "train.OFFICIAL_EPOCH_LENGTH=50"]
    main([*arguments("continue_vits16", data, tmp_path, 50), *TINY, *start])
    before, found = knn_of(smoke)[-1], knn_of(tmp_path)
    assert len(found) == 10
    assert found[0] == before
    assert min(found) >= before - ONE_IMAGE
    assert found[-1] >= before
    first, last = (read_weights(path) for path in (layouts["meta"], tmp_path / "teacher_checkpoint.pth"))
    moved = (last["blocks.3.attn.qkv.weight"] - first["blocks.3.attn.qkv.weight"]).norm()
    assert moved > 0.02 * first["blocks.3.attn.qkv.weight"].norm(), (
        "the teacher has hardly moved: its accuracy says nothing"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(arguments("cpu_smoke", write_data(Path(folder) / "data"), Path(folder) / "out", PERIOD))
        CURVE.write_text(json.dumps(curve_of(Path(folder) / "out"), indent=1) + "\n")
