"""A small model that is built like the one of a training."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dinov3.checkpointer import load_checkpoint, save_checkpoint


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.register_buffer("periods", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.norm(x)


class Arch(nn.Module):
    """Student and EMA teacher, the latter under two names."""

    def __init__(self, seed: int, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.student = nn.ModuleDict({"backbone": Net(width), "dino_head": nn.Linear(width, 5)})
        teacher = nn.ModuleDict({"backbone": Net(width), "dino_head": nn.Linear(width, 5)})
        self.teacher = self.model_ema = teacher.requires_grad_(False)
        self.register_buffer("center", torch.rand(1, 5))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.student["dino_head"](self.student["backbone"](x)).square().mean()


def build(seed: int, width: int = 6, sharded: bool = False) -> tuple[Arch, torch.optim.AdamW]:
    arch = Arch(seed, width)
    if sharded:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)  # as `fsdp` does on a CPU, and says why
        for network in (arch.student, arch.teacher):
            for block in network["backbone"].blocks:
                fully_shard(block, mp_policy=policy)
            for part in network.values():
                fully_shard(part, mp_policy=policy)
    groups = [
        {"params": list(part.parameters()), "lr_multiplier": 0.5, "is_last_layer": name == "dino_head"}
        for name, part in arch.student.items()
    ]
    return arch, torch.optim.AdamW(groups, lr=0.1)


def train(arch: Arch, optimizer: torch.optim.Optimizer, n: int, first: int = 0) -> list[float]:
    losses = []
    for i in range(first, first + n):
        x = torch.rand(8, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss = arch.loss(x)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(arch.teacher.parameters(), arch.student.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        losses.append(loss.item())
    return losses


def full_state(arch: Arch) -> dict[str, Any]:
    def whole(tensor: Any) -> Any:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).tolist()

    return {key: whole(value) for key, value in arch.state_dict().items()}


def save(folder: Path, seed: int, n: int, sharded: bool) -> tuple[dict[str, Any], list[float]]:
    """Train for `n` iterations and save; the state, and the losses of two more iterations."""
    arch, optimizer = build(seed, sharded=sharded)
    train(arch, optimizer, n)
    save_checkpoint(folder, iteration=n - 1, model=arch, optimizer=optimizer)
    return full_state(arch), train(arch, optimizer, 2, first=n)


def load(folder: Path, sharded: bool) -> tuple[Any, dict[str, Any], list[float]]:
    """Load into other random weights; iteration, state, and the losses of two more iterations."""
    arch, optimizer = build(77, sharded=sharded)
    iteration = load_checkpoint(folder, model=arch, optimizer=optimizer)
    return iteration, full_state(arch), train(arch, optimizer, 2, first=iteration + 1)
