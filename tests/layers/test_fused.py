"""Layers taken together in training: the numbers and gradients of the layers one by one, with less kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.layers import SelfAttentionBlock, fused
from dinov3.layers import block as block_module


def make_block(scale: float | None, mask_k_bias: bool, dtype: torch.dtype = torch.float64) -> SelfAttentionBlock:
    torch.manual_seed(0)
    block = SelfAttentionBlock(
        dim=16, num_heads=2, qkv_bias=True, init_values=scale, mask_k_bias=mask_k_bias, drop_path=0.3
    )
    for param in block.parameters():
        nn.init.normal_(param)
    return block.to(dtype).train()


def step(block: SelfAttentionBlock, x: Tensor, **options: object) -> list[Tensor]:
    """Output and all gradients."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = block(
        [x], [(torch.linspace(-1, 1, 32).view(4, 8).to(x), torch.linspace(0, 1, 32).view(4, 8).to(x))], **options
    )
    loss = (out[0] * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).sum()
    wanted = [param for param in block.parameters() if param.requires_grad]
    return [out[0].detach(), *torch.autograd.grad(loss, [x, *wanted])]


@pytest.mark.parametrize("mask_k_bias", [False, True])
@pytest.mark.parametrize("scale", [0.5, None])
@pytest.mark.parametrize("rows", [None, [0, 3, 7, 21]])
def test_a_block_gives_the_gradients_of_its_layers(
    monkeypatch: pytest.MonkeyPatch, scale: float | None, mask_k_bias: bool, rows: list[int] | None
) -> None:
    block, x = make_block(scale, mask_k_bias), torch.randn(6, 5, 16, dtype=torch.float64)
    options: dict[str, object] = {} if rows is None else {"rows_list": [torch.tensor(rows)]}
    monkeypatch.setattr(fused, "_NUMBERS_AT_A_TIME", 160)  # several parts
    together = step(block, x, **options)
    monkeypatch.setattr(block_module, "may_fuse", lambda: False)
    for got, want in zip(together, step(block, x, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"])
def test_frozen_parameters_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    block, x = make_block(0.5, False), torch.randn(6, 5, 16, dtype=torch.float64)
    block.get_parameter(frozen).requires_grad_(False)
    together = step(block, x)
    monkeypatch.setattr(block_module, "may_fuse", lambda: False)
    for got, want in zip(together, step(block, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_less_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> int:
        block = make_block(0.5, False, torch.float32)
        x, found = torch.randn(64, 5, 16, requires_grad=True), {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = block(x)  # the graph lives, so that no memory is used twice
        assert out.requires_grad
        return sum(found.values())

    together = kept()
    monkeypatch.setattr(block_module, "may_fuse", lambda: False)
    assert together < 0.75 * kept()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.attn.register_forward_hook(lambda *_: None),
        lambda block: block.mlp.fc1.register_full_backward_hook(lambda *_: None),
        lambda block: setattr(block.mlp, "act", nn.ReLU()),
        lambda block: setattr(block.mlp.drop, "p", 0.5),
    ],
)
def test_layers_that_do_more_are_called_one_by_one(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[SelfAttentionBlock], object]
) -> None:
    block, calls = make_block(0.5, False), []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return fused.scaled_linear(*args, **options)

    monkeypatch.setattr(block_module, "scaled_linear", counted)
    step(block, torch.randn(6, 5, 16, dtype=torch.float64))
    assert len(calls) == 2
    change(block)
    step(block, torch.randn(6, 5, 16, dtype=torch.float64))
    assert len(calls) == 3


def test_autocast_and_function_transforms_see_the_plain_layers() -> None:
    block = make_block(0.5, False, torch.float32)
    assert fused.may_fuse()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused.may_fuse()
    parameters: dict[str, Tensor] = dict(block.eval().named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(block, parameters, (torch.ones(2, 5, 16),))
        return out.sum()

    grads = torch.func.grad(loss)(parameters)
    assert grads["ls1.gamma"].shape == (16,)
