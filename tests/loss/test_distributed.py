"""Losses on several processes equal those of one process that has everything."""

from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from dinov3.loss import DINOLoss, KoLeoLoss, KoLeoLossDistributed
from dinov3.loss.sinkhorn_knopp import sinkhorn_knopp
from tests.helpers.distributed import run_distributed

WORLD, N, DIM = 4, 3, 6
SIZES = (5, 0, 2, 4)  # samples per rank in Sinkhorn, one rank without any


def features() -> torch.Tensor:
    return torch.randn(WORLD * N, DIM, generator=torch.Generator().manual_seed(1))


def logits() -> torch.Tensor:
    return 5 * torch.randn(sum(SIZES), 7, generator=torch.Generator().manual_seed(2))


def koleo(mine: torch.Tensor, **options: Any) -> tuple[float, torch.Tensor]:
    x = mine.clone().requires_grad_()
    loss = KoLeoLossDistributed(**options)(x)
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad


def on_each_rank() -> dict[str, Any]:
    rank = distributed.get_rank()
    mine = features().split(N)[rank]
    my_logits = logits().split(SIZES)[rank]
    results: dict[str, Any] = {
        "sinkhorn": sinkhorn_knopp(my_logits, 0.05),
        "koleo": koleo(mine, topk=2),
        "koleo_groups": koleo(mine, loss_group_size=2 * N),
        "koleo_own": koleo(mine, loss_group_size=N),
    }
    loss = DINOLoss(7, center_momentum=0.5)
    loss.init_weights()
    loss.update_center(torch.full((2, 7), float(rank)))
    loss.apply_center_update()
    results["center"] = loss.center
    distributed.new_subgroups([[0, 1], [2, 3]])
    results["koleo_subgroups"] = koleo(mine)
    results["sinkhorn_subgroups"] = sinkhorn_knopp(my_logits, 0.05)
    return results


def test_losses_of_four_processes(tmp_path: Path) -> None:
    ranks = run_distributed(on_each_rank, WORLD, tmp_path)

    torch.testing.assert_close(torch.cat([r["sinkhorn"] for r in ranks]), sinkhorn_knopp(logits(), 0.05))
    halves = [sinkhorn_knopp(half, 0.05) for half in logits().split([sum(SIZES[:2]), sum(SIZES[2:])])]
    torch.testing.assert_close(torch.cat([r["sinkhorn_subgroups"] for r in ranks]), torch.cat(halves))
    torch.testing.assert_close(ranks[3]["center"], torch.full((1, 7), 0.5 * 1.5))

    x = features().requires_grad_()
    whole = KoLeoLossDistributed(topk=2)(x) * WORLD  # a loss is a mean over its rank, gradients are of their sum
    check_koleo([r["koleo"] for r in ranks], whole, x)
    groups = sum(2 * KoLeoLoss()(part) for part in x.split(2 * N))
    check_koleo([r["koleo_groups"] for r in ranks], groups, x)
    check_koleo([r["koleo_subgroups"] for r in ranks], groups, x)
    check_koleo([r["koleo_own"] for r in ranks], sum(KoLeoLoss()(part) for part in x.split(N)), x)


def check_koleo(per_rank: list[tuple[float, torch.Tensor]], total: Any, x: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(sum(loss for loss, _ in per_rank)), total.detach(), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(torch.cat([grad for _, grad in per_rank]), grad, rtol=1e-4, atol=1e-6)
