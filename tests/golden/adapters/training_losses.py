"""Golden cases of losses, on one process and on several."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.loss import DINOLoss, GramLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from tests.golden import fill
from tests.helpers.distributed import run_distributed

Params = Mapping[str, Any]


def probabilities(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.softmax(fill.tensor(name, shape, 2.0), -1)


def make_masks(tag: str, rows: int, n: int, threshold: float, empty: list[int]) -> dict[str, Tensor]:
    """Masks, and what the collate function derives from them."""
    masks = fill.tensor(f"{tag}.masks", (rows, n)) > threshold
    masks[empty] = False
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    indices = masks.flatten().nonzero().flatten()
    return {
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": weights,
        "n_masked_patches": torch.full((1,), len(indices), dtype=torch.int64),
    }


def dino_forward(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    student = fill.tensor(f"{case}.student", tuple(p["student"]), 0.5).requires_grad_()
    teacher = probabilities(f"{case}.teacher", tuple(p["teacher"]))
    loss = DINOLoss(student.shape[-1], **p["init"])(student, teacher, **p["call"])
    loss.backward()
    return {"loss": loss, "grad_student": student.grad}


def dino_sinkhorn(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    logits = fill.tensor(f"{case}.logits", tuple(p["logits"]), p["scale"])
    return {"probs": DINOLoss(logits.shape[1]).sinkhorn_knopp_teacher(logits, **p["call"])}


def ibot_sinkhorn(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    logits = fill.tensor(f"{case}.logits", tuple(p["logits"]), p["scale"])
    count = torch.tensor([len(logits)])
    loss = iBOTPatchLoss(logits.shape[1])
    return {"probs": loss.sinkhorn_knopp_teacher(logits, n_masked_patches_tensor=count, **p["call"])}


def center(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    k, b, n = p["k"], p["b"], p["n"]
    results = {}
    for name, tokens, loss, shape in (
        ("dino", "cls", DINOLoss(k), (b, k)),
        ("ibot", "patch", iBOTPatchLoss(k), (b, n, k)),
    ):
        loss.init_weights()
        for i in range(2):
            x = fill.tensor(f"{case}.{tokens}{i}", shape, 0.5)
            results[f"{name}_probs{i}"] = loss.softmax_center_teacher(x, p["temp"])
            loss.update_center(x)
        loss.apply_center_update()
        results[f"{name}_center"] = loss.center
    return results


def ibot_masked(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    rows, n, k = p["rows"], p["n"], p["k"]
    batch = make_masks(case, rows, n, p["threshold"], p["empty"])
    masks, n_masked = batch["collated_masks"], int(batch["n_masked_patches"])
    student = fill.tensor(f"{case}.student", (n_masked, k), 0.5).requires_grad_()
    teacher = probabilities(f"{case}.teacher", (n_masked, k))
    loss_fn = iBOTPatchLoss(k)
    loss = loss_fn.forward_masked(
        student, teacher, masks, n_masked_patches=n_masked, masks_weight=batch["masks_weight"]
    )
    loss.backward()
    full_student = fill.tensor(f"{case}.student_full", (rows, n, k), 0.5)
    full_teacher = probabilities(f"{case}.teacher_full", (rows, n, k))
    return {
        "loss": loss,
        "grad_student": student.grad,
        "loss_no_weight": loss_fn.forward_masked(student, teacher, masks),
        "loss_full": loss_fn(full_student, full_teacher, masks),
    }


def koleo(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    x = fill.tensor(f"{case}.x", tuple(p["x"])).requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    return {"loss": loss, "grad": x.grad}


def koleo_distributed(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    return _koleo_of_rank(case, p, 0)


def koleo_distributed_multi(case: str, p: Params, tmp_path: Path) -> dict[str, Tensor]:
    return by_rank(run_distributed(_koleo_rank, p["world"], tmp_path, case, p))


def _koleo_rank(case: str, p: Params) -> dict[str, Tensor]:
    return _koleo_of_rank(case, p, torch.distributed.get_rank())


def _koleo_of_rank(case: str, p: Params, rank: int) -> dict[str, Tensor]:
    x = fill.tensor(f"{case}.x.rank{rank}", tuple(p["x"])).requires_grad_()
    loss = KoLeoLossDistributed(**p["init"])(x)
    loss.backward()
    return {"loss": loss.detach(), "grad": x.grad}


def sinkhorn_multi(case: str, p: Params, tmp_path: Path) -> dict[str, Tensor]:
    return by_rank(run_distributed(_sinkhorn_rank, p["world"], tmp_path, case, p))


def _sinkhorn_rank(case: str, p: Params) -> dict[str, Tensor]:
    from dinov3 import distributed

    rank, k = distributed.get_rank(), p["k"]
    if "subgroups" in p:
        distributed.new_subgroups(p["subgroups"])
    cls = fill.tensor(f"{case}.cls.rank{rank}", (p["b"], k), 0.3)
    patch = fill.tensor(f"{case}.patch.rank{rank}", (p["n_masked"][rank], k), 0.3)
    count = torch.tensor([p["n_masked"][rank]])
    return {
        "cls": DINOLoss(k).sinkhorn_knopp_teacher(cls, p["temp"]),
        "patch": iBOTPatchLoss(k).sinkhorn_knopp_teacher(patch, teacher_temp=p["temp"], n_masked_patches_tensor=count),
    }


def gram(case: str, p: Params, _: Path) -> dict[str, Tensor]:
    student = fill.tensor(f"{case}.student", tuple(p["shape"])).requires_grad_()
    teacher = fill.tensor(f"{case}.teacher", tuple(p["shape"]))
    loss = GramLoss(**p["init"])(student, teacher, **p["call"])
    loss.backward()
    return {"loss": loss, "grad_student": student.grad}


def by_rank(results: list[dict[str, Any]]) -> dict[str, Any]:
    """`rank<r>.<output>` of the results of every rank."""
    return {f"rank{rank}.{name}": value for rank, result in enumerate(results) for name, value in result.items()}


KINDS = {
    fn.__name__: fn
    for fn in (
        dino_forward, dino_sinkhorn, ibot_sinkhorn, center, ibot_masked, koleo, koleo_distributed,
        koleo_distributed_multi, sinkhorn_multi, gram,
    )
}  # fmt: skip
