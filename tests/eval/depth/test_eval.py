"""Evaluation: views, images without truth, batches, processes, pictures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3.data.datasets.depth_folder import Depth
from dinov3.eval.depth.config import DepthConfig, EvalTransformConfig, ResultExtension
from dinov3.eval.depth.data import dataset_string, make_eval_loader
from dinov3.eval.depth.eval import evaluate_dataset, evaluate_depther_with_dataloader, test_depther
from dinov3.eval.depth.results import ResultWriter
from tests.eval.depth.toys import tiny_config, tiny_depther, write_nyu
from tests.helpers.distributed import run_distributed

test_depther.__test__ = False  # type: ignore[attr-defined]  # no test, though it is called so


class Brightness(nn.Module):
    """Depth is the image's first channel, at half its resolution."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images[:, :1], 2)


def sample(depth: Tensor, index: int) -> tuple[list[Tensor], tuple[Tensor, list[Tensor]]]:
    image = nn.functional.interpolate(depth, scale_factor=2, mode="nearest").expand(-1, 3, -1, -1)
    return [image], (torch.tensor([index]), [depth])


def test_a_perfect_model_and_images_without_truth() -> None:
    depth = 1 + torch.rand(1, 1, 8, 8)
    nothing = torch.full_like(depth, 20.0)  # out of range everywhere
    loader = [sample(depth, 0), sample(nothing, 1), sample(depth, -1)]
    per_image = evaluate_depther_with_dataloader(Brightness(), loader, device="cpu", reduce_results=False)
    assert per_image["rmse"][0] == pytest.approx(0, abs=1e-6)
    assert len(per_image["rmse"]) == 2  # the last one is padding
    assert all(math.isnan(values[1]) for values in per_image.values())
    means = evaluate_depther_with_dataloader(Brightness(), loader, device="cpu")
    assert means["silog"] == pytest.approx(0, abs=1e-3)
    assert means["a1"] == 1.0


def test_alignment_and_clamping() -> None:
    depth = 2 + torch.rand(1, 1, 8, 8)
    images, (index, depths) = sample(depth, 0)
    loader = [([3 * images[0] + 1], (index, depths))]
    aligned = evaluate_depther_with_dataloader(Brightness(), loader, device="cpu", align_least_squares=True)
    assert aligned["rmse"] == pytest.approx(0, abs=1e-5)
    clamped = evaluate_depther_with_dataloader(Brightness(), loader, device="cpu", eval_range=(0.1, 4.0))
    assert clamped["mae"] == pytest.approx((4.0 - depth).mean().item(), abs=1e-5)


def nyu_config(tmp_path: Path, **options: Any) -> DepthConfig:
    config = tiny_config(tmp_path / "out", **options)
    config.datasets.root = str(write_nyu(tmp_path / "nyu"))
    config.datasets.test = "NYU:split=VAL"
    config.transforms.eval = EvalTransformConfig(eval_mask="NYU_EIGEN")
    return config


def test_batches_of_several_images_give_the_same(tmp_path: Path) -> None:
    config, depther = nyu_config(tmp_path), tiny_depther("dpt")
    single = evaluate_dataset(depther, config, config.datasets.test, tta=True, reduce_results=False)
    config.eval.batch_size = 2
    batched = evaluate_dataset(depther, config, config.datasets.test, tta=True, reduce_results=False)
    assert [len(values) for values in batched.values()] == [3] * 10
    for name, values in single.items():
        np.testing.assert_allclose(batched[name], values, rtol=1e-4, atol=1e-6)


def _evaluate_on_ranks(root: str) -> dict[str, list[float]]:
    config = tiny_config(Path("unused"))
    config.datasets.root = root
    result: dict[str, list[float]] = evaluate_dataset(
        tiny_depther("dpt"), config, "NYU:split=VAL", tta=False, reduce_results=False
    )
    return result


def test_one_and_two_processes_agree(tmp_path: Path) -> None:
    root = str(write_nyu(tmp_path / "nyu"))  # three images: one rank gets a padded one
    alone = _evaluate_on_ranks(root)
    ranks = run_distributed(_evaluate_on_ranks, 2, tmp_path, root)
    assert ranks[0] == ranks[1]
    for name, values in alone.items():
        np.testing.assert_allclose(ranks[0][name], values, rtol=1e-5, atol=1e-7)


def test_result_files(tmp_path: Path) -> None:
    config, depther = nyu_config(tmp_path), tiny_depther("linear")
    config.result_config.save_results = config.result_config.save_separate_files = True
    config.result_config.save_error_maps = True
    config.result_config.extension = ResultExtension.PNG
    config.result_config.save_resolution = 24
    results = test_depther(depther, config)
    out = tmp_path / "out"
    per_image = json.loads((out / "NYU" / "results.json").read_text())
    assert list(results) == [f"NYU_{name}" for name in per_image]
    assert results["NYU_rmse"] == pytest.approx(sum(per_image["rmse"]) / 3)
    for i in range(3):
        with Image.open(out / "visualizations" / f"results_{i}.png") as picture:
            assert picture.size == (64, 24)  # two of 32 x 24
        for name in ("image", "pred", "gt"):
            with Image.open(out / "visualizations" / f"{name}_{i}.png") as picture:
                assert picture.size == (32, 24)
        for name in ("depth", "error"):
            with Image.open(out / "visualizations" / f"{name}_{i}.png") as picture:
                assert picture.width > picture.height > 300


def test_tensors_as_results_and_colours_over_the_image(tmp_path: Path) -> None:
    config = DepthConfig()
    config.result_config.save_results = True
    config.result_config.extension = ResultExtension.PTH
    image, depth = torch.zeros(3, 10, 12), 1 + torch.rand(1, 20, 24)
    ResultWriter(tmp_path, config).save(7, image, depth, depth)
    saved = torch.load(tmp_path / "results_7.pth", weights_only=True)
    torch.testing.assert_close(saved["image"][:, 0, 0], torch.tensor([0.485, 0.456, 0.406]))
    assert saved["pred"].shape == saved["target"].shape == (1, 20, 24)

    config.result_config.extension = ResultExtension.PNG
    config.result_config.overlay_alpha = 0.0
    ResultWriter(tmp_path, config).save(8, image, depth, torch.zeros(1, 20, 24))
    with Image.open(tmp_path / "results_8.png") as picture:
        assert picture.size == (48, 20)
        assert picture.getpixel((3, 3)) == (124, 116, 104)  # the image alone


def test_dataset_strings_and_images_of_two_sizes(tmp_path: Path) -> None:
    assert dataset_string("NYU:split=VAL", "/data") == "NYU:split=VAL:root=/data"
    assert dataset_string("NYU:split=VAL", "C:/data") == 'NYU:split=VAL:root="C:/data"'
    assert dataset_string("NYU:root=/a:split=VAL", "/b") == "NYU:root=/a:split=VAL"
    with pytest.raises(ValueError, match="has no root: set datasets.root"):
        dataset_string("NYU:split=VAL", "")
    config = nyu_config(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "nyu" / "test" / "rgb_1.jpg")
    config.eval.batch_size = 3
    with pytest.raises(ValueError, match=r"30 x 40, 48 x 64 pixels: set transforms"):
        next(iter(make_eval_loader("NYU:split=VAL", config, tta=False)))
    assert issubclass(Depth, Tensor)
