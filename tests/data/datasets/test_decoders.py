from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets.decoders import (
    DenseTargetDecoder,
    EncodedImage,
    ImageDataDecoder,
    TargetDecoder,
    UndecodableImageError,
    UprightImageDataDecoder,
    to_rgb,
)
from tests.helpers.images import broken_images, odd_images


@pytest.mark.parametrize("name", odd_images())
def test_every_kind_of_image_becomes_rgb(name: str) -> None:
    image = UprightImageDataDecoder(odd_images()[name]).decode()
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.asarray(image).std() > 10  # not black, not white


def test_the_plain_decoder_leaves_photographs_as_they_are_stored() -> None:
    # As in the published code: ImageNet's few images with an orientation keep the pixels the numbers were made with.
    stored = odd_images()["exif.jpg"]
    assert ImageDataDecoder(stored).decode().size == (30, 40)
    upright = UprightImageDataDecoder(stored).decode()
    turned_back = ImageDataDecoder(stored).decode().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(upright), np.asarray(turned_back))


@pytest.mark.parametrize("orientation", [0, 3, 5, 8, 9, 1000])
def test_the_size_before_decoding_is_the_one_after(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # beyond 8 it means nothing
    buffer = BytesIO()
    Image.new("RGB", (4, 6)).save(buffer, format="JPEG", exif=exif)
    image = EncodedImage(buffer.getvalue(), upright=True)
    assert image.size() == image.decode(1).size


def test_16_bit_grey_values_are_scaled_not_cut_off() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    decoded = np.asarray(ImageDataDecoder(buffer.getvalue()).decode())
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("name", broken_images())
def test_broken_images_raise(name: str) -> None:
    with pytest.raises(UndecodableImageError, match=r"(?i)truncated|cannot identify"):
        ImageDataDecoder(broken_images()[name]).decode()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_dense_targets_keep_their_values(dtype: type) -> None:
    values = np.array([[0, 7, np.iinfo(dtype).max]], dtype=dtype)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    target = DenseTargetDecoder(buffer.getvalue()).decode()
    assert np.array_equal(np.asarray(target), values)
    assert TargetDecoder(3).decode() == 3


def test_32_bit_grey_values_are_taken_as_16_bits() -> None:
    # Older Pillow opens 16-bit PNG files in this mode.
    image = Image.fromarray(np.array([[-5, 256, 65535, 70000]], dtype=np.int32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 255, 255]
