"""Batches of images and tokenised captions, and captions of data sets."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinov3.data import SamplerType, make_data_loader, make_dataset
from dinov3.eval.text.config import TextTrainConfig
from dinov3.eval.text.tokenizer import CONTEXT_LENGTH, Tokenizer


class CaptionCollate:
    """From (image, caption) pairs to images `[B, 3, H, W]` and token ids `[B, N]`.

    Args:
        tokenizer: of the model.
        context_length: N.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int = CONTEXT_LENGTH) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, pairs: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
        captions = [caption for _, caption in pairs]
        wrong = [caption for caption in captions if not isinstance(caption, str)]
        if wrong:
            raise ValueError(
                f"got the target {wrong[0]!r}, expected a caption: the data set must give (image, text) pairs, as "
                "CocoCaptions, CaptionList and WebDatasetCaptions do"
            )
        images = torch.stack([image for image, _ in pairs])
        return images, self.tokenizer.tokenize(captions, self.context_length)


def make_train_loader(
    config: TextTrainConfig,
    transform: Callable[..., Any],
    tokenizer: Tokenizer,
    context_length: int,
    start_iteration: int,
) -> Any:
    """Endless batches from an iteration on: functions of (seed, iteration, rank), whatever the number of workers.

    The last, incomplete batch of a pass over the data is filled from the next one.
    """
    return make_data_loader(
        dataset=make_dataset(dataset_str=config.train_dataset_str, transform=transform),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        shuffle=config.dataset_shuffle,
        seed=config.seed,
        sampler_type=SamplerType.SHARDED_INFINITE if config.dataset_use_cache else SamplerType.INFINITE,
        drop_last=True,
        persistent_workers=True,
        collate_fn=CaptionCollate(tokenizer, context_length),
        draw_seed=config.seed,
        start_iteration=start_iteration,
    )


def all_captions(dataset: Any) -> tuple[list[str], list[int]]:
    """The captions of all samples of a data set, and for each the number of its sample.

    Data sets with several captions a sample give them by `get_captions`, others have one `get_target`.
    """
    several = getattr(dataset, "get_captions", lambda index: [dataset.get_target(index)])
    pairs = [(caption, index) for index in range(len(dataset)) for caption in several(index)]
    return [caption for caption, _ in pairs], [index for _, index in pairs]


class WithoutTargets(Dataset[tuple[Any, None]]):
    """Items (image, None) of a data set of pairs."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return self.dataset[index][0], None
