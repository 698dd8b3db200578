"""Matching and losses: hard inputs, counts, and which quantities carry gradients."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.detection.loss import LossWeights, SetCriterion, mean_count
from dinov3.eval.detection.matcher import Costs, match
from tests.eval.detection.tiny import tiny_detector
from tests.golden.fill import fill
from tests.helpers.distributed import run_distributed


def _target(*labels: int) -> dict[str, Tensor]:
    boxes = torch.tensor([[20.0 + 9 * i, 30.0, 12.0, 16.0] for i in range(len(labels))]).reshape(-1, 4)
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}


def _outputs(n_images: int, n_queries: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(n_images, n_queries, 4, generator=generator) * 30 + 10
    return {
        "pred_logits": torch.randn(n_images, n_queries, 5, generator=generator, requires_grad=True),
        "pred_boxes": boxes.requires_grad_(),
        "pred_boxes_old": (boxes.detach() + 1).requires_grad_(),
        "pred_deltas": torch.zeros(n_images, n_queries, 4, requires_grad=True),
    }


def test_the_query_on_the_object_is_matched() -> None:
    outputs, target = _outputs(1), _target(2)
    with torch.no_grad():
        outputs["pred_boxes"][0, 4] = outputs["pred_boxes_old"][0, 4] = target["boxes"][0]
    ((rows, columns),) = match(outputs, [target], Costs())
    assert (rows.tolist(), columns.tolist()) == ([4], [0])


def test_costs_that_are_no_numbers_are_matched_last() -> None:
    outputs = _outputs(1, n_queries=3)
    with torch.no_grad():
        outputs["pred_logits"][0, 0] = math.nan
        outputs["pred_boxes"][0, 1] = math.nan
    ((rows, _),) = match(outputs, [_target(1)], Costs())
    assert rows.tolist() == [2]
    ((rows, columns),) = match(outputs, [_target(1, 2, 3, 4)], Costs())  # more objects than queries
    assert len(rows) == len(columns) == 3


@pytest.mark.parametrize("cls_loss", ["focal", "ia_bce"])
def test_images_without_objects_train_classes_only(cls_loss: str) -> None:
    outputs = _outputs(2)
    criterion = SetCriterion(weights=LossWeights(cls_loss=cls_loss))
    losses = criterion(outputs, [_target(), _target()])
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    assert losses["loss_ce"].item() > 0
    criterion.total(losses).backward()
    for name in ("pred_logits", "pred_boxes", "pred_deltas"):  # so that all processes have the same gradients
        assert outputs[name].grad is not None
        assert bool(outputs[name].grad.isfinite().all())


def test_losses_are_per_object() -> None:
    outputs = _outputs(2)
    targets = [_target(1, 2), _target(3)]
    both = SetCriterion()(outputs, targets)
    single = [
        SetCriterion()({key: value[i : i + 1] for key, value in outputs.items()}, [target])
        for i, target in enumerate(targets)
    ]
    for name, value in both.items():
        torch.testing.assert_close(value, (single[0][name] * 2 + single[1][name]) / 3)


def test_what_is_aimed_at_carries_no_gradient() -> None:
    outputs = _outputs(1)
    SetCriterion()(outputs, [_target(1)])["loss_bbox"].backward()
    assert outputs["pred_boxes_old"].grad is None
    assert outputs["pred_deltas"].grad is not None


def test_every_output_of_the_detector_is_trained() -> None:
    detector = fill(tiny_detector()).train()
    outputs = detector([torch.randn(3, 64, 64), torch.randn(3, 48, 64)])
    criterion = SetCriterion(k_one2many=2, lambda_one2many=0.5)
    losses = criterion(outputs, [_target(1, 2), _target()])
    parts = [f"loss_{kind}" for kind in ("ce", "bbox", "giou")]
    suffixes = ["", "_0", "_enc", "_one2many", "_0_one2many"]
    assert sorted(losses) == sorted(part + suffix for part in parts for suffix in suffixes)
    criterion.total(losses).backward()
    missing = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_perfect_boxes_cost_nothing() -> None:
    target = _target(1, 2)
    outputs = {
        "pred_logits": torch.full((1, 2, 5), -20.0).scatter_(2, target["labels"][None, :, None], 20.0),
        "pred_boxes": target["boxes"][None] / 100,
    }
    relative = [{"labels": target["labels"], "boxes": target["boxes"] / 100}]
    for cls_loss in ("focal", "ia_bce"):
        losses = SetCriterion(Costs(bbox=5.0), LossWeights(bbox=5.0, cls_loss=cls_loss))(outputs, relative)
        assert all(float(value) < 1e-6 for value in losses.values())


def test_unknown_class_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="cls_loss must be one of focal, ia_bce; got 'bce'"):
        LossWeights(cls_loss="bce")


def _counts(_: Any = None) -> float:
    rank = torch.distributed.get_rank()
    return mean_count([_target(*[1] * (3 * rank + 1))], torch.device("cpu"))


def test_objects_are_counted_over_all_processes(tmp_path: Path) -> None:
    assert mean_count([_target()], torch.device("cpu")) == 1
    assert run_distributed(_counts, 2, tmp_path) == [2.5, 2.5]
