import pytest
import torch
from torch import Tensor

from dinov3.loss import DINOLoss, chunks, iBOTPatchLoss
from dinov3.loss.sinkhorn_knopp import sinkhorn_knopp


def textbook(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """The algorithm as the paper writes it, in float64 without any care for range."""
    q = torch.exp(logits.double() / temp).T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(n_iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / n
    return (q * n).T


@pytest.mark.parametrize(("shape", "n_iterations"), [((6, 10), 3), ((40, 7), 1), ((1, 5), 2), ((9, 1), 3)])
def test_equals_textbook_algorithm(shape: tuple[int, int], n_iterations: int) -> None:
    logits = torch.randn(shape)
    result = sinkhorn_knopp(logits, 0.07, n_iterations=n_iterations)
    torch.testing.assert_close(result.double(), textbook(logits, 0.07, n_iterations), rtol=1e-5, atol=1e-7)
    assert result.dtype == torch.float32


def test_rows_are_probabilities_and_prototypes_are_used_evenly() -> None:
    q = sinkhorn_knopp(torch.randn(30, 12), 0.5, n_iterations=100)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(30))
    torch.testing.assert_close(q.sum(dim=0), torch.full((12,), 30 / 12), rtol=1e-4, atol=0)


def test_does_not_depend_on_what_all_logits_or_all_samples_share() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64)
    q = sinkhorn_knopp(logits, 0.07)
    torch.testing.assert_close(sinkhorn_knopp(logits + 3.0, 0.07), q)
    torch.testing.assert_close(sinkhorn_knopp(logits + torch.randn(5).double(), 0.07), q)
    torch.testing.assert_close(sinkhorn_knopp(2 * logits, 0.14), q)


def test_order_of_samples_is_kept() -> None:
    logits, order = torch.randn(8, 5), torch.randperm(8)
    torch.testing.assert_close(sinkhorn_knopp(logits[order], 0.1), sinkhorn_knopp(logits, 0.1)[order])


def test_logits_beyond_the_range_of_float32_exponentials() -> None:
    logits = 4 * torch.randn(12, 9)  # logits / temp reach 200, exp(88) is the largest finite number
    logits[3] -= 6.0  # and one sample is far below the others everywhere
    assert not torch.exp(logits / 0.04).isfinite().all()
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.04).double(), textbook(logits, 0.04), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_stays_finite_for_any_range(scale: float) -> None:
    q = sinkhorn_knopp(scale * torch.randn(12, 9), 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(12))


def test_rows_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 6)
    whole = sinkhorn_knopp(logits, 0.1)
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 13)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1), whole)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(6, 4).bfloat16()
    before = logits.clone()
    result = sinkhorn_knopp(logits, 0.07)
    assert torch.equal(result, sinkhorn_knopp(logits.float(), 0.07))
    assert torch.equal(logits, before)


def test_arguments_are_left_alone_and_no_gradient_is_recorded() -> None:
    logits, count = torch.randn(6, 4, requires_grad=True), torch.tensor([6])
    before = logits.detach().clone()
    result = iBOTPatchLoss(4).sinkhorn_knopp_teacher(logits, teacher_temp=0.07, n_masked_patches_tensor=count)
    assert torch.equal(logits, before)
    assert count.item() == 6
    assert not result.requires_grad


def test_without_samples() -> None:
    assert sinkhorn_knopp(torch.empty(0, 7), 0.07).shape == (0, 7)


def test_nan_is_not_hidden() -> None:
    logits = torch.randn(4, 3)
    logits[1, 2] = torch.nan
    assert sinkhorn_knopp(logits, 0.07).isnan().any()


@pytest.mark.parametrize(("shape", "n_iterations", "message"), [((3,), 3, r"\(3,\)"), ((3, 2), 0, "at least 1, got 0")])
def test_bad_input(shape: tuple[int, ...], n_iterations: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn_knopp(torch.zeros(shape), 0.07, n_iterations=n_iterations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_may_take_the_place_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 4, dtype=dtype)
    wanted = sinkhorn_knopp(logits, 0.07)
    targets = sinkhorn_knopp(logits, 0.07, inplace=True)
    assert torch.equal(targets, wanted)
    assert torch.equal(logits, wanted)


def test_narrow_logits_have_no_place_for_the_targets() -> None:
    logits = torch.randn(6, 4).bfloat16()
    before = logits.clone()
    for targets in (
        iBOTPatchLoss(4).sinkhorn_knopp_teacher(logits, 0.07, inplace=True),
        DINOLoss(4).sinkhorn_knopp_teacher(logits, 0.07, inplace=True),
    ):
        assert torch.equal(targets, sinkhorn_knopp(logits, 0.07))
    assert torch.equal(logits, before)


def test_the_temperature_may_be_a_tensor() -> None:
    logits = torch.randn(6, 4)
    for temp in (torch.tensor(0.07), torch.tensor([0.07], dtype=torch.float64)):
        torch.testing.assert_close(sinkhorn_knopp(logits, temp), sinkhorn_knopp(logits, 0.07))
