"""The contrastive loss over processes, and the Gram loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.text.clip_loss import memory_efficient_clip_loss
from dinov3.eval.text.gram_loss import gram_loss_fn
from tests.golden import fill
from tests.helpers.distributed import run_distributed

N, D = 8, 6


def features(seed: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and the scale of a joined batch."""
    image, text = (F.normalize(fill.tensor(f"clip.{name}{seed}", (N, D)), dim=-1) for name in ("image", "text"))
    return image, text, torch.tensor([12.0])


def whole_batch(image: Tensor, text: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Loss and gradients written down with cross-entropies."""
    image, text, scale = (x.clone().requires_grad_() for x in (image, text, scale))
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return results(loss, image, text, scale)


def results(loss: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in zip(("image", "text", "scale"), inputs, strict=True)}
    return {"loss": loss.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


def on_rank(factor: float = 1.0) -> dict[str, Tensor]:
    """Loss and gradients of this process's share of the batch."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    image, text, scale = features()
    own = slice(rank * N // world, (rank + 1) * N // world)
    image, text, scale = (x.clone().requires_grad_() for x in (image[own], text[own], scale))
    loss = memory_efficient_clip_loss(image, text, scale)
    (factor * loss).backward()
    return results(loss, image, text, scale)


def test_one_process_has_the_loss_and_gradients_of_two_cross_entropies() -> None:
    image, text, scale = (x.clone().requires_grad_() for x in features())
    loss = memory_efficient_clip_loss(image, text, scale)
    loss.backward()
    torch.testing.assert_close(results(loss, image, text, scale), whole_batch(*features()))


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_loss_and_gradients_of_the_joined_batch(world: int, tmp_path: Path) -> None:
    want = whole_batch(*features())
    ranks = run_distributed(on_rank, world, tmp_path)
    mean = {name: torch.stack([rank[name] for rank in ranks]).mean(0) for name in ("loss", "scale")}
    torch.testing.assert_close(mean, {name: want[name] for name in mean})
    for name in ("image", "text"):  # of rows that only one process has: its gradient, averaged over processes
        got = torch.cat([rank[name] for rank in ranks]) / world
        torch.testing.assert_close(got, want[name])


def test_the_incoming_gradient_scales_and_stays_as_it_is(tmp_path: Path) -> None:
    once, thrice = (run_distributed(on_rank, 2, tmp_path, factor) for factor in (1.0, 3.0))
    for a, b in zip(once, thrice, strict=True):
        for name in ("image", "text", "scale"):
            torch.testing.assert_close(3 * a[name], b[name])
    image, text, scale = features()
    image.requires_grad_()
    incoming = torch.tensor(2.0)
    memory_efficient_clip_loss(image, text, scale).backward(incoming)
    assert incoming.item() == 2.0


def test_gradients_are_right_in_double_precision() -> None:
    image, text, scale = (x.double().requires_grad_() for x in features())
    assert torch.autograd.gradcheck(memory_efficient_clip_loss, (image, text, scale))


def test_half_precision_is_computed_in_single() -> None:
    image, text, scale = features()
    half = image.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = memory_efficient_clip_loss(half, text.bfloat16(), scale)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, memory_efficient_clip_loss(half.float(), text.bfloat16().float(), scale))
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_large_scales_do_not_overflow() -> None:
    image, text, _ = features()
    loss = memory_efficient_clip_loss(image, text, 1e4)
    assert loss.isfinite()


def unequal() -> str:
    n = 2 + torch.distributed.get_rank()
    try:
        memory_efficient_clip_loss(torch.ones(n, 3), torch.ones(n, 3), 1.0)
    except ValueError as error:
        return str(error)
    return ""


def test_unequal_batches_are_an_error_on_all_processes(tmp_path: Path) -> None:
    for message in run_distributed(unequal, 2, tmp_path):
        assert "equally many pairs, got [2, 3]" in message


@pytest.mark.parametrize(
    ("shapes", "scale", "message"),
    [
        (((2, 3), (3, 3)), 1.0, r"equal shape \[n, D\], got \(2, 3\) for images and \(3, 3\)"),
        (((2, 3, 1), (2, 3, 1)), 1.0, "equal shape"),
        (((2, 3), (2, 3)), torch.ones(2), "one element"),
    ],
)
def test_wrong_inputs_are_refused(shapes: Any, scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_efficient_clip_loss(torch.ones(shapes[0]), torch.ones(shapes[1]), scale)


def test_gram_loss_compares_similarities_not_tokens() -> None:
    tokens = torch.randn(2, 9, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    assert gram_loss_fn(tokens, tokens @ rotation).item() == pytest.approx(0, abs=1e-10)
    assert gram_loss_fn(tokens, 3 * tokens).item() == pytest.approx(0, abs=1e-10)
    assert gram_loss_fn(tokens, 3 * tokens, normalize=False).item() > 1


def test_gram_loss_always_draws_and_samples_the_same_patches_of_both() -> None:
    tokens, others = torch.randn(2, 10, 4), torch.randn(2, 10, 4)
    torch.manual_seed(1)
    chosen = torch.randperm(10)[:5]
    after = torch.rand(1)
    torch.manual_seed(1)
    loss = gram_loss_fn(tokens, others, 0.5)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(loss, gram_loss_fn(tokens[:, chosen], others[:, chosen]))
    with pytest.raises(ValueError, match="leaves 0 of 10 patches"):
        gram_loss_fn(tokens, others, 0.05)
