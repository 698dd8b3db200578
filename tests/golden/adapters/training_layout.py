"""Golden case of everything that a whole training leaves in its output folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden.adapters.training_steps import registered, tiny_vit
from tests.helpers.distributed import run_distributed

TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "ffn_ratio": 4.0}
# The stored run has position tables in float32 although its configuration doesn't ask for them.
TINY_VIT_FIXED = {"pos_embed_rope_dtype": "fp32"}
N_IMAGES, IMAGE_SIZE_PX = 64, 40


def layout(_: str, p: Mapping[str, Any], tmp_path: Path) -> dict[str, Any]:
    output, images = tmp_path / "output", tmp_path / "images"
    _write_images(images)
    config = tmp_path / "run.yaml"
    config.write_text(p["config"])
    dataset = f"train.dataset_path=ImageFolder:root={images}"
    argv = [f"--config-file={config}", f"--output-dir={output}", *p["overrides"], dataset]
    run_distributed(_train, 1, tmp_path, argv, init_group=False)

    rows = [json.loads(line) for line in (output / "training_metrics.json").read_text().splitlines()]
    newest = max((path for path in (output / "ckpt").iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    exported = torch.load(output / "eval" / f"training_{newest.name}" / "teacher_checkpoint.pth", weights_only=True)
    return {
        "files": sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()),
        "metrics_keys": list(rows[0]),
        "metrics_iterations": [row["iteration"] for row in rows],
        "dcp_keys": _dcp_keys(newest),
        "eval_keys": {
            f"{part}/{key}": _describe(list(value.shape), value.dtype)
            for part, state in exported.items()
            for key, value in state.items()
        },
    }


def _write_images(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (N_IMAGES, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def _train(argv: list[str]) -> None:
    from dinov3.train.train import main

    with registered({"vit_golden_a": tiny_vit(TINY_VIT, TINY_VIT_FIXED)}):
        main(argv)


def _dcp_keys(checkpoint: Path) -> dict[str, str]:
    """Keys of a checkpoint, with shape and dtype of tensors."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def describe(entry: Any) -> str:
        is_tensor = isinstance(entry, TensorStorageMetadata)
        return _describe(list(entry.size), entry.properties.dtype) if is_tensor else "object"

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {key: describe(entry) for key, entry in entries.items()}


def _describe(shape: list[int], dtype: torch.dtype | str) -> str:
    """As text, so that comparing a subset of keys doesn't compare subsets of shapes."""
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def expected_layout(data: Mapping[str, Any]) -> dict[str, Any]:
    """The stored layout in the form of what `layout` returns."""
    described = {
        part: {key: "object" if value == "object" else _describe(*value) for key, value in data[part].items()}
        for part in ("dcp_keys", "eval_keys")
    }
    return {**data, **described}


KINDS = {"layout": layout}
