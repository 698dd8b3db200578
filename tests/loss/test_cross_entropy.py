"""The chunked cross-entropy, and the DINO and iBOT losses that are made of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3.loss import DINOLoss, chunks, iBOTPatchLoss
from dinov3.loss.cross_entropy import soft_cross_entropy


def probabilities(*shape: int) -> Tensor:
    return torch.softmax(2 * torch.randn(shape), dim=-1)


def naive(logits: Tensor, targets: list[Tensor], temp: float) -> Tensor:
    log_probs = torch.log_softmax(logits.double() / temp, dim=-1)
    return -(torch.stack(targets).double() * log_probs).sum(dim=-1)


class LargestTensor(TorchDispatchMode):
    """Records the largest float32 tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("chunk", [1, 20, 1 << 24])
def test_value_and_gradient_equal_the_naive_ones(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", chunk)
    logits = torch.randn(3, 5, 7, requires_grad=True)
    targets = [probabilities(5, 7), 3 * probabilities(5, 7), torch.zeros(5, 7)]  # they need not sum to 1
    weights = torch.randn(3, 5)

    losses = soft_cross_entropy(logits, targets, 0.1)
    (losses * weights).sum().backward()
    expected = naive(logits, targets, 0.1)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_gradcheck() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    targets = [probabilities(3, 4).double() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets, 0.3), (logits,))


def test_a_second_backward_pass_adds_the_same_again() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = soft_cross_entropy(logits, [probabilities(3, 4)] * 2, 0.3).sum()
    (0.5 * loss).backward(retain_graph=True)
    assert logits.grad is not None
    first = logits.grad.clone()
    (-3 * loss).backward()
    torch.testing.assert_close(logits.grad, -5 * first)


def test_bfloat16_logits_give_float32_losses_and_no_full_size_float32_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 64)
    logits = torch.randn(4, 8, 32).bfloat16().requires_grad_()
    targets = [probabilities(8, 32).bfloat16()] * 4
    with LargestTensor() as largest:
        losses = soft_cross_entropy(logits, targets, 0.1)
        losses.sum().backward()
    assert largest.numel <= 64
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), naive(logits, targets, 0.1), rtol=1e-6, atol=1e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow() -> None:
    logits = (1e6 * torch.randn(1, 4, 6)).requires_grad_()
    losses = soft_cross_entropy(logits, [probabilities(4, 6)], 0.1)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("n_student", "n_teacher"), [(2, 2), (4, 2), (2, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino_is_the_mean_over_allowed_pairs(n_student: int, n_teacher: int, ignore_diagonal: bool) -> None:
    student, teacher = torch.randn(n_student, 5, 11, requires_grad=True), probabilities(n_teacher, 5, 11)
    loss = DINOLoss(11)(student, teacher, ignore_diagonal=ignore_diagonal)
    log_probs = torch.log_softmax(student.double() / 0.1, dim=-1)
    pairs = [
        -(teacher[t].double() * log_probs[s]).sum(dim=-1).mean()
        for s in range(n_student)
        for t in range(n_teacher)
        if not (ignore_diagonal and s == t)
    ]
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.autograd.grad(expected, student)[0], rtol=1e-5, atol=1e-7)


def test_dino_without_any_allowed_pair_is_zero() -> None:
    student = torch.randn(1, 3, 4, requires_grad=True)
    loss = DINOLoss(4)(student, probabilities(1, 3, 4), ignore_diagonal=True)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_dino_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 2, 4\)"):
        DINOLoss(4)(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))


def test_ibot_on_selected_patches_equals_ibot_on_whole_images() -> None:
    loss = iBOTPatchLoss(7)
    student, teacher, masks = torch.randn(4, 9, 7), probabilities(4, 9, 7), torch.rand(4, 9) > 0.5
    masks[2] = False
    selected = loss.forward_masked(student[masks], teacher[masks], masks)
    torch.testing.assert_close(selected, loss(student, teacher, masks))


def test_ibot_counts_rows_without_mask_and_the_first_patches_only() -> None:
    loss = iBOTPatchLoss(7)
    masks = torch.zeros(3, 4, dtype=torch.bool)
    masks[1, :2] = True
    student, teacher, weights = torch.randn(2, 7, requires_grad=True), probabilities(2, 7), torch.tensor([0.5, 2.0])
    per_patch = naive(student[None], [teacher], 0.1)[0].float()
    torch.testing.assert_close(loss.forward_masked(student, teacher, masks), per_patch.sum() / 2 / 3)
    first = loss.forward_masked(student, teacher, masks, n_masked_patches=1, masks_weight=weights)
    torch.testing.assert_close(first, per_patch[0] * 0.5 / 3)
    first.backward()
    assert not student.grad[1].any()


def test_ibot_without_masked_patches_is_zero() -> None:
    student = torch.empty(0, 7, requires_grad=True)
    masks = torch.zeros(3, 4, dtype=torch.bool)
    loss = iBOTPatchLoss(7).forward_masked(student, torch.empty(0, 7), masks)
    loss.backward()
    assert loss.item() == 0
