"""Sine encodings on a plane: counting, padding, scale."""

import math

import pytest
import torch

from dinov3.layers.sine_position_encoding import PositionEmbeddingSine, sine_encoding


def test_frequencies() -> None:
    got = sine_encoding(torch.tensor([2.0]), 4, temperature=100.0)
    assert got[0].tolist() == pytest.approx([math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)])


def test_rows_come_first_and_count_from_one() -> None:
    out = PositionEmbeddingSine(4)(torch.zeros(1, 3, 2, 5))
    assert out.shape == (1, 8, 2, 5)
    assert torch.equal(out[0, :4, 1, 0], out[0, :4, 1, 4])
    torch.testing.assert_close(out[0, :4, 1, 0], sine_encoding(torch.tensor(2.0), 4))
    torch.testing.assert_close(out[0, 4:, 0, 4], sine_encoding(torch.tensor(5.0), 4))


def test_padding_is_not_counted() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, 3:], mask[:, :, 4:] = True, True
    encoding = PositionEmbeddingSine(4, normalize=True)
    padded = encoding(torch.zeros(1, 1, 4, 6), mask)
    torch.testing.assert_close(padded[:, :, :3, :4], encoding(torch.zeros(1, 1, 3, 4)))


def test_normalized_positions_end_at_the_scale() -> None:
    out = PositionEmbeddingSine(2, normalize=True, scale=1.0)(torch.zeros(1, 1, 3, 7))
    assert out[0, :, -1, -1].tolist() == pytest.approx([math.sin(1), math.cos(1)] * 2, abs=1e-5)
    with pytest.raises(ValueError, match="scale=1.0 has no effect without normalize=True"):
        PositionEmbeddingSine(2, scale=1.0)
