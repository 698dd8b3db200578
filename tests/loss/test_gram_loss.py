import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.loss import GramLoss


def similarities(x: Tensor) -> Tensor:
    x = F.normalize(x.double(), dim=-1)
    return x @ x.T


def test_image_level_is_the_mean_over_images() -> None:
    student, teacher = torch.randn(3, 5, 8), torch.randn(3, 5, 6)  # widths may differ
    loss = GramLoss(remove_neg=False)(student, teacher, img_level=True)
    images = [(similarities(s) - similarities(t)).square().mean() for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss.double(), torch.stack(images).mean(), rtol=1e-5, atol=1e-7)


def test_batch_level_compares_all_patches() -> None:
    student, teacher = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    loss_fn = GramLoss(remove_neg=False)
    loss = loss_fn(student, teacher, img_level=False)
    expected = (similarities(student.flatten(0, 1)) - similarities(teacher.flatten(0, 1))).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(loss_fn(student.flatten(0, 1), teacher.flatten(0, 1), img_level=False), loss)


def test_rotated_features_have_no_loss_and_order_matters() -> None:
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    x = torch.randn(2, 5, 8)
    assert GramLoss(remove_neg=False)(x @ rotation, 3 * x).item() < 1e-10
    assert GramLoss(remove_neg=False)(x.flip(1), x).item() > 1e-3


@pytest.mark.parametrize(("options", "student_clamped"), [({}, True), (
    {"remove_neg": False, "remove_only_teacher_neg": True}, False)])  # fmt: skip
def test_negative_similarities(options: dict[str, bool], student_clamped: bool) -> None:
    opposite, orthogonal = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.eye(2)
    loss_fn = GramLoss(**options)
    assert loss_fn(orthogonal, opposite, img_level=False).item() == 0  # the target's -1 counts as 0
    assert (loss_fn(opposite, orthogonal, img_level=False).item() == 0) == student_clamped


def test_gradcheck() -> None:
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: GramLoss()(x, teacher), (student,))


def test_computes_in_float32_for_bfloat16_and_under_autocast() -> None:
    student, teacher = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    expected = GramLoss()(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GramLoss()(student, teacher), expected)


def test_both_removals_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        GramLoss(remove_neg=True, remove_only_teacher_neg=True)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 5, 4\)"):
        GramLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"img_level=False for \[n, D\]\), got \(3, 4\)"):
        GramLoss()(torch.zeros(3, 4), torch.zeros(3, 4), img_level=True)
