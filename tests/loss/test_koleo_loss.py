import math

import pytest
import torch

from dinov3.loss import KoLeoLoss, KoLeoLossDistributed


def test_two_orthogonal_vectors() -> None:
    loss = KoLeoLoss()(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))  # normalised, they are sqrt(2) apart
    assert loss.item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)


@pytest.mark.parametrize("loss", [KoLeoLoss(), KoLeoLossDistributed(), KoLeoLossDistributed(topk=3)])
def test_does_not_depend_on_order_or_length_of_vectors(loss: torch.nn.Module) -> None:
    x = torch.randn(9, 6)
    permuted = (x * torch.rand(9, 1).add(0.1))[torch.randperm(9)]
    torch.testing.assert_close(loss(permuted), loss(x))


def test_gradient_flows_through_both_ends_of_a_pair() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(KoLeoLoss(), (x,))
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(KoLeoLossDistributed(topk=2), (x,))


def test_distributed_on_one_process_equals_local() -> None:
    x = torch.randn(8, 6)
    assert torch.equal(KoLeoLossDistributed()(x), KoLeoLoss()(x))


@pytest.mark.parametrize("loss", [KoLeoLoss(), KoLeoLossDistributed()])
@pytest.mark.parametrize("n", [2, 5])
def test_duplicates_are_finite(loss: torch.nn.Module, n: int) -> None:
    x = torch.randn(1, 6).repeat(n, 1).requires_grad_()
    value = loss(x)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


def test_zero_vectors_are_finite() -> None:
    x = torch.zeros(3, 6, requires_grad=True)
    value = KoLeoLoss()(x)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("loss", [KoLeoLoss(), KoLeoLossDistributed()])
def test_single_sample_has_no_loss_and_no_gradient(loss: torch.nn.Module) -> None:
    x = torch.randn(1, 6, requires_grad=True)
    value = loss(x)
    value.backward()
    assert value.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("loss", [KoLeoLoss(), KoLeoLossDistributed(topk=2)])
def test_computes_in_float32_for_bfloat16_and_under_autocast(loss: torch.nn.Module) -> None:
    x = torch.randn(8, 6).bfloat16()
    expected = loss(x.float())
    assert torch.equal(loss(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x), expected)


@pytest.mark.parametrize(
    ("topk", "group_size", "message"),
    [
        (1, 6, r"batch of a rank \(4\).*got 6"),
        (1, 8, r"all ranks \(4\), got 8"),
        (4, None, "at least 5 samples, got 4"),
    ],
)
def test_bad_group_sizes(topk: int, group_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KoLeoLossDistributed(topk, group_size)(torch.randn(4, 3))
