"""What an aligned model does without training: classify, retrieve, segment.

Library functions on tensors; `classification.py`, `retrieval.py` and `segmentation.py` are commands that use them.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 3.1;
Jose et al., "DINOv2 Meets Text" (2024), section 4, for segmentation by patches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.text.dinotxt_model import DINOTxt
from dinov3.models.backbone import Backbone

LOGIT_SCALE = 100.0
RECALL_AT = (1, 5, 10)

Patches = Literal["head", "backbone"]

# From texts to token ids [n, N].
Tokenize = Callable[[list[str]], Tensor]


# -- Classes as vectors -----------------------------------------------------------------------------------------------


def fill_templates(class_name: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class: each template with the name in place of `{}`.

    Raises:
        ValueError: a template without `{}`, or none at all.
    """
    if not templates:
        raise ValueError("expected at least one prompt template, such as 'a photo of a {}.'")
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"a prompt template needs {{}} for the name of the class, got {wrong[0]!r}")
    return [template.replace("{}", class_name) for template in templates]


@torch.no_grad()
def class_vectors(
    model: DINOTxt,
    tokenize: Tokenize,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    patch_level: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """One unit vector per class `[K, D]`: the mean of its prompts' unit vectors.

    Args:
        model: on its device.
        tokenize: from prompts to token ids.
        class_names, templates: see `fill_templates`.
        patch_level: use the half of the text features that is aligned to patches (D = embed_dim / 2).
        batch_size: prompts encoded at a time.

    Raises:
        ValueError: no classes, bad templates, or `patch_level` with a model that isn't aligned to patches.
    """
    if not class_names:
        raise ValueError("expected at least one class name")
    prompts = [prompt for name in class_names for prompt in fill_templates(name, templates)]
    device = model.logit_scale.device
    batches = [tokenize(prompts[i : i + batch_size]).to(device) for i in range(0, len(prompts), batch_size)]
    features = torch.cat([model.encode_text(tokens).float() for tokens in batches])
    return average_prompts(features.unflatten(0, (len(class_names), -1)), model if patch_level else None)


def average_prompts(features: Tensor, patch_level_of: DINOTxt | None = None) -> Tensor:
    """Unit vectors `[K, D]` of text features of K classes with several prompts each `[K, n, D']`.

    Args:
        features: unnormalised.
        patch_level_of: a model, to use the half of its features that is aligned to patches.
    """
    if patch_level_of is not None:
        features = patch_part(patch_level_of, features)
    return F.normalize(F.normalize(features, dim=-1).mean(dim=1), dim=-1)


def patch_part(model: DINOTxt, features: Tensor) -> Tensor:
    """The last part `[..., D']` of text features `[..., embed_dim]`: what is aligned to the pooled patch tokens.

    Raises:
        ValueError: the model's image features have no part for patches.
    """
    tower = model.visual_model
    if not tower.use_patch_tokens:
        raise ValueError(
            "this model is aligned to class tokens only: for patches it must be trained with "
            "vision_model_use_patch_tokens=true"
        )
    return features[..., features.shape[-1] // 2 :] if tower.use_class_token else features


@torch.no_grad()
def classify(model: DINOTxt, images: Tensor, classes: Tensor) -> Tensor:
    """Logits `[B, K]` of images `[B, 3, H, W]` for class vectors `[K, D]`: 100 times the cosine similarities."""
    return LOGIT_SCALE * model.encode_image(images, normalize=True).float() @ classes.mT


# -- Retrieval --------------------------------------------------------------------------------------------------------


def retrieval_recall(
    image_features: Tensor, text_features: Tensor, image_of_text: Sequence[int] | Tensor, ks: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall at k in percent, of images for each text and of texts for each image.

    Args:
        image_features: `[I, D]`, L2-normalised.
        text_features: `[T, D]`, L2-normalised.
        image_of_text: for each text the row of its image; an image may have several texts, of which any counts.
        ks: how many of the nearest are looked at.

    Returns:
        `text_to_image_recall@<k>`, `image_to_text_recall@<k>` (over the images that have a text).

    Raises:
        ValueError: nothing to retrieve, or numbers that don't fit.
    """
    owner = torch.as_tensor(image_of_text, device=image_features.device)
    if len(owner) != len(text_features) or len(text_features) == 0 or len(image_features) == 0:
        raise ValueError(
            f"got {len(image_features)} images, {len(text_features)} texts and the images of {len(owner)} texts: need "
            "at least one of each, and an image for each text"
        )
    image_ranks, text_ranks = [], []
    for start in range(0, len(text_features), 1024):
        rows = slice(start, start + 1024)
        similarity = text_features[rows] @ image_features.mT  # [t, I]
        own = similarity.gather(1, owner[rows, None])
        image_ranks.append((similarity > own).sum(dim=1))
    for start in range(0, len(image_features), 1024):
        similarity = image_features[start : start + 1024] @ text_features.mT  # [i, T]
        images = torch.arange(start, start + len(similarity), device=owner.device)
        is_own = owner[None, :] == images[:, None]
        best = similarity.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        text_ranks.append((similarity > best).sum(dim=1)[is_own.any(dim=1)])
    results: dict[str, float] = {}
    for name, ranks in (("text_to_image", torch.cat(image_ranks)), ("image_to_text", torch.cat(text_ranks))):
        results |= {f"{name}_recall@{k}": 100.0 * (ranks < k).double().mean().item() for k in ks}
    return results


# -- Segmentation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_whole(model: DINOTxt, image: Tensor, classes: Tensor, *, patches: Patches = "backbone") -> Tensor:
    """Cosine similarities `[K, h, w]` of the patches of one image with class vectors.

    Args:
        model: on its device.
        image: normalised `[3, H, W]`; stretched (bicubic) to the next multiples of the patch.
        classes: patch-level vectors `[K, D]`, see `class_vectors`.
        patches: tokens of the backbone, as the reference compares (they must have the width of the class vectors), or
            those after the head, whose mean the training aligns to texts.

    Raises:
        ValueError: patch tokens and class vectors of different widths.
    """
    return _similarities(model, image[None], classes, patches)[0]


@torch.no_grad()
def predict_slide(
    model: DINOTxt,
    image: Tensor,
    classes: Tensor,
    side: int,
    stride: int,
    *,
    patches: Patches = "backbone",
    batch_size: int = 8,
) -> Tensor:
    """Class probabilities `[K, H, W]` of the pixels of one image, averaged over windows.

    In each window the similarities are enlarged (bilinear) to its pixels, and a softmax over classes is taken of them
    as they are, without a temperature.

    Args:
        model, image, classes, patches: see `predict_whole`.
        side, stride: of the windows in pixels. An image smaller than a window is one smaller window.
        batch_size: windows of equal size that are computed at a time.

    Raises:
        ValueError: windows that leave pixels out, or aren't there; or see `predict_whole`.
    """
    if not 1 <= stride <= side:
        raise ValueError(f"windows need 1 <= stride <= side, got stride {stride} and side {side}")
    height, width = image.shape[-2:]
    boxes = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in _windows(height, side, stride)
        for left, right in _windows(width, side, stride)
    ]
    total = torch.zeros(len(classes), height, width, device=image.device)
    count = torch.zeros(height, width, device=image.device)
    for start in range(0, len(boxes), batch_size):
        chosen = boxes[start : start + batch_size]
        windows = torch.stack([image[:, rows, columns] for rows, columns in chosen])  # all of one size
        similarities = _similarities(model, windows, classes, patches)
        pixels = F.interpolate(similarities, size=windows.shape[-2:], mode="bilinear", align_corners=False)
        for (rows, columns), probabilities in zip(chosen, pixels.softmax(dim=1), strict=True):
            total[:, rows, columns] += probabilities
            count[rows, columns] += 1
    return total / count


def upsample(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores `[K, h, w]` at another size (bilinear); the arg max over the first axis is the segmentation."""
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def resize_short_side(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side set to `short_side` and the other scaled with it, rounded down [pixels].

    Unchanged if the shorter side has that length already.
    """
    height, width = size
    if min(size) == short_side:
        return size
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def _similarities(model: DINOTxt, images: Tensor, classes: Tensor, patches: Patches) -> Tensor:
    """Cosines `[B, K, h, w]` of patches of images `[B, 3, H, W]` with class vectors."""
    patch = cast(Backbone, model.visual_model.backbone).stride
    height, width = (-(-side // patch) for side in images.shape[-2:])
    size = (height * patch, width * patch)
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    if patches not in get_args(Patches):
        raise ValueError(f"patches are of the 'head' or of the 'backbone', got {patches!r}")
    _, of_head, of_backbone = model.encode_image_with_patch_tokens(images)
    tokens = of_head if patches == "head" else of_backbone
    if tokens.shape[-1] != classes.shape[-1]:
        raise ValueError(
            f"patch tokens of the {patches} are {tokens.shape[-1]} wide, class vectors {classes.shape[-1]}: make these "
            "with patch_level=True, and use patches=head if the model projects its tokens"
        )
    cosines = F.normalize(tokens.float(), dim=-1) @ classes.mT  # [B, h * w, K]
    return cosines.mT.unflatten(2, (height, width))


def _windows(size: int, side: int, stride: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the windows along one axis; the last is moved back to end at the border."""
    for i in range(max(size - side + stride - 1, 0) // stride + 1):
        end = min(i * stride + side, size)
        yield max(end - side, 0), end
