"""Evaluations on folders with unusual and broken images: no crash, a report, and scores over what can be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.data import make_dataset
from dinov3.eval import knn, linear, log_regression
from dinov3.eval.config import ModelConfig, TransformConfig
from dinov3.eval.data import SubsetEx
from dinov3.eval.features import extract_features, extract_subsets
from dinov3.eval.linear import LinearEvalConfig
from dinov3.eval.log_regression import LogregEvalConfig
from tests.data.datasets.test_skipped import write_messy_folder
from tests.eval.toys import MeanColour
from tests.helpers.images import broken_images, odd_images

_WORKERS = 1  # a process of its own finds the unreadable files


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `val` with the classes broken (nothing can be read), fine and odd."""
    root = tmp_path_factory.mktemp("messy")
    for split in ("train", "val"):
        write_messy_folder(root / split, n_fine=12)
        # One good image of the class of the broken ones.
        (root / split / "broken" / "good.png").write_bytes((root / split / "fine" / "000.png").read_bytes())
    return root


def _string(folders: Path, split: str) -> str:
    return f"ImageFolder:root={folders}/{split}:index_cache=off"


def _run(kind: str, folders: Path, out: Path) -> None:
    sizes = TransformConfig(32, 32)
    common: dict[str, Any] = dict(model=ModelConfig(), transform=sizes, output_dir=str(out), save_results=True)
    train, val = _string(folders, "train"), _string(folders, "val")
    model = MeanColour()
    if kind == "knn":
        config = knn.KnnEvalConfig(
            train=knn.TrainConfig(dataset=train, ks=(1,), num_workers=_WORKERS, batch_size=5),
            eval=knn.EvalConfig(test_dataset=val, num_workers=_WORKERS),
            **common,
        )
        knn.eval_knn_with_model(model=model, autocast_dtype=torch.float, config=config)
    elif kind == "linear":
        heads = linear.TrainConfig(
            dataset=train, val_dataset=val, epochs=1, epoch_length=8, batch_size=5, num_workers=_WORKERS
        )
        linear_config = LinearEvalConfig(train=heads, eval=linear.EvalConfig(num_workers=_WORKERS), **common)
        linear.eval_linear_with_model(model=model, autocast_dtype=torch.float, config=linear_config)
    else:
        logreg_config = LogregEvalConfig(
            train=log_regression.TrainConfig(
                dataset=train, val_dataset=val, batch_size=5, num_workers=_WORKERS, tol=1e-3, train_dtype="float32"
            ),
            eval=log_regression.EvalConfig(test_dataset=val, num_workers=_WORKERS),
            **common,
        )
        log_regression.eval_log_regression_with_model(model=model, autocast_dtype=torch.float, config=logreg_config)


@pytest.mark.parametrize("kind", ["knn", "linear", "log_regression"])
def test_what_can_be_read_is_evaluated_and_the_rest_is_named(kind: str, folders: Path, tmp_path: Path) -> None:
    _run(kind, folders, tmp_path)
    broken = {f"broken/{name}" for name in broken_images()}
    for report in tmp_path.glob("skipped_files_*.jsonl"):
        assert {json.loads(line)["file"] for line in report.read_text().splitlines()} == broken, report.name
    roles = {report.stem.rpartition("_")[2] for report in tmp_path.glob("skipped_files_*.jsonl")}
    assert roles == {"train", "val"} if kind == "linear" else roles >= {"train", "test"}
    (targets,) = (np.load(path) for path in tmp_path.glob("target*.npy"))
    assert np.bincount(targets).tolist() == [1, 12, len(odd_images())]


def test_features_of_unreadable_images_are_left_out(folders: Path) -> None:
    from dinov3.data import make_classification_eval_transform

    transform = make_classification_eval_transform(resize_size=32, crop_size=32)
    dataset = make_dataset(dataset_str=_string(folders, "train"), transform=transform)
    n_fine = len(dataset) - len(broken_images())
    features, labels = extract_features(MeanColour(), dataset, batch_size=4, num_workers=0)
    assert len(features) == len(labels) == n_fine
    assert np.bincount(labels).tolist() == [1, 12, len(odd_images())]
    # A part with one broken image and one fine one; together they are the whole of nothing.
    names = [dataset.get_image_relpath(i) for i in range(len(dataset))]
    rows = [names.index("broken/empty.jpg"), names.index("fine/003.png")]
    parts = extract_subsets(MeanColour(), dataset, {0: SubsetEx(dataset, rows), 1: SubsetEx(dataset, rows[1:])}, 4, 0)
    for part in parts.values():
        assert part[1].tolist() == [1]
        torch.testing.assert_close(part[0], features[(labels == 1).nonzero().flatten()[3:4]])
