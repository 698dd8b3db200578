"""The photographs inside installed packages."""

from pathlib import Path

import pytest

from dinov3.data import photos


def test_every_photograph_names_its_author_and_licence() -> None:
    assert all(photo.credit and photo.licence and photo.title for photo in photos.PHOTOS)
    assert len({photo.name for photo in photos.PHOTOS}) == len(photos.PHOTOS)
    assert len(photos.available_photos()) >= 2


def test_photographs_are_scaled_by_their_shorter_side() -> None:
    photo = photos.available_photos()[0]
    whole = photos.open_photo(photo)
    small = photos.open_photo(photo, short_side=32)
    assert min(small.size) == 32
    assert small.mode == "RGB"
    assert small.width / small.height == pytest.approx(whole.width / whole.height, abs=0.05)


def test_what_is_not_installed_is_not_there() -> None:
    assert photos.bundled_file("no_such_package", "data/x.png") is None
    assert photos.bundled_file("dinov3", "no/such/file.png") is None
    assert photos.bundled_file("dinov3", "data/photos.py") == Path(photos.__file__)
    absent = photos.Photo("absent", "data/x.png", "no_such_package", "", "", "")
    with pytest.raises(FileNotFoundError, match="no_such_package is not on this machine"):
        photos.open_photo(absent)
