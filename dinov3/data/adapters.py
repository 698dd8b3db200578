"""Datasets that wrap datasets."""

from typing import Any

from torch.utils.data import Dataset


class DatasetWithEnumeratedTargets(Dataset[tuple[Any, tuple[int, Any]]]):
    """Adds the index to the target, so that results gathered from several processes can be put in order.

    Args:
        dataset: map-style dataset of (image, target).
        pad_dataset: round the length up to a multiple of `num_replicas`, so that all processes take equally many items.
            Items past the end repeat the dataset from its start and carry index -1.
        num_replicas: number of processes, required with `pad_dataset`.
        mark_skipped: samples that can't be read, in whose place the dataset gave another one, carry index -1 too.

    Items are (image, (index, target)); a target of None becomes the index of the sample.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        pad_dataset: bool = False,
        num_replicas: int | None = None,
        *,
        mark_skipped: bool = False,
    ) -> None:
        self._dataset = dataset
        self._was_skipped = getattr(dataset, "was_skipped", None) if mark_skipped else None
        self._size = len(dataset)  # type: ignore[arg-type]
        self._padded_size = self._size
        if pad_dataset:
            if num_replicas is None or num_replicas < 1:
                raise ValueError(f"pad_dataset needs num_replicas, the number of processes, got {num_replicas}")
            self._padded_size = -(-self._size // num_replicas) * num_replicas

    def __len__(self) -> int:
        return self._padded_size

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        source = self._source(index)
        image, target = self._dataset[source]
        skipped = self._was_skipped is not None and self._was_skipped(source)
        return image, (-1 if skipped else self._reported(index), source if target is None else target)

    @property
    def skipped(self) -> Any:
        """The dataset's list of samples that can't be read, None without one."""
        return getattr(self._dataset, "skipped", None)

    def get_target(self, index: int) -> tuple[int, Any]:
        """(index, or -1 for a padding item; the dataset's target)."""
        return self._reported(index), self._dataset.get_target(self._source(index))  # type: ignore[attr-defined]

    def get_image_data(self, index: int) -> bytes:
        """The encoded image, as the dataset gives it."""
        return self._dataset.get_image_data(self._source(index))  # type: ignore[attr-defined]

    def get_image_relpath(self, index: int) -> str:
        """The image's path, as the dataset gives it."""
        return self._dataset.get_image_relpath(self._source(index))  # type: ignore[attr-defined]

    def get_sample_decoder(self, index: int) -> Any:
        """The dataset's decoder of that sample."""
        return self._dataset.get_sample_decoder(self._source(index))  # type: ignore[attr-defined]

    def _source(self, index: int) -> int:
        if not 0 <= index < self._padded_size:
            raise IndexError(f"index {index} is out of range: the dataset has {self._padded_size} items")
        return index % self._size

    def _reported(self, index: int) -> int:
        return index if index < self._size else -1
