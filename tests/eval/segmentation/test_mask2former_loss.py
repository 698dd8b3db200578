"""Losses of Mask2Former: the assignment, what is zero, what is ignored, and the same with several processes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.segmentation.mask2former_loss import Mask2FormerLoss, labels_at, values_at
from dinov3.eval.segmentation.matcher import assign, pairwise_costs
from tests.helpers.distributed import run_distributed

WEIGHTS = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0}


def quadrants(size: int = 16) -> Tensor:
    """Labels 0 to 3 of the quarters of an image, [1, size, size]."""
    half = torch.arange(size) // (size // 2)
    return (2 * half[:, None] + half[None])[None]


def outputs_for(labels: Tensor, classes: int, queries: int, sure: float = 30.0) -> dict[str, Any]:
    """Predictions that are right: query q - 1 - c answers for class c, the others see nothing."""
    logits = torch.zeros(len(labels), queries, classes + 1)
    logits[..., -1] = sure
    masks = torch.full((len(labels), queries, *labels.shape[-2:]), -sure)
    for i, label in enumerate(labels):
        for c in label.unique().tolist():
            if c != 255:
                q = queries - 1 - c
                logits[i, q] = 0
                logits[i, q, c] = sure
                masks[i, q] = torch.where(label == c, sure, -sure)
    return {"pred_logits": logits, "pred_masks": masks}


def test_costs_are_those_of_the_definitions() -> None:
    torch.manual_seed(0)
    class_logits, mask_logits = torch.randn(5, 4), torch.randn(5, 30)
    classes, masks = torch.tensor([2, 0]), torch.rand(2, 30) > 0.5
    valid = (torch.rand(30) > 0.3).float()
    costs = pairwise_costs(class_logits, mask_logits, classes, masks, valid, **WEIGHTS)
    keep = valid.bool()
    for q, m in itertools.product(range(5), range(2)):
        logits, target = mask_logits[q, keep], masks[m, keep].float()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
        expected = -2 * class_logits[q].softmax(-1)[classes[m]] + 5 * entropy + 5 * dice
        torch.testing.assert_close(costs[q, m], expected)


def test_the_assignment_is_the_cheapest_of_all() -> None:
    torch.manual_seed(0)
    costs = [torch.rand(5, 3), torch.rand(5, 0), torch.rand(5, 2)]
    pairs = assign(costs)
    for cost, (rows, columns) in zip(costs, pairs, strict=True):
        assert sorted(columns.tolist()) == list(range(cost.shape[1]))
        least = min(
            sum(float(cost[q, m]) for m, q in enumerate(chosen))
            for chosen in itertools.permutations(range(5), cost.shape[1])
        )
        assert float(cost[rows, columns].sum()) == pytest.approx(least)
    assert assign([]) == []
    with pytest.raises(FloatingPointError, match=r"diverged; lower optimizer\.lr"):
        assign([torch.tensor([[float("nan")]])])


def test_right_predictions_cost_nothing_whatever_query_makes_them() -> None:
    labels = quadrants()
    losses = Mask2FormerLoss(4, n_points=200)(outputs_for(labels, 4, 7), labels)
    assert set(losses) == {"loss_class", "loss_mask", "loss_dice"}
    assert losses["loss_class"] < 1e-3
    # Points beside borders are sampled between a right and a wrong pixel.
    assert losses["loss_dice"] < 1.5
    blurred = outputs_for(labels, 4, 7)
    blurred["pred_masks"] = blurred["pred_masks"].roll(4, dims=-1)
    worse = Mask2FormerLoss(4, n_points=200)(blurred, labels)
    assert worse["loss_mask"] > 3 * losses["loss_mask"]
    assert worse["loss_dice"] > losses["loss_dice"] + 1


def test_ignored_pixels_count_nowhere() -> None:
    labels = quadrants()
    labels[:, :8, :8] = 255
    outputs = outputs_for(labels, 4, 5)
    criterion = Mask2FormerLoss(4, n_points=100)
    torch.manual_seed(1)
    first = criterion(outputs, labels)
    outputs["pred_masks"][..., :7, :7] = 3.0  # a wrong answer inside the ignored quarter; bilinear reach stays in it
    torch.manual_seed(1)
    second = criterion(outputs, labels)
    assert float(second["loss_class"]) == float(first["loss_class"])
    # Uncertain points lie elsewhere now, but nothing wrong is seen.
    assert second["loss_mask"] < first["loss_mask"] + 0.5


def test_images_without_any_label_train_the_classification_alone() -> None:
    labels = torch.full((2, 8, 8), 255)
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    masks = torch.zeros(2, 3, 8, 8, requires_grad=True)
    losses = Mask2FormerLoss(4, n_points=20)({"pred_logits": logits, "pred_masks": masks}, labels)
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert masks.grad is not None  # in the graph: processes average the same tensors
    assert not masks.grad.any()


def test_losses_of_all_layers_are_added() -> None:
    labels = quadrants()
    outputs = outputs_for(labels, 4, 5, sure=1.0)
    criterion = Mask2FormerLoss(4, n_points=4000)
    alone = criterion(outputs, labels)
    three = criterion({**outputs, "aux_outputs": [outputs, outputs]}, labels)
    for name, value in alone.items():
        assert float(three[name]) == pytest.approx(3 * float(value), rel=0.05)


def test_gradients_lead_to_the_right_segments() -> None:
    labels = quadrants()
    logits, masks = torch.randn(1, 6, 5).requires_grad_(), torch.randn(1, 6, 16, 16).requires_grad_()
    optimizer = torch.optim.Adam([logits, masks], lr=0.3)
    criterion = Mask2FormerLoss(4, n_points=150)
    for _ in range(60):
        optimizer.zero_grad()
        sum(criterion({"pred_logits": logits, "pred_masks": masks}, labels).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    semantic = torch.einsum("bqk,bqhw->bkhw", logits.softmax(-1)[..., :-1], masks.sigmoid())
    assert (semantic.argmax(1) == labels).float().mean() > 0.98


def test_uncertain_points_are_chosen() -> None:
    masks = torch.full((1, 1, 10, 10), 9.0)
    masks[..., 4:6] = 0.0  # a band in which nothing is certain
    criterion = Mask2FormerLoss(2, n_points=100, importance_sample_ratio=0.75, oversample_ratio=6)
    points = criterion._draw_points(masks)
    assert points.shape == (1, 100, 2)
    in_band = ((points[..., 0] > 0.35) & (points[..., 0] < 0.65)).float().mean()
    assert in_band > 0.75


def test_points_lie_in_pixels() -> None:
    labels = torch.arange(12).view(1, 3, 4)
    centres = torch.stack(torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(3) + 0.5) / 3, indexing="xy"), -1)
    points = centres.view(1, 12, 2)
    assert labels_at(labels, points).tolist() == labels.flatten(1).tolist()
    torch.testing.assert_close(values_at(labels[:, None].float(), points)[:, 0], labels.flatten(1).float())
    assert labels_at(labels, torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])).tolist() == [[0, 11]]


def _dice_of_rank(counts: list[int]) -> float:
    import torch.distributed as dist

    labels = quadrants()
    labels[labels >= counts[dist.get_rank()]] = 255
    outputs = outputs_for(labels, 4, 5)
    outputs["pred_masks"] = torch.full_like(outputs["pred_masks"], -30.0)  # dice is almost 1 for each segment
    return float(Mask2FormerLoss(4, n_points=500)(outputs, labels)["loss_dice"])


def test_segments_of_all_processes_weigh_the_same(tmp_path: Path) -> None:
    one, three = run_distributed(_dice_of_rank, 2, tmp_path, [1, 3])
    assert one == pytest.approx(5 * 1 / 2, rel=0.05)
    assert three == pytest.approx(5 * 3 / 2, rel=0.05)


def test_impossible_points_are_named() -> None:
    with pytest.raises(ValueError, match="n_points >= 1, .* got 0, 3"):
        Mask2FormerLoss(2, n_points=0)
