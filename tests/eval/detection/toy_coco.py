"""A data set in the form of COCO with all that files in the wild hold: crowds, gaps, boxes outside, no objects."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {3: (230, 40, 40), 14: (40, 220, 60), 54: (60, 80, 240)}
SIZE = (48, 64)  # height, width


def write_toy_coco(root: Path, split: str = "train", n: int = 4) -> Path:
    """Images of coloured rectangles; the last shows nothing. Returns the annotation file."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for i in range(n):
        pixels = np.full((*SIZE, 3), 128, dtype=np.uint8)
        for category in list(COLOURS)[: 0 if i == n - 1 else 1 + i % 3]:
            width, height = (int(x) for x in rng.integers(14, 24, 2))
            x, y = int(rng.integers(0, SIZE[1] - width)), int(rng.integers(0, SIZE[0] - height))
            pixels[y : y + height, x : x + width] = COLOURS[category]
            annotations.append(_annotation(len(annotations), i, category, [x, y, width, height]))
        Image.fromarray(pixels).save(root / split / f"{i}.png")
    annotations.append(_annotation(len(annotations), 0, 14, [0, 0, 30, 30], iscrowd=1))
    annotations.append(_annotation(len(annotations), 1, 54, [60, 40, 20, 20]))  # ends outside
    annotations.append(_annotation(len(annotations), 1, 54, [70, 2, 5, 5]))  # lies outside
    content = {
        "images": [
            {"id": 1000 + 7 * i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in range(n)
        ],
        "annotations": annotations,
        "categories": [{"id": category, "name": f"c{category}"} for category in COLOURS],
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def _annotation(number: int, image: int, category: int, bbox: list[int], iscrowd: int = 0) -> dict[str, Any]:
    return {
        "id": number + 1,
        "image_id": 1000 + 7 * image,
        "category_id": category,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": iscrowd,
    }
