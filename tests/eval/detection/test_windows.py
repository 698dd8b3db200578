"""Windows: where they lie, that batching changes nothing, and images too small for them."""

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.detection.models.backbone import build_backbone
from dinov3.eval.detection.models.windows import WindowsWrapper, window_spans
from tests.eval.detection.tiny import tiny_backbone, tiny_config, tiny_detector


@pytest.mark.parametrize(
    ("side", "n", "want"),
    [
        (1536, 3, [(0, 512), (512, 1024), (1024, 1536)]),
        (112, 3, [(0, 48), (48, 96), (96, 112)]),
        (96, 2, [(0, 48), (48, 96)]),
        (64, 3, [(0, 32), (32, 64)]),  # three would leave nothing for the last
        (16, 3, [(0, 16)]),
        (48, 3, [(0, 16), (16, 32), (32, 48)]),
    ],
)
def test_where_windows_lie(side: int, n: int, want: list[tuple[int, int]]) -> None:
    assert window_spans(side, n, 16) == want


class Counting(nn.Module):
    """Mean over patches, and the batches it saw."""

    stride = 16
    num_channels = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(tuple(x.shape))
        return nn.functional.avg_pool2d(x, 16)


def test_windows_of_a_size_go_through_the_backbone_together_within_the_limit() -> None:
    images = torch.randn(2, 3, 96, 144)
    together, one_by_one = Counting(), Counting()
    a = WindowsWrapper(together, 3)(images)
    b = WindowsWrapper(one_by_one, 3, max_pixels=1)(images)
    assert torch.equal(a, b)
    assert together.batches == [(18, 3, 32, 48), (2, 3, 32, 48)]
    assert len(one_by_one.batches) == 10
    torch.testing.assert_close(a[:, 3:], nn.functional.avg_pool2d(images, 16))  # side by side they are the image
    two_at_once = Counting()
    WindowsWrapper(two_at_once, 3, max_pixels=2 * 32 * 48 * 2)(images)
    assert [batch[0] for batch in two_at_once.batches] == [4, 4, 4, 4, 2, 2]


def test_small_images_get_fewer_windows() -> None:
    backbone = build_backbone(tiny_backbone(), tiny_config(n_windows_sqrt=3))
    for size in ((16, 16), (64, 16), (48, 80)):
        features = backbone[0](torch.randn(1, 3, *size))
        assert features.shape == (1, 2 * 4 * 32, size[0] // 16, size[1] // 16)


def test_a_detector_takes_images_of_any_size() -> None:
    detector = tiny_detector(n_windows_sqrt=3, hidden_dim=64).eval()
    for sizes in ([(1, 1)], [(17, 40), (50, 3)], [(64, 64)]):
        with torch.no_grad():
            outputs = detector([torch.randn(3, *size) for size in sizes])
        assert bool(outputs["pred_boxes"].isfinite().all())
