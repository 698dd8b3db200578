"""COCO's twelve figures, by pycocotools, from records of detections.

Source: Lin et al., Microsoft COCO (2014); https://cocodataset.org/#detection-eval.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3 import distributed

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

Record = dict[str, Any]


def records_of(image_id: int, detections: Mapping[str, Tensor], id_of: Mapping[int, int]) -> list[Record]:
    """Detections of an image in the form of COCO's results.

    Args:
        image_id: of the image.
        detections: `scores` `[n]`, `labels` `[n]`, `boxes` `[n, 4]` (xyxy in pixels of the original image).
        id_of: class -> category id; detections of other classes are left out.
    """
    scores, labels, boxes = (detections[key].tolist() for key in ("scores", "labels", "boxes"))
    return [
        {"image_id": image_id, "category_id": id_of[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for score, label, (x0, y0, x1, y1) in zip(scores, labels, boxes, strict=True)
        if label in id_of
    ]


def detections_of(records: Sequence[Record]) -> dict[str, Tensor]:
    """Records of an image as `scores` `[n]`, `labels` (category ids) `[n]` and `boxes` `[n, 4]` (xyxy)."""
    boxes = torch.tensor([record["bbox"] for record in records]).reshape(-1, 4)
    return {
        "scores": torch.tensor([record["score"] for record in records]),
        "labels": torch.tensor([record["category_id"] for record in records], dtype=torch.int64),
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
    }


def gather_records(records: list[Record]) -> list[Record]:
    """Records of all processes, in the order of their ranks; empty but on the main process. A collective."""
    if distributed.get_world_size() == 1:
        return records
    parts: list[Any] | None = [None] * distributed.get_world_size() if distributed.is_main_process() else None
    dist.gather_object(records, parts)
    return [record for part in parts or () for record in part]


def from_main_process(value: Any) -> Any:
    """The main process's value, on all of them. A collective."""
    if distributed.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def coco_figures(instances: Mapping[str, Any], records: Sequence[Record]) -> dict[str, float]:
    """The figures, by name.

    Args:
        instances: content of a JSON file in COCO's form. Objects that don't say so are no crowd, and have the area of
            their box.
        records: as from `records_of`.

    Returns:
        Values in [0, 1], -1 where there is nothing to measure (no object of a size, or none at all).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = {"info": {}, **instances, "annotations": [_complete(one) for one in instances["annotations"]]}
    found = {
        "images": instances["images"],
        "categories": instances["categories"],
        "annotations": [
            record | {"id": number, "iscrowd": 0, "area": record["bbox"][2] * record["bbox"][3]}
            for number, record in enumerate(deepcopy(list(records)), start=1)
        ],
    }
    with redirect_stdout(io.StringIO()):  # it reports by printing
        sets = []
        for content in (truth, found):
            one = COCO()
            one.dataset = content
            one.createIndex()
            sets.append(one)
        evaluation = COCOeval(*sets, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURES, map(float, evaluation.stats), strict=True))


def _complete(annotation: Mapping[str, Any]) -> dict[str, Any]:
    width, height = annotation["bbox"][2:]
    return {"iscrowd": 0, "area": width * height, **annotation}
