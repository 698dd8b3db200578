"""Windows and whole images: coverage, averages, sizes, what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.segmentation.inference import make_inference, semantic_map, slide_inference


class Recorder:
    """A model that predicts the pixels it sees, and notes the sizes of windows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.dtype = dtype

    def predict(self, x: Tensor, rescale_to: Any) -> Tensor:
        self.sizes.append((x.shape[-2], x.shape[-1]))
        return F.interpolate(x, size=tuple(rescale_to), mode="bilinear", align_corners=False).to(self.dtype)


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (90, 5), (20, 20), (33, 47), (31, 64), (100, 12)])
@pytest.mark.parametrize(("crop", "stride"), [((32, 32), (32, 32)), ((32, 24), (20, 7)), ((40, 16), (1, 16))])
def test_a_model_that_copies_gives_the_image_whatever_its_size(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> None:
    image = torch.randn(2, 3, *size)
    model = Recorder()
    torch.testing.assert_close(slide_inference(image, model, "linear", 3, crop, stride), image)
    assert max(max(sizes) for sizes in model.sizes) <= max(crop)


def test_windows_keep_their_size_by_moving_back() -> None:
    model = Recorder()
    slide_inference(torch.zeros(1, 3, 50, 70), model, "linear", 3, (32, 32), (20, 20))
    assert model.sizes == [(32, 32)] * (2 * 3)


def test_an_image_smaller_than_the_window_gets_square_windows_without_gaps() -> None:
    model = Recorder()
    image = torch.randn(1, 3, 200, 890)
    out = slide_inference(image, model, "linear", 3, (896, 896), (596, 596))
    torch.testing.assert_close(out, image)
    assert model.sizes == [(200, 200)] * 5


def test_an_image_narrower_than_the_window_in_one_direction_keeps_it_in_the_other() -> None:
    model = Recorder()
    slide_inference(torch.zeros(1, 3, 20, 70), model, "linear", 3, (32, 32), (32, 32))
    assert model.sizes == [(20, 32)] * 3


def test_windows_are_summed_in_float32_whatever_the_model_computes_in() -> None:
    image = torch.ones(1, 3, 64, 64)
    out = slide_inference(image, Recorder(torch.bfloat16), "linear", 3, (32, 32), (1, 1))  # 1089 windows
    assert out.dtype == torch.float32
    assert torch.equal(out, image)


def test_sharded_models_run_as_often_on_every_process() -> None:
    model = Recorder()
    slide_inference(torch.zeros(1, 3, 32, 32), model, "linear", 3, (32, 32), (16, 16), num_max_forward=4)
    assert model.sizes == [(32, 32)] * 4
    slide_inference(torch.zeros(1, 3, 64, 64), model, "linear", 3, (32, 32), (32, 32), num_max_forward=2)
    assert len(model.sizes) == 8


def test_order_of_resize_flip_and_activation() -> None:
    image = torch.randn(1, 3, 24, 40)
    flipped = image.flip([-1])
    inference = partial(make_inference, inference_mode="slide", n_output_channels=3, crop_size=(16, 16), stride=(8, 8))
    out = inference(flipped, Recorder(), rescale_to=(12, 20), apply_horizontal_flip=True, output_activation=torch.exp)
    resized = F.interpolate(flipped, size=(12, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, resized.flip([-1]).exp())


def test_the_size_that_a_whole_image_is_seen_at() -> None:
    model = Recorder()
    out = make_inference(torch.zeros(1, 3, 30, 40), model, rescale_to=(30, 40))
    assert out.shape == (1, 3, 30, 40)
    make_inference(torch.zeros(1, 3, 30, 40), model, rescale_to=(30, 40), whole_size=(96, 64))
    assert model.sizes == [(512, 512), (96, 64)]


def test_no_object_belongs_to_no_class() -> None:
    logits = torch.tensor([[[20.0, 0.0, 0.0], [0.0, 0.0, 20.0]]])  # the second query sees nothing
    masks = torch.full((1, 2, 2, 2), 20.0)
    output = {"pred_logits": logits, "pred_masks": masks}
    expected = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 2, 2)
    torch.testing.assert_close(semantic_map(output, "m2f"), expected, atol=1e-4, rtol=0)
    rounded = semantic_map(output, "m2f", round_to_bfloat16=True)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference_mode": "slice"}, "inference_mode is 'whole' or 'slide', got 'slice'"),
        ({"decoder_head_type": "dpt"}, "decoder_head_type is 'linear' or 'm2f', got 'dpt'"),
        ({"inference_mode": "slide"}, "needs crop_size and stride, got None and None"),
        (
            {"inference_mode": "slide", "crop_size": (8, 8), "stride": (8, 9)},
            r"stride=\(8, 9\) is larger than crop_size=\(8, 8\)",
        ),
        ({"inference_mode": "slide", "crop_size": (8, 0), "stride": (8, 0)}, "must not be empty"),
        (
            {"inference_mode": "slide", "crop_size": (8, 8), "stride": (8, 8), "n_output_channels": 150},
            "predicts 3 classes, n_output_channels is 150",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_inference(torch.zeros(1, 3, 16, 16), Recorder(), **options)
