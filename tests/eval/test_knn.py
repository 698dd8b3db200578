"""The k-NN evaluation: the classifier, the whole evaluation on one and several processes, and the command."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from dinov3.eval.helpers import args_dict_to_dataclass
from dinov3.eval.knn import KnnEvalConfig, KnnModule, eval_knn_with_model
from dinov3.utils.device import default_device
from tests.eval.toys import MeanColour, write_colour_folders
from tests.helpers.distributed import run_distributed


def _train(count: int = 60, classes: int = 4) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % classes
    return normalize(torch.randn(classes, 8)[labels] + torch.randn(count, 8) * 0.2, dim=1), labels


def _module(**changes: Any) -> KnnModule:
    features, labels = _train()
    options: dict[str, Any] = dict(
        train_features=features, train_labels=labels, device="cpu", ks=[1, 5], T=0.07, num_classes=4
    )
    return KnnModule(**(options | changes))


def test_samples_of_the_train_set_find_themselves_unless_the_first_is_skipped() -> None:
    knn, skipping = _module(ks=[1]), _module(ks=[1], skip_first_nn=True)
    skipping.train_features = knn.train_features
    similarities, _ = knn.compute_neighbors(knn.train_features)
    torch.testing.assert_close(similarities[:, 0], torch.ones(60))
    second = skipping(skipping.train_features)[1].argmax(1)
    others = knn.train_features @ knn.train_features.T - 2 * torch.eye(60)
    assert torch.equal(second, knn.train_labels[others.argmax(1)])


def test_scores_of_all_neighbours_sum_to_one() -> None:
    scores = _module(ks=[5, 1, 5])(torch.randn(7, 8))
    assert list(scores) == [1, 5]
    torch.testing.assert_close(scores[5].sum(1), torch.ones(7))
    assert (scores[1].sum(1) < 1).all()


def test_multi_hot_labels_define_the_number_of_classes() -> None:
    _, labels = _train()
    scores = _module(train_labels=one_hot(labels, 6))(torch.randn(3, 8))
    assert scores[5].shape == (3, 6)


@pytest.mark.gpu
def test_train_features_beyond_the_memory_of_the_device_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    device, queries = default_device(), torch.randn(9, 8)
    features, labels = _train()
    resident = _module(train_features=features, train_labels=labels, device=device)
    monkeypatch.setattr(torch.get_device_module(device), "mem_get_info", lambda *_: (features.nbytes, features.nbytes))
    streamed = _module(train_features=features, train_labels=labels, device=device)
    assert resident.train_features.device.type == device.type
    assert streamed.train_features.device.type == "cpu"
    torch.testing.assert_close(streamed(queries.to(device)), resident(queries.to(device)))


def test_similarities_in_bfloat16_when_asked() -> None:
    knn = _module(similarity_dtype=torch.bfloat16)
    similarities, _ = knn.compute_neighbors(torch.randn(3, 8))
    assert torch.equal(similarities, similarities.bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": []}, "at least 1"),
        ({"ks": [0, 5]}, "at least 1"),
        ({"num_classes": 3}, "num_classes=3, but a label 3"),
        ({"train_labels": torch.zeros(7).long()}, "got 7 labels for 60 train features"),
    ],
)
def test_bad_classifiers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _module(**changes)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_colour_folders(tmp_path / "train", 7)
    write_colour_folders(tmp_path / "val", 5, seed=1)
    return tmp_path


def _config(folders: Path, **changes: Any) -> KnnEvalConfig:
    arguments: dict[str, Any] = {
        "model": {},
        "train": {"dataset": f"ImageFolder:root={folders}/train:index_cache=off", "batch_size": 4, "num_workers": 0},
        "eval": {"test_dataset": f"ImageFolder:root={folders}/val:index_cache=off", "num_workers": 0},
        "transform": {"resize_size": 32, "crop_size": 32},
        "output_dir": str(folders / "out"),
        "save_results": True,
    }
    for section, values in changes.items():
        arguments[section] = {**arguments.get(section, {}), **values} if isinstance(values, dict) else values
    arguments["train"].setdefault("ks", [1, 3, 1000])
    return args_dict_to_dataclass(arguments, KnnEvalConfig, save_config=False)[0]


def _run(folders: Path, out: str) -> dict[str, float]:
    config = _config(folders, output_dir=str(folders / out))
    return eval_knn_with_model(model=MeanColour(), autocast_dtype=torch.float32, config=config)


def test_colours_are_told_apart_and_ks_end_at_the_train_set(folders: Path) -> None:
    results = _run(folders, "out")
    assert results == {"1 Top 1": 100.0, "3 Top 1": 100.0, "21 Top 1": pytest.approx(results["21 Top 1"])}
    lines = [json.loads(line) for line in (folders / "out/results_eval_knn.json").read_text().splitlines()]
    assert lines == [{name: value} for name, value in results.items()]
    target = np.load(folders / "out/target_k_3.npy")
    assert target.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert (np.load(folders / "out/preds_k_3.npy").argmax(1) == target).all()


def test_the_result_does_not_depend_on_the_number_of_processes(folders: Path) -> None:
    """15 test images on two processes in batches of four: a process ends with less than the other, or with padding."""
    alone = _run(folders, "one")
    for result in run_distributed(_run, 2, folders, folders, "two"):
        assert result == pytest.approx(alone)
    lines = (folders / "two/results_eval_knn.json").read_text().splitlines()
    assert len(lines) == len(alone)  # written once, not by every process
    for name in ("preds_k_3.npy", "target_k_3.npy"):
        np.testing.assert_allclose(np.load(folders / "two" / name), np.load(folders / "one" / name), atol=1e-6)


def test_few_shot_tries_are_averaged(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config(folders, few_shot={"enable": True, "k_or_percent": 2, "n_tries": 3})
    with caplog.at_level(logging.INFO, logger="dinov3"):
        results = eval_knn_with_model(model=MeanColour(), autocast_dtype=torch.float32, config=config)
    assert list(results) == ["1 Top 1", "3 Top 1", "6 Top 1"]
    assert "standard deviation over 3 tries" in caplog.text
    assert {path.name for path in (folders / "out").glob("preds*")} == {
        f"preds_try_{t}_k_{k}.npy" for t in range(3) for k in (1, 3, 6)
    }


def test_metrics_that_are_no_number_are_refused(folders: Path) -> None:
    config = _config(folders, eval={"test_metric_type": "PER_CLASS_ACCURACY"})
    with pytest.raises(ValueError, match="use MEAN_PER_CLASS_ACCURACY"):
        eval_knn_with_model(model=MeanColour(), autocast_dtype=torch.float32, config=config)


def test_other_metrics_have_names_of_their_own(folders: Path) -> None:
    config = _config(folders, eval={"test_metric_type": "mean_per_class_multiclass_f1"}, train={"ks": [3]})
    results = eval_knn_with_model(model=MeanColour(), autocast_dtype=torch.float32, config=config)
    assert results == {"3 Top 1": pytest.approx(100.0)}
