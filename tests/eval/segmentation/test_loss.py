"""Losses of the linear head: their averages, ignored pixels, what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov3.eval.segmentation.loss import CrossEntropyLoss, DiceLoss, MultilabelDiceLoss, MultiSegmentationLoss

K = 4


@pytest.fixture
def pred() -> torch.Tensor:
    return torch.randn(2, K, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.fixture
def label() -> torch.Tensor:
    label = torch.randint(0, K, (2, 5, 6), generator=torch.Generator().manual_seed(1))
    label[0, 0] = 255
    return label


def test_the_mean_counts_ignored_pixels_unless_told_not_to(pred: torch.Tensor, label: torch.Tensor) -> None:
    total = F.cross_entropy(pred, label, ignore_index=255, reduction="sum")
    torch.testing.assert_close(CrossEntropyLoss()(pred, label), total / 60)
    torch.testing.assert_close(CrossEntropyLoss(avg_non_ignore=True)(pred, label), total / 54)
    torch.testing.assert_close(CrossEntropyLoss(avg_non_ignore=True, avg_factor=7.0)(pred, label), total / 60)
    torch.testing.assert_close(CrossEntropyLoss(reduction="sum", loss_weight=2)(pred, label), 2 * total)
    assert CrossEntropyLoss(reduction="none")(pred, label).shape == label.shape


def test_weights_of_classes_and_pixels_multiply(pred: torch.Tensor, label: torch.Tensor) -> None:
    class_weight, weight = [1.0, 2.0, 0.0, 0.5], torch.rand(2, 5, 6)
    plain = F.cross_entropy(pred, label, ignore_index=255, reduction="none")
    factor = torch.tensor([*class_weight, 0.0])[label.clamp(max=K)] * weight
    got = CrossEntropyLoss(weight=weight, class_weight=class_weight)(pred, label)
    torch.testing.assert_close(got, (plain * factor).mean())


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), DiceLoss(), MultiSegmentationLoss(1.0, 0.0)])
def test_a_batch_without_labels_is_finite(loss: torch.nn.Module, pred: torch.Tensor) -> None:
    value = loss(pred, torch.full((2, 5, 6), 255))
    value.backward()
    assert value.isfinite()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


def test_dice_is_zero_for_a_perfect_prediction_and_takes_weights_from_a_file(tmp_path: Path) -> None:
    label = torch.arange(K).repeat(6).view(1, 4, 6)
    perfect = 100.0 * F.one_hot(label, K).movedim(-1, 1)
    torch.testing.assert_close(DiceLoss()(perfect, label), torch.tensor(0.0))
    np.save(tmp_path / "weights.npy", np.array([0.0, 0.0, 3.0, 0.0]))
    pred = torch.randn(1, K, 4, 6)
    from_file = DiceLoss(class_weight=tmp_path / "weights.npy")(pred, label)
    torch.testing.assert_close(from_file, DiceLoss(class_weight=[0, 0, 3, 0])(pred, label))
    torch.testing.assert_close(DiceLoss()(pred, label, avg_factor=4.0), DiceLoss()(pred, label) / 4)
    left_out = DiceLoss(ignore_index=2, class_weight=[0.0, 0.0, 3.0, 0.0])(pred, label)
    assert left_out == 0


def test_dice_of_index_labels_is_that_of_one_hot_labels(pred: torch.Tensor, label: torch.Tensor) -> None:
    one_hot = torch.stack([label == k for k in range(K)], dim=1)
    loss = MultiSegmentationLoss(diceloss_weight=0.5, celoss_weight=0.0)
    torch.testing.assert_close(loss(pred, label), 0.5 * MultilabelDiceLoss()(pred, one_hot))
    torch.testing.assert_close(loss(pred, one_hot), loss(pred, label))


def test_dice_wins_and_says_so(pred: torch.Tensor, label: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        both = MultiSegmentationLoss(1.0, 1.0)
    assert "celoss_weight is ignored" in caplog.text
    torch.testing.assert_close(both(pred, label), MultiSegmentationLoss(1.0, 0.0)(pred, label))
    torch.testing.assert_close(MultiSegmentationLoss(0.0, 2.0)(pred, label), 2 * CrossEntropyLoss()(pred, label))


def test_what_makes_no_sense_is_refused(pred: torch.Tensor, label: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one positive weight .* got diceloss_weight=0.0, celoss_weight=0.0"):
        MultiSegmentationLoss(0.0, 0.0)
    with pytest.raises(ValueError, match="none that is negative"):
        MultiSegmentationLoss(1.0, -1.0)
    with pytest.raises(ValueError, match="reduction is 'none', 'mean' or 'sum', got 'avg'"):
        CrossEntropyLoss(reduction="avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels of the logits' shape"):
        MultilabelDiceLoss()(pred, label)
