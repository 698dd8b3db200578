"""Linear layers outside autograd: the same numbers, and nobody is passed over."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov3.layers import linear as owner
from dinov3.layers.linear import apply_linear, apply_linear_and_activation, feed_forward, linear


def uses_onednn(call: Callable[[], object]) -> bool:
    with patch.object(owner, "_product", wraps=owner._product) as product:
        call()
    return product.called


has_onednn = pytest.mark.skipif(not owner._HAS_ONEDNN, reason="this torch is built without oneDNN")


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (1, 1, 8), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(8, 12, bias=bias), torch.randn(shape)
    with torch.no_grad():
        wanted = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(apply_linear(layer, x), wanted)
        torch.testing.assert_close(
            apply_linear_and_activation(layer, nn.GELU(), x), F.gelu(wanted), rtol=1e-4, atol=1e-6
        )


def test_any_layout_will_do() -> None:
    layer = nn.Linear(8, 12)
    x = torch.randn(2, 8, 5).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(apply_linear(layer, x), layer(x))
        torch.testing.assert_close(apply_linear(layer, x[:, ::2]), layer(x[:, ::2]))
        torch.testing.assert_close(linear(x, layer.weight[::2], layer.bias[::2]), layer(x)[..., ::2])


@has_onednn
def test_it_is_used_outside_autograd_only() -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 8)
    assert not uses_onednn(lambda: apply_linear(layer, x))
    with torch.no_grad():
        assert uses_onednn(lambda: apply_linear(layer, x))
        assert uses_onednn(lambda: apply_linear_and_activation(layer, nn.GELU(), x))
        assert not uses_onednn(lambda: apply_linear(nn.Linear(8, 12).double(), x.double()))
    with torch.inference_mode():
        assert uses_onednn(lambda: apply_linear(layer, x))
    x = x.requires_grad_()
    assert apply_linear_and_activation(layer, nn.GELU(), x).requires_grad


@torch.no_grad()
def test_subclasses_and_hooks_are_called() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(2, 8)
    twice = Twice(8, 12)
    torch.testing.assert_close(apply_linear(twice, x), 2 * F.linear(x, twice.weight, twice.bias))

    layer, act, seen = nn.Linear(8, 12), nn.GELU(), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    act.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    apply_linear_and_activation(layer, act, x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(seen[1], seen[0])


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(approximate="tanh")])
def test_other_activations(activation: nn.Module) -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 8)
    torch.testing.assert_close(apply_linear_and_activation(layer, activation, x), activation(layer(x)))


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.GELU()])
def test_feed_forward_by_some_rows_at_a_time(activation: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, dropout = nn.Linear(8, 12), nn.Linear(12, 5), nn.Dropout().eval()
    x = torch.randn(2, 3, 10, 8)[:, :, ::2]
    wanted = second(activation(first(x)))
    for numbers in (1, 48, 2**21):
        monkeypatch.setattr(owner, "_HIDDEN_NUMBERS", numbers)
        torch.testing.assert_close(feed_forward(x, first, activation, dropout, second), wanted, rtol=1e-4, atol=1e-6)

    monkeypatch.setattr(owner, "_HIDDEN_NUMBERS", 48)
    seen: list[Tensor] = []
    activation.register_forward_hook(lambda module, args, out: seen.append(out))
    feed_forward(x, first, activation, dropout, second)
    assert [out.shape for out in seen] == [(2, 3, 5, 12)]


@torch.no_grad()
def test_operations_are_counted() -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 8)
    with FlopCounterMode(display=False) as counter:
        apply_linear(layer, x)
    assert counter.get_total_flops() == 2 * 2 * 8 * 12
