"""Random settings, random data: any number of processes gives what one process gives that has everything.

Each number of processes is started once, and works through all settings; a seed stands for one of them.
"""

import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.data.samplers import EpochSampler, InfiniteSampler
from dinov3.eval.probe import average_gradients
from dinov3.loss import DINOLoss, KoLeoLoss, KoLeoLossDistributed
from dinov3.loss.clip_loss import memory_efficient_clip_loss
from dinov3.loss.sinkhorn_knopp import sinkhorn_knopp
from dinov3.models.neighbours import Neighbours, merge_neighbours, nearest_neighbours
from tests.helpers.distributed import run_distributed

N_SETTINGS = 15  # of each number of processes; the slow test has many more


class Setting:
    """Sizes and data of one case, the same in all processes.

    Args:
        seed: what is drawn.
        world: number of processes.
    """

    def __init__(self, seed: int, world: int) -> None:
        rng = random.Random(f"{seed} {world}")
        self.world = world
        self.rows, self.dim = rng.randint(2, 5), rng.randint(2, 7)  # rows: of each process
        self.sizes = [rng.randint(0, 5) for _ in range(world - 1)] + [rng.randint(1, 5)]  # where they may differ
        self.temperature, self.momentum = rng.choice((0.04, 0.07, 0.5)), rng.choice((0.0, 0.5, 0.9))
        self.scale, self.k = rng.uniform(0.5, 20), rng.randint(1, 4)
        self.sampler = {
            "size": rng.randint(world, 30),
            "sample_count": rng.randint(1, 20),
            "shuffle": rng.random() < 0.7,
            "seed": rng.randint(0, 5),
        }
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(world * self.rows, self.dim, generator=generator)
        self.y = torch.randn(world * self.rows, self.dim, generator=generator)
        self.logits = 3 * torch.randn(sum(self.sizes), self.dim, generator=generator)

    def results(self, rank: int | None) -> dict[str, Any]:
        """What a process finds with its part of the data; None: the only process, with all of them."""
        whole = rank is None
        x, y = (t if whole else t.split(self.rows)[rank or 0] for t in (self.x, self.y))
        logits = self.logits if whole else self.logits.split(self.sizes)[rank or 0]
        start, step = (0, 1) if whole else (rank, self.world)
        found: dict[str, Any] = {"sinkhorn": sinkhorn_knopp(logits, self.temperature)}
        centring = DINOLoss(self.dim, center_momentum=self.momentum)
        centring.init_weights()
        for part in (x, y):
            centring.update_center(part)
            centring.apply_center_update()
        found["center"] = centring.center
        topk = min(self.k, len(self.x) - 1)
        found["koleo"] = _gradient_of(x, KoLeoLossDistributed(topk=topk))
        if not whole:
            found["koleo of each process"] = _gradient_of(x, KoLeoLossDistributed(loss_group_size=self.rows))
        found["clip"] = _gradient_of(x, lambda own: memory_efficient_clip_loss(own, y, self.scale))
        weight = torch.ones(self.dim, requires_grad=True)
        (x @ weight).square().mean().backward()
        average_gradients([weight])
        found["gradient"] = weight.grad
        own = nearest_neighbours(self.y, x, self.k)
        offset = 0 if whole else (rank or 0) * self.rows
        found["neighbours"] = Neighbours(own.similarities, own.indices + offset)
        epoch = EpochSampler(**self.sampler, start=start, step=step)
        epoch.set_epoch(3)
        found["epoch"] = list(epoch)
        # A pass is divided among the processes: they are in step if it can be divided.
        n_samples = self.sampler["sample_count"] * self.world
        infinite = InfiniteSampler(sample_count=n_samples, seed=self.sampler["seed"], start=start, step=step)
        found["infinite"] = list(islice(iter(infinite), 12 * (self.world if whole else 1)))
        return found


def _gradient_of(x: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def on_each_rank(seeds: range) -> list[dict[str, Any]]:
    return [Setting(seed, distributed.get_world_size()).results(distributed.get_rank()) for seed in seeds]


def interleaved(parts: list[list[int]]) -> list[int]:
    """The order in which processes that take turns give their indices."""
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def check(setting: Setting, ranks: list[dict[str, Any]]) -> None:
    """Compare all processes with one that has everything."""
    one, world = setting.results(None), setting.world
    close = {"rtol": 2e-4, "atol": 2e-5}

    def joined(name: str, part: int | None = None) -> Tensor:
        return torch.cat([r[name] if part is None else r[name][part] for r in ranks])

    torch.testing.assert_close(joined("sinkhorn"), one["sinkhorn"], **close)
    for name in ("center", "gradient"):
        for rank in ranks:
            torch.testing.assert_close(rank[name], one[name], **close)
    # A loss is the mean over its process, a gradient that of the sum over processes.
    torch.testing.assert_close(sum(r["koleo"][0] for r in ranks), one["koleo"][0] * world, **close)
    torch.testing.assert_close(joined("koleo", 1), one["koleo"][1] * world, **close)
    own = [_gradient_of(part, KoLeoLoss()) for part in setting.x.split(setting.rows)]
    torch.testing.assert_close(joined("koleo of each process", 1), torch.cat([grad for _, grad in own]), **close)
    torch.testing.assert_close(sum(r["clip"][0] for r in ranks), one["clip"][0] * world, **close)
    torch.testing.assert_close(joined("clip", 1), one["clip"][1] * world, **close)
    merged = merge_neighbours([r["neighbours"] for r in ranks], setting.k)
    torch.testing.assert_close(merged.similarities, one["neighbours"].similarities, **close)
    assert torch.equal(merged.indices, one["neighbours"].indices)
    for name in ("epoch", "infinite"):
        assert interleaved([r[name] for r in ranks]) == one[name]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_processes_gives_what_one_gives(world: int, tmp_path: Path) -> None:
    _compare(world, range(N_SETTINGS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_processes_gives_what_one_gives_in_many_settings(world: int, tmp_path: Path) -> None:
    _compare(world, range(1000, 3000), tmp_path)


def _compare(world: int, seeds: range, tmp_path: Path) -> None:
    ranks = run_distributed(on_each_rank, world, tmp_path, seeds)
    for i, seed in enumerate(seeds):
        try:
            check(Setting(seed, world), [rank[i] for rank in ranks])
        except AssertionError as error:
            error.add_note(f"seed {seed}, {world} processes")
            raise
