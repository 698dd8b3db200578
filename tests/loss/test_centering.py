import pytest
import torch

from dinov3.loss import DINOLoss, iBOTPatchLoss


@pytest.mark.parametrize(("loss", "shape"), [(DINOLoss(4), (1, 4)), (iBOTPatchLoss(4), (1, 1, 4))])
def test_center_is_in_the_state_dict_and_invalid_until_initialised(loss: DINOLoss, shape: tuple[int, ...]) -> None:
    assert list(loss.state_dict()) == ["center"]
    assert loss.center.shape == shape
    assert loss.center.isnan().all()
    loss.init_weights()
    assert not loss.center.any()


def test_update_waits_until_the_center_is_needed() -> None:
    loss = DINOLoss(3, center_momentum=0.9)
    loss.init_weights()
    x = torch.randn(6, 3)
    loss.update_center(x)
    without = loss.softmax_center_teacher(x, 0.1, update_centers=False)
    torch.testing.assert_close(without, torch.softmax(x / 0.1, dim=-1))
    torch.testing.assert_close(loss.softmax_center_teacher(x, 0.1), torch.softmax((x - loss.center) / 0.1, dim=-1))
    torch.testing.assert_close(loss.center, 0.1 * x.mean(dim=0, keepdim=True))
    center = loss.center.clone()
    loss.apply_center_update()  # nothing is pending
    assert torch.equal(loss.center, center)


def test_two_updates_in_a_row_both_count() -> None:
    loss = iBOTPatchLoss(3, center_momentum=0.5)
    loss.init_weights()
    a, b = torch.randn(2, 5, 3), torch.randn(4, 5, 3)
    loss.update_center(a)
    loss.update_center(b)
    loss.apply_center_update()
    torch.testing.assert_close(loss.center.flatten(), 0.25 * a.mean(dim=(0, 1)) + 0.5 * b.mean(dim=(0, 1)))
