"""Metrics, valid pixels, alignment."""

import math

import pytest
import torch

from dinov3.eval.depth.datasets.datasets_utils import make_valid_mask
from dinov3.eval.depth.metrics import METRICS, calculate_depth_metrics, check_metrics
from dinov3.eval.depth.utils import align_depth_least_square


def test_values_by_hand() -> None:
    gt, pred = torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([1.0, 1.0, 4.4, 7.0])
    got = calculate_depth_metrics(gt, pred, torch.ones(4, dtype=torch.bool))
    assert tuple(got) == METRICS
    logs = [0.0, math.log(2), math.log(4 / 4.4)]
    mean_square, mean = sum(x * x for x in logs) / 3, sum(logs) / 3
    want = {
        "a1": 2 / 3,
        "a3": 2 / 3,
        "abs_rel": (0.5 + 0.1) / 3,
        "rmse": math.sqrt((1 + 0.16) / 3),
        "mae": 1.4 / 3,
        "rmse_log": math.sqrt(mean_square),
        "silog": 100 * math.sqrt(mean_square - mean * mean),
    }
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value, rel=1e-5), name


def test_a_perfect_prediction_and_an_empty_mask() -> None:
    gt = 1 + torch.rand(1, 1, 5, 5)
    perfect = calculate_depth_metrics(gt, gt, torch.ones_like(gt, dtype=torch.bool))
    assert [perfect[name].item() for name in METRICS] == [1.0, 1.0, 1.0] + [0.0] * 7
    nothing = calculate_depth_metrics(gt, gt, torch.zeros_like(gt, dtype=torch.bool))
    assert nothing.pop("silog") == 0
    assert all(value.isnan() for value in nothing.values())
    with pytest.raises(ValueError, match=r"unknown metrics \['rsme'\]"):
        check_metrics(["rsme"])


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [
        ("FULL", (0, 480), (0, 640)),
        ("NYU_EIGEN", (45, 471), (41, 601)),
        ("nyu_eigen", (45, 471), (41, 601)),
        ("KITTI_EIGEN", (159, 438), (23, 616)),
        ("GARG", (195, 476), (23, 616)),
    ],
)
def test_crops(crop: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    depth = torch.ones(1, 1, 480, 640)
    depth[0, 0, 200, 100:102] = torch.tensor([0.0, torch.nan])
    mask = make_valid_mask(depth, crop)
    inside = (rows[1] - rows[0]) * (columns[1] - columns[0])
    assert mask.sum() == inside - 2
    assert mask[0, 0, rows[0], columns[0]]
    assert mask[0, 0, rows[1] - 1, columns[1] - 1]
    with pytest.raises(ValueError, match="unknown eval_mask 'EIGEN'; known: FULL, NYU_EIGEN"):
        make_valid_mask(depth, "EIGEN")


def test_alignment_finds_scale_and_shift_and_has_an_answer_for_everything() -> None:
    pred, mask = 1 + torch.rand(1, 1, 9, 9), torch.rand(1, 1, 9, 9) > 0.4
    gt = torch.where(mask, 2.5 * pred - 0.7, torch.nan)
    aligned, scale, shift = align_depth_least_square(gt, pred, mask)
    torch.testing.assert_close(torch.stack([scale, shift]), torch.tensor([2.5, -0.7]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aligned[mask], gt[mask], rtol=1e-5, atol=1e-5)
    nothing = torch.zeros_like(mask)
    one = nothing.clone()
    one[0, 0, 3, 3] = True
    for hopeless, valid in ((pred, nothing), (pred, one), (torch.full_like(pred, 3.3), mask)):
        aligned, scale, shift = align_depth_least_square(1 + torch.rand_like(pred), hopeless, valid)
        assert (scale, shift) == (1, 0)
        torch.testing.assert_close(aligned, hopeless)
