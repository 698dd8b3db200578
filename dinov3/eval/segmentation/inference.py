"""From images to class maps: one forward for the whole image, or windows that slide over it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Size = Sequence[int]
HeadType = Literal["linear", "m2f"]

# Of Mask2Former's masks, that are turned into classes at a time: 8 MiB.
_MASK_NUMBERS = 2**21


class Predictor(Protocol):
    """What inference needs of a segmentation model."""

    def predict(self, x: Tensor, rescale_to: Any) -> Any:
        """Logits `[B, K, *rescale_to]` (linear), or `pred_logits` `[B, Q, K + 1]` and `pred_masks` (Mask2Former)."""
        ...


@torch.no_grad()
def make_inference(
    x: Tensor,
    segmentation_model: Predictor,
    inference_mode: Literal["whole", "slide"] = "whole",
    decoder_head_type: HeadType = "linear",
    rescale_to: Size = (512, 512),
    n_output_channels: int = 256,
    crop_size: Size | None = None,
    stride: Size | None = None,
    apply_horizontal_flip: bool = False,
    num_max_forward: int = 1,
    output_activation: Callable[[Tensor], Tensor] | None = None,
    *,
    whole_size: Size = (512, 512),
) -> Tensor:
    """Class map of images.

    Args:
        x: normalised images `[B, 3, H, W]` on the model's device.
        segmentation_model: its `predict` is called.
        inference_mode: `whole`: the image, resized to `whole_size`, in one forward; `slide`: see `slide_inference`.
        decoder_head_type: what the model predicts.
        rescale_to: (height, width) of the result, in pixels.
        n_output_channels: number of classes K (`slide`).
        crop_size, stride: of the windows, (height, width) in pixels (`slide`).
        apply_horizontal_flip: x is mirrored: mirror the result back.
        num_max_forward: see `slide_inference`.
        output_activation: applied to the result, such as a softmax over dimension 1.
        whole_size: (height, width) in pixels that the model sees (`whole`).

    Returns:
        `[B, K, *rescale_to]`: logits of a linear head, sums of mask probabilities of Mask2Former; activated.

    Raises:
        ValueError: unknown mode or head, or windows that don't fit; see `slide_inference`.
    """
    if inference_mode == "slide":
        if crop_size is None or stride is None:
            raise ValueError(f"inference_mode='slide' needs crop_size and stride, got {crop_size} and {stride}")
        pred = slide_inference(
            x, segmentation_model, decoder_head_type, n_output_channels, crop_size, stride, num_max_forward
        )
        if pred.shape[-2:] != tuple(rescale_to):
            pred = F.interpolate(pred, size=tuple(rescale_to), mode="bilinear", align_corners=False)
    elif inference_mode == "whole":
        x = F.interpolate(x, size=tuple(whole_size), mode="bilinear", align_corners=False)
        output = segmentation_model.predict(x, rescale_to=tuple(rescale_to))
        pred = semantic_map(output, decoder_head_type)
    else:
        raise ValueError(f"inference_mode is 'whole' or 'slide', got {inference_mode!r}")
    if apply_horizontal_flip:
        pred = pred.flip([-1])
    return pred if output_activation is None else output_activation(pred)


@torch.no_grad()
def slide_inference(
    inputs: Tensor,
    segmentation_model: Predictor,
    decoder_head_type: HeadType = "linear",
    n_output_channels: int = 256,
    crop_size: Size = (512, 512),
    stride: Size = (341, 341),
    num_max_forward: int = 1,
) -> Tensor:
    """Average over windows that cover the image.

    An image smaller than the window in both directions gets square windows of its shorter side, with a step that
    leaves no gap. Windows that would end outside the image are moved back, and are smaller only where the image is.
    Sums are float32, on the device of the predictions.

    Args:
        inputs: normalised images `[B, 3, H, W]`.
        segmentation_model: its `predict` is called on every window.
        decoder_head_type: what the model predicts.
        n_output_channels: number of classes K.
        crop_size, stride: (height, width) of the windows and of the steps between them, in pixels.
        num_max_forward: at least so many forwards are done, the last ones on zeros: models sharded over processes
            need as many on each of them.

    Returns:
        float32 `[B, K, H, W]`. Mask2Former's scores of a window are rounded to bfloat16, as those behind the published
        numbers were.

    Raises:
        ValueError: windows, steps or images that are empty, steps larger than windows, or a model with another number
            of classes.
    """
    height, width = inputs.shape[-2:]
    crop, step = _fit_windows((height, width), crop_size, stride)
    total: Tensor | None = None
    n_windows = torch.zeros(1, 1, height, width, device=inputs.device)
    n_forward = 0
    for rows, columns in _windows((height, width), crop, step):
        window = inputs[:, :, rows, columns]
        output = segmentation_model.predict(window, rescale_to=tuple(window.shape[-2:]))
        pred = semantic_map(output, decoder_head_type, round_to_bfloat16=True)
        if pred.shape[1] != n_output_channels:
            raise ValueError(f"the model predicts {pred.shape[1]} classes, n_output_channels is {n_output_channels}")
        if total is None:
            total = torch.zeros(*pred.shape[:2], height, width, device=pred.device)
        total[:, :, rows, columns] += pred
        n_windows[:, :, rows, columns] += 1
        n_forward += 1
    for _ in range(n_forward, num_max_forward):
        segmentation_model.predict(inputs.new_zeros(*inputs.shape[:2], *crop), rescale_to=crop)
    assert total is not None, "a non-empty image has at least one window"
    return total.div_(n_windows.to(total.device))


def semantic_map(output: Any, decoder_head_type: HeadType, *, round_to_bfloat16: bool = False) -> Tensor:
    """Class map `[B, K, H, W]` of what a model predicted.

    Linear heads predict it. For Mask2Former, classes are summed over queries: softmax of the class logits, without the
    last class ("no object"), times sigmoid of the mask.

    Args:
        output: of `predict`.
        decoder_head_type: which head it is from.
        round_to_bfloat16: round Mask2Former's probabilities and the result to bfloat16.

    Source: Cheng et al., MaskFormer (2021), section 3.4.
    """
    if decoder_head_type == "linear":
        logits: Tensor = output
        return logits
    if decoder_head_type != "m2f":
        raise ValueError(f"decoder_head_type is 'linear' or 'm2f', got {decoder_head_type!r}")
    classes = output["pred_logits"].float().softmax(dim=-1)[..., :-1]
    masks: Tensor = output["pred_masks"]
    step = max(1, _MASK_NUMBERS // masks[:, :, :1].numel())  # what is made on the way stays in the cache
    return torch.cat([_sum_queries(classes, rows, round_to_bfloat16) for rows in masks.split(step, dim=2)], dim=2)


def _sum_queries(classes: Tensor, mask_logits: Tensor, round_to_bfloat16: bool) -> Tensor:
    """Class map `[B, K, h, W]` of some rows: probabilities `[B, Q, K]` times masks `[B, Q, h, W]`."""
    masks = mask_logits.float().sigmoid()
    if not round_to_bfloat16:
        return torch.einsum("bqk,bqhw->bkhw", classes, masks)
    classes, masks = classes.bfloat16(), masks.bfloat16()
    if masks.device.type == "cpu":  # where bfloat16 matrices can be a hundred times slower
        classes, masks = classes.float(), masks.float()
    return torch.einsum("bqk,bqhw->bkhw", classes, masks).bfloat16()


def _fit_windows(size: tuple[int, int], crop_size: Size, stride: Size) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of windows and steps for an image of `size`."""
    (height, width), (crop_h, crop_w), (step_h, step_w) = size, crop_size, stride
    if min(height, width, crop_h, crop_w, step_h, step_w) <= 0:
        raise ValueError(
            f"image, windows and steps must not be empty: got {height} x {width}, crop_size={tuple(crop_size)}, "
            f"stride={tuple(stride)}"
        )
    if step_h > crop_h or step_w > crop_w:
        raise ValueError(
            f"stride={tuple(stride)} is larger than crop_size={tuple(crop_size)}: pixels between windows would have no "
            "prediction; use a stride of at most the crop"
        )
    if crop_h > height and crop_w > width:
        crop_h = crop_w = min(height, width)
        step_h, step_w = min(step_h, crop_h), min(step_w, crop_w)
    return (crop_h, crop_w), (step_h, step_w)


def _windows(size: tuple[int, int], crop: tuple[int, int], step: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows, row by row."""
    rows, columns = (_starts_and_ends(*axis) for axis in zip(size, crop, step, strict=True))
    for row in rows:
        for column in columns:
            yield row, column


def _starts_and_ends(size: int, crop: int, step: int) -> list[slice]:
    count = max(size - crop + step - 1, 0) // step + 1
    ends = [min(i * step + crop, size) for i in range(count)]
    return [slice(max(end - crop, 0), end) for end in ends]
