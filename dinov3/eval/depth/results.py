"""Files that show predictions beside the truth: pictures and tensors of single images, errors with scales in metres."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.depth.config import DepthConfig, ResultExtension
from dinov3.eval.depth.visualization_utils import alpha_blend, depth_tensor_to_colorized_pil, unnormalize
from dinov3.eval.pictures import ColourBar, as_picture, colour_values, save_panels

METRIC_COLOURS = "turbo"
_ERROR_COLOURS = "magma"
_SHOWN_PART = 0.98  # of the pixels lie within the scale of an error map
_SMALLEST_SCALE = 1e-3  # metres


class ResultWriter:
    """Writes what `result_config` asks for.

    Args:
        folder: of the files, made when needed.
        config: the run's.
    """

    def __init__(self, folder: Path, config: DepthConfig) -> None:
        self.folder = folder
        self.options = config.result_config
        self.mean, self.std = config.transforms.mean, config.transforms.std
        self.ignored_value = config.eval.ignored_value

    def save(self, index: int, image: Tensor, prediction: Tensor, truth: Tensor) -> None:
        """Write the files of one sample.

        Args:
            index: its number, part of the names.
            image: normalised, `[3, h, w]`.
            prediction, truth: `[1, H, W]` in metres; `ignored_value` where there is no true depth.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        pixels = unnormalize(image, self.mean, self.std)
        prediction, truth = prediction.detach().float().cpu(), truth.detach().float().cpu()
        if self.options.save_results:
            if self.options.extension is ResultExtension.PTH:
                content = {"image": pixels, "pred": prediction, "target": truth}
                torch.save(content, self.folder / f"results_{index}.pth")
            else:
                self._save_pictures(index, pixels, prediction, truth)
        if self.options.save_error_maps:
            valid = truth != self.ignored_value
            save_depth_panels(self.folder / f"depth_{index}.png", as_picture(pixels), prediction, truth, valid)
            save_error_panels(self.folder / f"error_{index}.png", as_picture(pixels), prediction, truth, valid)

    def _save_pictures(self, index: int, pixels: Tensor, prediction: Tensor, truth: Tensor) -> None:
        """Prediction and truth side by side, each in colours from its smallest to its largest value."""
        from PIL import Image

        size = _size(truth, self.options.save_resolution)
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
        photo = Image.fromarray(as_picture(pixels))
        pictures: dict[str, Any] = {"image": photo}
        for name, depth in (("pred", prediction), ("gt", truth)):
            resized = F.interpolate(depth[None], size=size, mode="nearest")[0]
            colours = depth_tensor_to_colorized_pil(resized)
            alpha = self.options.overlay_alpha
            pictures[name] = colours if alpha >= 1 else alpha_blend(photo, colours, alpha)
        beside = np.concatenate([np.asarray(pictures["pred"]), np.asarray(pictures["gt"])], axis=1)
        extension = self.options.extension.value
        Image.fromarray(beside).save(self.folder / f"results_{index}.{extension}")
        if self.options.save_separate_files:
            for name, picture in pictures.items():
                picture.save(self.folder / f"{name}_{index}.{extension}")


def save_depth_panels(path: Path, image: np.ndarray, prediction: Tensor, truth: Tensor, valid: Tensor) -> None:
    """Image, truth and prediction with one scale in metres; white: no true depth.

    Args:
        path: PNG file.
        image: uint8 `[h, w, 3]`.
        prediction, truth: `[1, H, W]` in metres.
        valid: booleans `[1, H, W]`.
    """
    shown = truth[valid] if bool(valid.any()) else prediction
    low, high = float(shown.min()), float(shown.max())
    panels = {
        "image": image,
        "true depth": colour_values(torch.where(valid, truth, torch.nan), low, high, METRIC_COLOURS),
        "predicted depth": colour_values(prediction, low, high, METRIC_COLOURS),
    }
    save_panels(path, panels, colour_bar=ColourBar(low, high, "depth [m]", METRIC_COLOURS))


def save_error_panels(path: Path, image: np.ndarray, prediction: Tensor, truth: Tensor, valid: Tensor) -> None:
    """Image and absolute error with its scale in metres; arguments as above."""
    error = torch.where(valid, (prediction - truth).abs(), torch.nan)
    known = error[valid].sort().values
    mean, high = (float(known.mean()), float(known[int(_SHOWN_PART * (len(known) - 1))])) if len(known) else (0.0, 0.0)
    high = max(high, _SMALLEST_SCALE)
    save_panels(
        path,
        {"image": image, f"error, mean {mean:.3g} m": colour_values(error, 0.0, high, _ERROR_COLOURS)},
        colour_bar=ColourBar(0.0, high, "|predicted - true| [m]", _ERROR_COLOURS),
    )


def _size(depth: Tensor, shorter_side: int | None) -> tuple[int, int]:
    """(height, width) of pictures [pixels]."""
    height, width = depth.shape[-2:]
    if shorter_side is None:
        return height, width
    scale = shorter_side / min(height, width)
    return round(height * scale), round(width * scale)
