"""Features as files: what is written, going on, what is left out, and evaluations that start from them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval import features, knn, linear, log_regression
from dinov3.eval.config import ModelConfig, TransformConfig
from dinov3.eval.feature_files import FeatureFiles, Tokens
from dinov3.eval.features import FeaturesConfig, write_features
from dinov3.eval.setup import load_model_and_context
from dinov3.hub.backbones import dinov3_vits16
from tests.eval.toys import COLOURS, write_colour_folders
from tests.helpers.distributed import run_distributed


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_colour_folders(folder / "train", 6)
    write_colour_folders(folder / "val", 2, seed=1)
    return folder


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return dinov3_vits16(pretrained=False, depth=2, embed_dim=48, num_heads=3, layerscale_init=0.5).eval()


def _config(images: Path, out: Path, **changes: Any) -> FeaturesConfig:
    given: dict[str, Any] = dict(
        model=ModelConfig(dino_hub="dinov3_vits16"),
        dataset=str(images),
        shard_size=7,
        batch_size=4,
        num_workers=0,
        transform=TransformConfig(resize_size=32, crop_size=32),
        output_dir=str(out),
    )
    return FeaturesConfig(**(given | changes))


def _write(backbone: nn.Module, config: FeaturesConfig) -> Path:
    return write_features(model=backbone, autocast_dtype=torch.float, config=config)


def _rows(out: Path) -> Tensor:
    dataset = FeatureFiles(root=out)
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


@pytest.mark.parametrize("form", ["safetensors", "npy", "parquet"])
@pytest.mark.parametrize("tokens", Tokens)
def test_every_format_holds_every_kind(
    form: str, tokens: Tokens, images: Path, backbone: nn.Module, tmp_path: Path
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    out = _write(backbone, _config(images / "train", tmp_path, format=form, tokens=tokens, layers=2))
    dataset = FeatureFiles(root=out)
    width = {Tokens.CLS: 96, Tokens.MEAN: 48, Tokens.CLS_MEAN: 144, Tokens.PATCHES: 96}[tokens]
    assert _rows(out).shape == ((18, 4, width) if tokens is Tokens.PATCHES else (18, width))
    assert dataset.get_targets().tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert dataset.class_names == sorted(COLOURS)
    assert dataset.get_image_relpath(7) == "green/001.png"
    assert len(list(out.glob(f"features-*-of-00003.{form}"))) == 3


def test_an_npy_header_of_another_length_is_seen(images: Path, backbone: nn.Module, tmp_path: Path) -> None:
    out = _write(backbone, _config(images / "train", tmp_path, format="npy"))
    shard = min(out.glob("features-*.npy"))
    data = bytearray(shard.read_bytes())
    data[8] -= 16  # the length of the header, in blanks at its end: the file would still be read, all numbers moved
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name} can't be read.*does not fit its header"):
        FeatureFiles(root=out)[0]


def test_rows_are_those_of_the_backbone(images: Path, backbone: nn.Module, tmp_path: Path) -> None:
    rows = _rows(_write(backbone, _config(images / "train", tmp_path)))
    from dinov3.data import make_classification_eval_transform, make_dataset

    transform = make_classification_eval_transform(resize_size=32, crop_size=32)
    dataset = make_dataset(dataset_str=f"ImageFolder:root={images}/train:index_cache=off", transform=transform)
    with torch.no_grad():
        wanted = backbone(torch.stack([dataset[i][0] for i in range(len(dataset))]))
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)
    half = _rows(_write(backbone, _config(images / "train", tmp_path / "half", dtype="fp16")))
    torch.testing.assert_close(half, wanted, atol=2e-3, rtol=2e-3)


def test_it_goes_on_after_the_last_complete_shard(images: Path, backbone: nn.Module, tmp_path: Path) -> None:
    out = _write(backbone, _config(images / "train", tmp_path))
    rows = _rows(out)
    shards = sorted(out.glob("features-*"))
    shards[1].unlink()
    before = [shard.stat().st_mtime_ns for shard in (shards[0], shards[2])]
    with pytest.raises(ValueError, match=r"shards of .* are missing, the first is features-00001-of-00003.safetensors"):
        FeatureFiles(root=out)
    _write(backbone, _config(images / "train", tmp_path))
    assert [shard.stat().st_mtime_ns for shard in (shards[0], shards[2])] == before
    torch.testing.assert_close(_rows(out), rows)
    with pytest.raises(ValueError, match=r"holds other features, which differ in tokens, transform"):
        _write(backbone, _config(images / "train", tmp_path, tokens=Tokens.MEAN, transform=TransformConfig(48, 48)))


def test_unreadable_images_have_no_row_and_are_named(backbone: nn.Module, tmp_path: Path) -> None:
    folder = write_colour_folders(tmp_path / "images", 3)
    (folder / "blue/001.png").write_bytes(b"")
    (folder / "red/002.png").write_bytes((folder / "red/002.png").read_bytes()[:60])
    out = _write(backbone, _config(folder, tmp_path / "out", shard_size=4))
    dataset = FeatureFiles(root=out)
    assert len(dataset) == 7
    assert dataset.get_targets().tolist() == [0, 0, 1, 1, 1, 2, 2]
    with open(next(out.glob("samples-00000*")), newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == ["0", "2", "3"]
    report = [json.loads(line) for line in (out / "skipped_files.jsonl").read_text().splitlines()]
    assert {entry["file"] for entry in report} == {"blue/001.png", "red/002.png"}


def _write_in_a_job(images: Path, out: Path) -> None:
    torch.manual_seed(0)
    model = dinov3_vits16(pretrained=False, depth=2, embed_dim=48, num_heads=3, layerscale_init=0.5).eval()
    _write(model, _config(images, out))


def test_processes_share_the_shards(images: Path, backbone: nn.Module, tmp_path: Path) -> None:
    rows = _rows(_write(backbone, _config(images / "train", tmp_path / "one")))
    run_distributed(_write_in_a_job, 2, tmp_path, images / "train", tmp_path / "two")
    torch.testing.assert_close(_rows(tmp_path / "two"), rows)


@pytest.fixture(scope="module")
def stored(images: Path, backbone: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features that all evaluations can use."""
    out = tmp_path_factory.mktemp("stored")
    for split in ("train", "val"):
        _write(backbone, _config(images / split, out / split, tokens=Tokens.CLS_MEAN))
    return out


@pytest.mark.parametrize("script", [knn, linear, log_regression])
def test_evaluations_start_from_files(script: Any, stored: Path, tmp_path: Path) -> None:
    test_key = "train.val_dataset" if script is linear else "eval.test_dataset"
    arguments = [
        f"train.dataset=Features:root={stored}/train",
        f"{test_key}=Features:root={stored}/val",
        f"output_dir={tmp_path}",
        "train.num_workers=0",
        "eval.num_workers=0",
    ]
    arguments += ["train.epochs=1", "train.epoch_length=20", "train.batch_size=6"] if script is linear else []
    arguments += ["train.train_dtype=float32", "train.tol=1e-3"] if script is log_regression else []
    assert script.main(arguments) == 0
    name = script.RESULTS_FILENAME
    assert (tmp_path / name).exists()
    page = (tmp_path / Path(name).stem / "README.md").read_text()
    assert "most frequent confusions" in page
    plots = {path.name for path in (tmp_path / Path(name).stem).glob("*.png")}
    assert any(plot.startswith("accuracy_per_") for plot in plots)
    assert any(plot.startswith("confusion") for plot in plots)


def test_what_can_not_be_used_together_is_named(
    images: Path, stored: Path, backbone: nn.Module, tmp_path: Path
) -> None:
    config = ModelConfig()
    with pytest.raises(ValueError, match="features and images can't be mixed"):
        load_model_and_context(config, "", datasets=(f"Features:root={stored}/train", f"ImageFolder:root={images}"))
    _write(backbone, _config(images / "val", tmp_path, tokens=Tokens.MEAN))
    with pytest.raises(ValueError, match="differ in tokens: CLS_MEAN and MEAN"):
        load_model_and_context(config, "", datasets=(f"Features:root={stored}/train", f"Features:root={tmp_path}"))
    model, _ = load_model_and_context(config, "", datasets=(f"Features:root={tmp_path}",))
    with pytest.raises(ValueError, match="need features of tokens=cls_mean layers=1; these have tokens=mean layers=1"):
        model.get_intermediate_layers(torch.zeros(2, 48), n=1)
    with pytest.raises(FileNotFoundError, match=r"features\.json is missing"):
        FeatureFiles(root=images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hdf5"}, "format='hdf5': expected one of safetensors, npy, parquet"),
        ({"dtype": "bf16"}, "dtype='bf16': expected fp32 or fp16"),
        ({"shard_size": 0}, "shard_size=0"),
    ],
)
def test_impossible_options_are_named(
    changes: Any, message: str, images: Path, backbone: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _write(backbone, _config(images / "val", tmp_path, **changes))


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert features.main(["--help"]) == 0
    assert "dataset=<FOLDER OR STRING>" in capsys.readouterr().out
