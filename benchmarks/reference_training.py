"""A training step as the equations stand, eagerly: what benchmarks compare with, and what tests check ours against.

Written without regard to speed, with the same parameter names as ours, and complete for the recipes that are measured:
ViT with MLP and layer scale, DINO, iBOT and KoLeo on one process, no Gram teacher.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay

STUDENT_TEMP = 0.1
N_GLOBAL = 2


class Attention(nn.Module):
    """Self-attention with rotary positions on the patches."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward_list(self, x_list: Sequence[Tensor], ropes: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """One matrix product for all entries' queries, keys and values, one for their outputs."""
        qkv = self.qkv(torch.cat([x.flatten(0, 1) for x in x_list]))
        parts = qkv.split([x.shape[0] * x.shape[1] for x in x_list])
        attended = [
            self._attend(part.view(*x.shape[:2], -1), rope) for part, x, rope in zip(parts, x_list, ropes, strict=True)
        ]
        out = self.proj(torch.cat([a.flatten(0, 1) for a in attended]))
        return [part.view(x.shape) for part, x in zip(out.split([len(part) for part in parts]), x_list, strict=True)]

    def _attend(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        n_samples, n_tokens, width = qkv.shape
        qkv = qkv.reshape(n_samples, n_tokens, 3, self.n_heads, width // 3 // self.n_heads)
        q, k, v = (t.transpose(1, 2) for t in torch.unbind(qkv, 2))
        out = F.scaled_dot_product_attention(apply_rope(q, *rope), apply_rope(k, *rope), v)
        return out.transpose(1, 2).reshape(n_samples, n_tokens, -1)


def apply_rope(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the last tokens of x [B, heads, N, d] in the dtype of the tables."""
    dtype, n_prefix = x.dtype, x.shape[-2] - len(sin)
    x = x.to(sin.dtype)
    prefix, patches = x[..., :n_prefix, :], x[..., n_prefix:, :]
    a, b = patches.chunk(2, dim=-1)
    rotated = patches * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([prefix, rotated], dim=-2).to(dtype)


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    def forward_list(self, x_list: Sequence[Tensor]) -> list[Tensor]:
        """One pass over the tokens of all entries."""
        flat = self(torch.cat([x.flatten(0, 1) for x in x_list]))
        parts = flat.split([x.shape[0] * x.shape[1] for x in x_list])
        return [part.view(x.shape) for part, x in zip(parts, x_list, strict=True)]


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm block; in training each branch sees a random subset of the samples of each entry."""

    def __init__(self, dim: int, n_heads: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, n_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim)
        self.drop = drop

    def forward(self, x_list: list[Tensor], ropes: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if not (self.training and self.drop > 0):
            attended = self.attn.forward_list([self.norm1(x) for x in x_list], ropes)
            x_list = [x + self.ls1(branch) for x, branch in zip(x_list, attended, strict=True)]
            mixed = self.mlp.forward_list([self.norm2(x) for x in x_list])
            return [x + self.ls2(branch) for x, branch in zip(x_list, mixed, strict=True)]
        subsets = self._draw(x_list)
        chosen = [self.norm1(x[i]) for x, i in zip(x_list, subsets, strict=True)]
        branches = [self.ls1(branch) for branch in self.attn.forward_list(chosen, ropes)]
        x_list = _add(x_list, branches, subsets)
        subsets = self._draw(x_list)
        chosen = [self.norm2(x[i]) for x, i in zip(x_list, subsets, strict=True)]
        branches = [self.ls2(branch) for branch in self.mlp.forward_list(chosen)]
        return _add(x_list, branches, subsets)

    def _draw(self, x_list: Sequence[Tensor]) -> list[Tensor]:
        return [torch.randperm(len(x))[: max(int(len(x) * (1 - self.drop)), 1)] for x in x_list]


def _add(x_list: Sequence[Tensor], branches: Sequence[Tensor], subsets: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.index_add(x, 0, subset, branch, alpha=len(x) / len(subset))
        for x, branch, subset in zip(x_list, branches, subsets, strict=True)
    ]


class Backbone(nn.Module):
    """Vision transformer with a class token and storage tokens."""

    def __init__(self, dim: int, depth: int, n_heads: int, patch_size: int, n_storage: int, drop: float) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if n_storage:
            self.storage_tokens = nn.Parameter(torch.empty(1, n_storage, dim))
        self.n_storage, self.patch_size = n_storage, patch_size
        self.rope_embed = nn.Module()
        self.rope_embed.register_buffer("periods", torch.empty(dim // n_heads // 4, dtype=torch.bfloat16))
        self.blocks = nn.ModuleList(Block(dim, n_heads, drop) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mask_token = nn.Parameter(torch.empty(1, dim))

    def reset_periods(self) -> None:
        """Geometric periods from 1 to almost 100."""
        periods = self.rope_embed.get_buffer("periods")
        exponents = torch.arange(len(periods), dtype=periods.dtype) / len(periods)
        periods.copy_(100**exponents)

    def forward(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        x_list = [self._embed(x, mask) for x, mask in zip(images, masks, strict=True)]
        for block in self.blocks:
            x_list = block(
                x_list, [self._rope(x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size) for x in images]
            )
        normed = [self.norm(x) for x in x_list]
        n_prefix = 1 + self.n_storage
        return [{"cls": x[:, 0], "storage": x[:, 1:n_prefix], "patches": x[:, n_prefix:]} for x in normed]

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        cls_token: Tensor = self.cls_token
        if mask is None:
            cls_token = cls_token + 0 * self.mask_token
        else:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token, patches)
        prefix = [cls_token, self.storage_tokens] if self.n_storage else [cls_token]
        return torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)

    def _rope(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        periods = self.rope_embed.get_buffer("periods")
        axes = [(torch.arange(0.5, n, dtype=periods.dtype) / n) for n in (rows, columns)]
        grid = 2.0 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) - 1.0
        angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class Head(nn.Module):
    """MLP, L2 normalisation, prototypes."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, n_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.Linear(bottleneck, n_prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-12))


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """Targets [n, K]: prototypes and samples are normalised in turn."""
    q = torch.exp(logits.float() / temp).T
    n_prototypes, n_samples = q.shape
    q /= q.sum()
    for _ in range(n_iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= n_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= n_samples
    q *= n_samples
    return q.T


def dino_loss(student: Tensor, teacher: Tensor, ignore_diagonal: bool) -> Tensor:
    """Mean cross-entropy over pairs of a student crop [S, B, K] and a teacher crop [T, B, K]."""
    log_probs = F.log_softmax(student.float() / STUDENT_TEMP, dim=-1)
    pairs = -torch.einsum("sbk,tbk->st", log_probs, teacher)
    (n_student, n_samples, _), n_teacher = student.shape, len(teacher)
    if not ignore_diagonal:
        return pairs.sum() / (n_samples * n_student * n_teacher)
    n_same = min(n_student, n_teacher)
    return (pairs.sum() - pairs.diagonal().sum()) / (n_samples * (n_student * n_teacher - n_same))


def ibot_loss(student: Tensor, teacher: Tensor, weights: Tensor, n_rows: int) -> Tensor:
    """Weighted cross-entropy of masked patches [M, K] over the number of crops."""
    losses = torch.sum(teacher * F.log_softmax(student.float() / STUDENT_TEMP, dim=-1), dim=-1)
    return -torch.sum(losses * weights) / n_rows


def koleo_loss(x: Tensor) -> Tensor:
    """-mean log distance of samples [B, D] to their nearest neighbour."""
    x = F.normalize(x, dim=-1, eps=1e-8)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


class ReferenceTraining(nn.Module):
    """Student, EMA teacher and their step.

    Args:
        cfg: a merged training configuration, of which backbone sizes are taken from `arch`.
        arch: width, depth and heads of the backbone.
    """

    def __init__(self, cfg: Any, arch: tuple[int, int, int]) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = self._network(arch, cfg.student.drop_path_rate)
        self.teacher = self._network(arch, 0.0).requires_grad_(False)

    def _network(self, arch: tuple[int, int, int], drop: float) -> nn.ModuleDict:
        student, dino, ibot = self.cfg.student, self.cfg.dino, self.cfg.ibot
        parts: dict[str, nn.Module] = {
            "backbone": Backbone(*arch, student.patch_size, student.n_storage_tokens, drop),
            "dino_head": Head(arch[0], dino.head_hidden_dim, dino.head_bottleneck_dim, dino.head_n_prototypes),
            "ibot_head": Head(arch[0], ibot.head_hidden_dim, ibot.head_bottleneck_dim, ibot.head_n_prototypes),
        }
        return nn.ModuleDict(parts)

    def build_optimizer(self) -> torch.optim.AdamW:
        """AdamW over merged groups, as the recipes ask for."""
        optim = self.cfg.optim
        groups = []
        for part in self.student.values():
            fused = fuse_params_groups(
                get_params_groups_with_decay(part, optim.layerwise_decay, optim.patch_embed_lr_mult)
            )
            groups += [group | {"fused": True} for group in fused]
        return torch.optim.AdamW(groups, betas=(optim.adamw_beta1, optim.adamw_beta2))

    def forward_backward(self, batch: Mapping[str, Any], teacher_temp: float) -> Tensor:
        """Total loss; gradients are accumulated into the student."""
        cfg, masks, indices = self.cfg, batch["collated_masks"], batch["mask_indices_list"]
        global_crops, local_crops = batch["collated_global_crops"], batch["collated_local_crops"]
        n_samples, n_local = len(global_crops) // N_GLOBAL, cfg.crops.local_crops_number

        with torch.no_grad():
            (tokens,) = self.teacher["backbone"]([global_crops], [None])
            patch_logits = self.teacher["ibot_head"](tokens["patches"].flatten(0, 1)[indices])
            patch_targets = sinkhorn_knopp(patch_logits, teacher_temp)
            cls_logits = self.teacher["dino_head"](tokens["cls"])
            cls_targets = sinkhorn_knopp(cls_logits, teacher_temp).unflatten(0, (N_GLOBAL, n_samples))

        tokens, local_tokens = self.student["backbone"]([global_crops, local_crops], [masks, None])
        patches = self.student["ibot_head"](tokens["patches"].flatten(0, 1)[indices])
        cls = self.student["dino_head"](torch.cat([tokens["cls"], local_tokens["cls"]]))
        cls_global, cls_local = cls.unflatten(0, (-1, n_samples)).split([N_GLOBAL, n_local])

        ignore = cfg.dino.global_ignore_diagonal
        n_pairs = (N_GLOBAL * (N_GLOBAL - 1) if ignore else N_GLOBAL**2), N_GLOBAL * n_local
        total = cfg.dino.loss_weight * n_pairs[1] / sum(n_pairs) * dino_loss(cls_local, cls_targets, False)
        total = total + cfg.dino.loss_weight * n_pairs[0] / sum(n_pairs) * dino_loss(cls_global, cls_targets, ignore)
        koleo = sum(koleo_loss(crop) for crop in tokens["cls"].unflatten(0, (N_GLOBAL, n_samples)))
        total = total + cfg.dino.koleo_loss_weight * koleo
        total = total + cfg.ibot.loss_weight * ibot_loss(patches, patch_targets, batch["masks_weight"], len(masks))
        total.backward()
        return total.detach()

    def step(self, batch: Mapping[str, Any], optimizer: torch.optim.Optimizer, teacher_temp: float, m: float) -> Tensor:
        """One iteration: gradients, clipping of each part, AdamW, EMA; returns the total loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.forward_backward(batch, teacher_temp)
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), max_norm=self.cfg.optim.clip_grad)
        optimizer.step()
        self.update_ema(m)
        return loss

    @torch.no_grad()
    def update_ema(self, m: float) -> None:
        """ema <- m * ema + (1 - m) * student."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_mul_(teacher, m)
        torch._foreach_add_(teacher, student, alpha=1 - m)
