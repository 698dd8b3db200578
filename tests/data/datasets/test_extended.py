import errno
from typing import Any

import pytest

from dinov3.data.datasets import extended
from dinov3.data.datasets.decoders import ImageDataDecoder, TargetDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from tests.helpers.images import broken_images, odd_images


class Two(ExtendedVisionDataset):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(image_decoder=ImageDataDecoder, target_decoder=TargetDecoder, root=None, **kwargs)

    def __len__(self) -> int:
        return 2

    def get_image_data(self, index: int) -> bytes:
        return odd_images()["grey.jpg"] if index == 0 else broken_images()["truncated.jpg"]

    def get_target(self, index: int) -> int:
        return 7


def test_items_go_through_the_transforms() -> None:
    assert Two()[0][1] == 7
    assert Two(transform=lambda image: image.mode, target_transform=lambda target: target + 1)[0] == ("RGB", 8)
    assert Two(transforms=lambda image, target: (target, image.size))[0] == (7, (40, 30))


def test_a_failure_names_the_sample_and_keeps_its_cause() -> None:
    with pytest.raises(RuntimeError, match="can not read image for sample 1") as failure:
        Two()[1]
    assert isinstance(failure.value.__cause__, OSError)


def test_failures_of_transforms_are_not_taken_for_unreadable_images() -> None:
    with pytest.raises(ZeroDivisionError):
        Two(transform=lambda image: 1 / 0)[0]


def test_a_file_system_that_hiccups_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(extended.time, "sleep", pauses.append)
    read, failures = Two.get_image_data, [OSError(errno.EIO, "Input/output error")] * 2

    def sometimes(self: Two, index: int) -> bytes:
        if failures:
            raise failures.pop()
        return read(self, index)

    monkeypatch.setattr(Two, "get_image_data", sometimes)
    assert Two()[0][1] == 7
    assert pauses == [0.1, 1.0]
    failures += [OSError(errno.EIO, "Input/output error")] * 3
    with pytest.raises(RuntimeError, match="can not read image for sample 0"):
        Two()[0]
    failures[:] = [FileNotFoundError(errno.ENOENT, "gone")]
    with pytest.raises(RuntimeError, match="can not read image for sample 0"):
        Two()[0]
    assert len(pauses) == 4
