"""Synchronised batch norm on the CPU: alone it is batch norm, together it is batch norm of all batches."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3.layers.sync_batch_norm import SyncBatchNorm
from tests.helpers.distributed import run_distributed


def _batches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, 5, generator=generator), torch.randn(2, 4, 3, 3, generator=generator) + 1


def _step(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    (out**3).sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "grad": x.grad, **{key: value.clone() for key, value in norm.state_dict().items()}}


def _rank_step() -> dict[str, Tensor]:
    batch = _batches()[dist.get_rank() if dist.get_world_size() > 1 else 0]
    norm = SyncBatchNorm(4)
    found = _step(norm, batch)
    norm.eval()
    return found | {"eval": norm(batch).detach()}


def test_alone_in_a_group_it_is_batch_norm(tmp_path: Path) -> None:
    (found,) = run_distributed(_rank_step, 1, tmp_path)
    batch = _batches()[0]
    norm = nn.BatchNorm2d(4)
    expected = _step(norm, batch)
    expected["eval"] = norm.eval()(batch).detach()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_processes_normalise_over_all_batches(tmp_path: Path) -> None:
    found = run_distributed(_rank_step, 2, tmp_path)
    batches = _batches()
    flat = torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], dim=1).T[..., None]  # [all pixels, C, 1]
    norm = nn.BatchNorm1d(4)
    expected = _step(norm, flat)
    sizes = [batch[:, 0].numel() for batch in batches]
    for key in ("out", "grad"):
        for rank, part in enumerate(expected[key][..., 0].split(sizes)):
            own = found[rank][key].transpose(0, 1).flatten(1).T
            torch.testing.assert_close(own, part, rtol=1e-4, atol=1e-5)
    for rank in range(2):
        torch.testing.assert_close(found[rank]["running_var"], expected["running_var"])
        torch.testing.assert_close(found[rank]["running_mean"], expected["running_mean"])
