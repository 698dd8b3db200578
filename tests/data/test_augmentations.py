import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov3.data import DataAugmentationDINO
from dinov3.data.transforms import GaussianBlur
from tests.helpers.images import class_image


def make(**changes: Any) -> DataAugmentationDINO:
    options: dict[str, Any] = {
        "global_crops_scale": (0.32, 1.0),
        "local_crops_scale": (0.05, 0.32),
        "local_crops_number": 2,
        "global_crops_size": 32,
        "local_crops_size": 16,
    }
    return DataAugmentationDINO(**(options | changes))


def blur_of(chain: v2.Compose) -> float:
    (blur,) = [step for step in chain.transforms if isinstance(step, GaussianBlur)]
    return blur.p


def test_effective_blur_probabilities_are_0_and_90_and_50_percent() -> None:
    # As the published models were trained: the first global crop is never blurred.
    augment = make()
    chains = (augment.global_transfo1, augment.global_transfo2, augment.local_transfo)
    assert [blur_of(chain) for chain in chains] == pytest.approx([0.0, 0.9, 0.5])


@pytest.mark.parametrize("gram_size", [None, 24, 48])
@pytest.mark.parametrize("clean_gram", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_crops_have_their_sizes(gram_size: int | None, clean_gram: bool, shared: bool) -> None:
    augment = make(gram_teacher_crops_size=gram_size, gram_teacher_no_distortions=clean_gram, share_color_jitter=shared)
    output = augment(class_image(0, 0, size=50))
    assert [tuple(crop.shape) for crop in output["global_crops"]] == [(3, 32, 32)] * 2
    assert [tuple(crop.shape) for crop in output["local_crops"]] == [(3, 16, 16)] * 2
    assert {crop.dtype for crop in output["global_crops"] + output["local_crops"]} == {torch.float32}
    assert all(a is b for a, b in zip(output["global_crops"], output["global_crops_teacher"], strict=True))
    if gram_size is None:
        assert "gram_teacher_crops" not in output
    else:
        assert [tuple(crop.shape) for crop in output["gram_teacher_crops"]] == [(3, gram_size, gram_size)] * 2


def test_undistorted_crops_keep_the_colours_of_the_image() -> None:
    picture = Image.new("RGB", (60, 60), (200, 90, 30))
    augment = make(gram_teacher_crops_size=32, gram_teacher_no_distortions=True, teacher_no_color_jitter=True)
    expected = augment.normalize(picture)[:, :1, :1].expand(3, 32, 32)
    for _ in range(4):
        output = augment(picture)
        for crop in output["gram_teacher_crops"] + output["global_crops_teacher"]:
            torch.testing.assert_close(crop, expected)


def test_a_shared_colour_jitter_tints_all_crops_alike() -> None:
    picture = Image.new("RGB", (60, 60), (200, 90, 30))
    output = make(share_color_jitter=True)(picture)
    first, (local, other) = output["global_crops"][0], output["local_crops"]
    torch.testing.assert_close(first[:, 0, 0], local[:, 0, 0])
    torch.testing.assert_close(first[:, 0, 0], other[:, 0, 0])


def test_flips_can_be_switched_off() -> None:
    gradient = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    augment = make(horizontal_flips=False, teacher_no_color_jitter=True)
    for _ in range(10):
        for crop in augment(gradient)["global_crops_teacher"]:
            assert crop[:, :, -1].mean() > crop[:, :, 0].mean()


@pytest.mark.parametrize("gram_size", [None, 48])
def test_local_crops_can_be_cut_out_of_the_global_ones(gram_size: int | None) -> None:
    augment = make(
        local_crops_subset_of_global_crops=True,
        patch_size=4,
        local_crops_number=6,
        gram_teacher_crops_size=gram_size,
        teacher_no_color_jitter=True,
        global_crops_scale=(1.0, 1.0),
        horizontal_flips=False,
    )
    # A diagonal gradient tells where a crop comes from, even after brightness and contrast have changed.
    rows, columns = np.mgrid[:64, :64]
    ramp = Image.fromarray(np.repeat((2 * columns + rows)[..., None], 3, axis=2).astype(np.uint8))
    output = augment(ramp)
    assert len(output["local_crops"]) == len(output["offsets"]) == augment.n_local_crops == 6
    for crop, (row, column) in zip(output["local_crops"], output["offsets"], strict=True):
        assert crop.shape == (3, 16, 16)
        assert row % 4 == column % 4 == 0
        assert 0 <= row < 16
        assert 0 <= column < 16


def test_subset_crops_of_a_larger_geometry_lie_where_their_offsets_say() -> None:
    # The geometry has side 64, the global crops 32: offsets count pixels of the global crops.
    augment = make(
        local_crops_subset_of_global_crops=True, patch_size=8, gram_teacher_crops_size=64, horizontal_flips=False
    )
    augment.local_transfo = augment.normalize  # no distortion
    augment.teacher_no_color_jitter = True
    output = augment(class_image(0, 0, size=64))
    shrink = v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC)
    for crop, view, (row, column) in zip(
        output["local_crops"], output["global_crops_teacher"], output["offsets"], strict=True
    ):
        expected = shrink(view)[:, row : row + 16, column : column + 16]
        assert (crop - expected).abs().mean() < 0.05


def test_an_odd_number_of_subset_crops_loses_one_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        augment = make(local_crops_subset_of_global_crops=True, local_crops_number=5, patch_size=8)
    assert "local_crops_number = 5 is odd" in caplog.text
    assert len(augment(class_image(0, 0))["local_crops"]) == augment.n_local_crops == 4


def test_equal_seeds_give_equal_crops() -> None:
    augment, picture = make(), class_image(0, 0)
    torch.manual_seed(4)
    first = augment(picture)
    torch.manual_seed(4)
    second = augment(picture)
    assert all(torch.equal(a, b) for a, b in zip(first["local_crops"], second["local_crops"], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_crops_scale": (0.9, 0.3)}, "global_crops_scale must be two areas"),
        ({"local_crops_scale": (0.0, 0.3)}, "local_crops_scale must be two areas"),
        ({"local_crops_scale": (0.05, 32)}, "local_crops_scale must be two areas"),
        ({"local_crops_scale": (0.05,)}, "local_crops_scale must be two areas"),
        ({"global_crops_size": 0}, "global_crops_size must be a positive number of pixels, got 0"),
        ({"local_crops_size": [16, 32]}, r"local_crops_size must be a positive number of pixels, got \[16, 32\]"),
        ({"gram_teacher_crops_size": -1}, "gram_teacher_crops_size"),
        ({"local_crops_number": -1}, "local_crops_number"),
        (
            {"local_crops_subset_of_global_crops": True, "local_crops_size": 20, "patch_size": 16},
            r"global_crops_size 32 - local_crops_size 20 = 12 px, patch_size is 16 px",
        ),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
