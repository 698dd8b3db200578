"""Masks carried through a video."""

import pytest
import torch
import torch.nn.functional as F

from dinov3.eval.patches.tracking import (
    MaskTracker,
    make_neighborhood_mask,
    mask_to_probs,
    postprocess_probs,
    predicted_mask,
    propagate,
)


def _dense_propagate(
    current: torch.Tensor, context: torch.Tensor, probs: torch.Tensor, mask: torch.Tensor, topk: int, temperature: float
) -> torch.Tensor:
    """All patches against all patches at once: what the rows must add up to."""
    h, w, dim = current.shape
    t = len(context)
    similarity = current.reshape(h * w, dim) @ context.reshape(t * h * w, dim).T
    allowed = mask.reshape(h * w, 1, h * w).expand(-1, t, -1).reshape(h * w, -1)
    similarity = similarity.masked_fill(~allowed, float("-inf"))
    kth = similarity.sort(dim=1, descending=True).values[:, topk - 1 : topk]
    weights = (similarity.masked_fill(similarity < kth, float("-inf")) / temperature).softmax(dim=1)
    out = weights @ probs.reshape(t * h * w, -1)
    return (out / out.sum(-1, keepdim=True)).view(h, w, -1)


@pytest.mark.parametrize(("size", "shape", "topk"), [(1, "square", 3), (2.5, "circle", 5), (50, "circle", 1)])
def test_rows_equal_one_dense_product(size: float, shape: str, topk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(3, 5, 7, 8, generator=generator), dim=-1)
    probs = torch.rand(2, 5, 7, 3, generator=generator).softmax(-1)
    mask = make_neighborhood_mask(5, 7, size, shape)

    got = propagate(features[0], features[1:], probs, mask, topk, 0.2)

    torch.testing.assert_close(got, _dense_propagate(features[0], features[1:], probs, mask, topk, 0.2))
    torch.testing.assert_close(got.sum(-1), torch.ones(5, 7))


def test_a_moving_object_is_followed() -> None:
    background, thing = torch.eye(8)[0], torch.eye(8)[1]
    frames = []
    for step in range(5):
        frame = background.repeat(6, 10, 1)
        frame[2:4, step : step + 2] = thing
        frames.append(frame)
    first = torch.zeros(60, 100, dtype=torch.uint8)
    first[20:40, 0:20] = 1
    tracker = MaskTracker(frames[0], first, max_context=2, size=3)

    masks = [predicted_mask(tracker.track(frame), (60, 100)) for frame in frames[1:]]

    for step, mask in enumerate(masks, start=1):
        expected = torch.zeros(60, 100, dtype=torch.uint8)
        expected[20:40, 10 * step : 10 * step + 20] = 1
        assert torch.equal(mask, expected), step


def test_a_constant_map_becomes_zero() -> None:
    probs = torch.tensor([[[0.25, 0.25]], [[0.0, 0.5]]])
    assert postprocess_probs(probs).tolist() == [[[0.0, 0.0]], [[0.0, 1.0]]]


def test_one_hot_on_the_grid() -> None:
    mask = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 2]])
    probs = mask_to_probs(mask, 1, 2)
    assert probs.tolist() == [[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ValueError, match="'circle' or 'square'"):
        make_neighborhood_mask(2, 2, 1, "ring")
    features = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="2 x 3 patches"):
        propagate(features, features[None], torch.ones(1, 2, 3, 2), make_neighborhood_mask(3, 2, 1), 1, 0.2)
    with pytest.raises(ValueError, match="row 0"):
        propagate(features, features[None], torch.ones(1, 2, 3, 2), torch.zeros(2, 3, 2, 3, dtype=torch.bool), 1, 0.2)
