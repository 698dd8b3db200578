"""The class scores of an image: a model's predictions for its views, averaged. For evaluation and for prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.inference import HeadType, Predictor, make_inference
from dinov3.utils.dtype import resolve_compute_dtype


@dataclass(frozen=True)
class ViewAverager:
    """How a model is asked for the classes of an image.

    Attributes:
        model: its `predict` is called, see `make_inference`.
        device: where it is.
        decoder_head_type: `linear` or `m2f`.
        num_classes: K.
        mode: `slide`, or `whole`: a view in one forward, at its own size.
        crop_size, stride: side of the square windows, and step between them [pixels].
        dtype: that views have, where the device computes in it.
    """

    model: Predictor
    device: torch.device | str
    decoder_head_type: HeadType
    num_classes: int
    mode: str = "slide"
    crop_size: int | None = None
    stride: int | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_config(cls, model: Any, config: SegmentationConfig, device: torch.device | str) -> "ViewAverager":
        """As a configuration says."""
        return cls(
            model=model,
            device=device,
            decoder_head_type=cast(HeadType, config.decoder_head.type),
            num_classes=config.decoder_head.num_classes,
            mode=config.eval.mode,
            crop_size=config.eval.crop_size,
            stride=config.eval.stride,
            dtype=getattr(torch, config.model_dtype.value),
        )

    @torch.no_grad()
    def __call__(self, views: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Probabilities of the classes at every pixel, the mean over the views: float32 [1, K, *size].

        Args:
            views: normalised images [1, 3, h, w]; the second half of several ones are mirrored.
            size: (height, width) of the result [pixels].

        Raises:
            ValueError: no view; see `make_inference`.
        """
        if not views:
            raise ValueError("an image needs at least one view")
        dtype = resolve_compute_dtype(self.dtype, self.device)
        total: Tensor | None = None
        for i, view in enumerate(views):
            scores = make_inference(
                view.to(self.device, dtype=dtype),
                self.model,
                inference_mode=cast(Any, self.mode),
                decoder_head_type=self.decoder_head_type,
                rescale_to=tuple(size),
                n_output_channels=self.num_classes,
                crop_size=None if self.crop_size is None else (self.crop_size, self.crop_size),
                stride=None if self.stride is None else (self.stride, self.stride),
                apply_horizontal_flip=i > 0 and i >= len(views) / 2,
                output_activation=_softmax,
                whole_size=tuple(view.shape[-2:]),
            )
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total.div_(len(views))


def _softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(dim=1)
