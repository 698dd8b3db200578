"""COCO's figures: those of pycocotools on the same file, for all that data sets and predictions may lack."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.eval.detection.metrics import FIGURES, coco_figures, detections_of, records_of
from tests.eval.detection.toy_coco import write_toy_coco


def _predictions(content: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Objects, moved a little, with some invented ones."""
    rng = np.random.default_rng(seed)
    records = []
    for annotation in content["annotations"] * 2:
        x, y, width, height = annotation["bbox"]
        dx, dy = rng.normal(0, 2, 2)
        records.append(
            {
                "image_id": annotation["image_id"],
                "category_id": int(rng.choice([3, 14, 54])) if rng.random() < 0.2 else annotation["category_id"],
                "bbox": [x + dx, y + dy, width, height],
                "score": float(rng.random()),
            }
        )
    return records


def test_figures_are_those_of_pycocotools_on_the_predictions_file(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = write_toy_coco(tmp_path, n=6)
    records = _predictions(json.loads(truth.read_text()))
    (tmp_path / "predictions.json").write_text(json.dumps(records))
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        coco.dataset.setdefault("info", {})
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "predictions.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = coco_figures(json.loads(truth.read_text()), json.loads((tmp_path / "predictions.json").read_text()))
    assert list(figures) == list(FIGURES)
    assert list(figures.values()) == evaluation.stats.tolist()
    assert 0.1 < figures["AP"] < 0.95


def test_perfect_detections(tmp_path: Path) -> None:
    content = json.loads(write_toy_coco(tmp_path).read_text())
    records = [
        {key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for one in content["annotations"]
        if not one["iscrowd"]
    ]
    assert coco_figures(content, records)["AP"] == pytest.approx(1.0)
    crowd = records + [{"image_id": 1000, "category_id": 14, "bbox": [2, 2, 20, 20], "score": 0.9}]
    assert coco_figures(content, crowd)["AP"] == pytest.approx(1.0)  # what lies in a crowd counts neither way


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    content = json.loads(write_toy_coco(tmp_path).read_text())
    assert coco_figures(content, [])["AP"] == 0
    assert coco_figures(content | {"annotations": []}, [])["AP"] == -1


def test_objects_may_lack_area_and_crowd_and_files_their_info(tmp_path: Path) -> None:
    content = json.loads(write_toy_coco(tmp_path).read_text())
    complete = [one for one in content["annotations"] if not one["iscrowd"]]
    lean = [{k: v for k, v in one.items() if k not in ("area", "iscrowd")} for one in complete]
    records = _predictions(content)
    before = json.dumps(records)
    assert coco_figures(content | {"annotations": lean}, records) == coco_figures(
        content | {"annotations": complete}, records
    )
    assert json.dumps(records) == before


def test_records_leave_out_what_is_no_category() -> None:
    found = {
        "scores": torch.tensor([0.5, 0.25, 0.125]),
        "labels": torch.tensor([0, 1, 2]),
        "boxes": torch.tensor([[0.0, 0, 1, 1], [1, 2, 4, 8], [0, 0, 2, 2]]),
    }
    records = records_of(7, found, {1: 1_000, 3: 9})
    assert records == [{"image_id": 7, "category_id": 1_000, "bbox": [1, 2, 3, 6], "score": 0.25}]


def test_records_and_detections_are_the_same_in_two_forms() -> None:
    records = [{"image_id": 7, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.25}]
    assert records_of(7, detections_of(records), {3: 3}) == records
    assert {key: len(value) for key, value in detections_of([]).items()} == {"scores": 0, "labels": 0, "boxes": 0}
