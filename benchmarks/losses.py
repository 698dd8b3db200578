"""DINO, iBOT and Sinkhorn: from logits to the loss and its gradient, against the equations run eagerly as they stand.

A ViT-S batch of 16 images with 65,536 prototypes, and of 8 with 262,144: CLS logits of 2 teacher crops, 2 global and 8
local student crops, and the masked patches of both (half of the images, 30 % of the patches). A call takes them to the
three losses, their sum and the gradients of the student's logits; what it takes of memory is what it needs beyond all
logits. Ours lets the targets of patches take the place of the teacher's logits, so each call of either side begins with
a copy of these from elsewhere, which counts in its time. Gradients of both sides are compared before.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import reference_training as reference
from benchmarks.frame.bench import Bench
from benchmarks.frame.measure import Call
from dinov3.loss import DINOLoss, iBOTPatchLoss

TABLE = "Losses"
N_GLOBAL, N_LOCAL, N_PATCHES = 2, 8, 196
TEMPERATURE, SPREAD = 0.07, 0.2
"""Of the teacher; standard deviation of the logits, products of a unit vector with a prototype."""


class Point(NamedTuple):
    """Prototypes K and images of a batch B."""

    n_prototypes: int
    batch: int


POINTS, QUICK = (Point(65_536, 16), Point(262_144, 8)), (Point(4_096, 4),)


class Logits(NamedTuple):
    """Of the CLS tokens [crops, B, K], and of the M masked patches [M, K]; the student's want gradients."""

    teacher_cls: Tensor
    teacher_patches: Tensor
    student_global: Tensor
    student_local: Tensor
    student_patches: Tensor
    masks: Tensor
    """[2 * B, patches], true at M places."""
    source: Tensor
    """What `teacher_patches` are filled from."""

    @property
    def of_student(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_local, self.student_global, self.student_patches


def make_logits(point: Point, device: torch.device) -> Logits:
    """Always the same."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(N_GLOBAL * point.batch, N_PATCHES, dtype=torch.bool)
    masks[::2] = torch.rand(point.batch, N_PATCHES, generator=generator) < 0.3
    n_masked = int(masks.sum())

    def logits(*shape: int, of_student: bool = False) -> Tensor:
        values = torch.empty(*shape, point.n_prototypes).normal_(std=SPREAD, generator=generator)
        return values.to(device).requires_grad_(of_student)

    source = logits(n_masked)
    return Logits(
        logits(N_GLOBAL, point.batch),
        torch.empty_like(source),
        logits(N_GLOBAL, point.batch, of_student=True),
        logits(N_LOCAL, point.batch, of_student=True),
        logits(n_masked, of_student=True),
        masks.to(device),
        source,
    )


def our_losses(logits: Logits) -> Tensor:
    """The sum of the three losses; gradients are left at the student's logits."""
    dino, ibot = DINOLoss(logits.teacher_cls.shape[-1]), iBOTPatchLoss(logits.teacher_cls.shape[-1])
    cls_targets = dino.sinkhorn_knopp_teacher(logits.teacher_cls.flatten(0, 1), TEMPERATURE)
    cls_targets = cls_targets.view(logits.teacher_cls.shape)
    patch_targets = ibot.sinkhorn_knopp_teacher(logits.teacher_patches, TEMPERATURE, inplace=True)
    total = dino(logits.student_local, cls_targets)
    total = total + dino(logits.student_global, cls_targets, ignore_diagonal=True)
    total = total + ibot.forward_masked(logits.student_patches, patch_targets, logits.masks)
    total.backward()
    return total.detach()


def reference_losses(logits: Logits) -> Tensor:
    """The same, as the equations stand."""
    cls_targets = reference.sinkhorn_knopp(logits.teacher_cls.flatten(0, 1), TEMPERATURE)
    cls_targets = cls_targets.unflatten(0, (N_GLOBAL, -1))
    patch_targets = reference.sinkhorn_knopp(logits.teacher_patches, TEMPERATURE)
    masks = logits.masks
    weights = (1 / masks.sum(dim=-1).clamp(min=1)).unsqueeze(-1).expand_as(masks)[masks]
    total = reference.dino_loss(logits.student_local, cls_targets, ignore_diagonal=False)
    total = total + reference.dino_loss(logits.student_global, cls_targets, ignore_diagonal=True)
    total = total + reference.ibot_loss(logits.student_patches, patch_targets, weights, len(masks))
    total.backward()
    return total.detach()


SIDES: dict[str, Callable[[Logits], Tensor]] = {"ours": our_losses, "reference": reference_losses}


def prepare(logits: Logits) -> None:
    """The state in which the networks hand logits over: those of the teacher are new, gradients there are none."""
    logits.teacher_patches.copy_(logits.source)
    for x in logits.of_student:
        x.grad = None


def gradients(side: str, logits: Logits) -> tuple[Tensor, ...]:
    """Of the student's logits."""
    prepare(logits)
    SIDES[side](logits)
    return tuple(x.grad for x in logits.of_student if x.grad is not None)


def check(logits: Logits) -> None:
    """Raise unless both sides have the same gradients, to the rounding of float32."""
    for ours, theirs in zip(*(gradients(side, logits) for side in SIDES), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def make_call(side: str, point: Point, device: torch.device) -> Call:
    """A call with logits of its own."""
    logits = make_logits(point, device)

    def call() -> None:
        prepare(logits)
        SIDES[side](logits)
        for x in logits.of_student:
            x.grad = None  # not part of what is held between calls

    return call


def run(bench: Bench) -> None:
    """Time and memory of both sizes."""
    for point in QUICK if bench.quick else POINTS:
        name = f"DINO, iBOT, Sinkhorn, {point.n_prototypes} prototypes"
        if bench.wants(f"{name}, time"):
            check(make_logits(point, bench.device))
        makers = {side: partial(make_call, side, point, bench.device) for side in SIDES}
        bench.time(f"{name}, time", makers, table=TABLE, target=2.0)
        bench.memory(f"{name}, memory", makers, table=TABLE, target=2.5)
