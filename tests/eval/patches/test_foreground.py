"""The foreground classifier, colours of principal components, and sizes."""

from pathlib import Path

import pytest
import torch

from dinov3.eval.patches.foreground import ForegroundClassifier, LabelledPatches, label_patches, leave_one_out
from dinov3.eval.patches.pca import pca_colors
from dinov3.eval.patches.sizes import patch_means, resize_to_multiple, resize_to_patches


def _picture(seed: int) -> LabelledPatches:
    """The third feature is larger in the foreground, the right half of the picture."""
    features = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(seed))
    features[:, 4:, 2] += 4
    mask = torch.zeros(24, 32)
    mask[:, 16:] = 1
    return label_patches(features, mask, patch_size=4)


def test_patches_at_the_edge_are_left_out() -> None:
    mask = torch.zeros(8, 8)
    mask[:, 2:] = 1  # the left patches are half inside
    labelled = label_patches(torch.arange(4.0).view(2, 2, 1), mask, patch_size=4)
    assert labelled.features.flatten().tolist() == [1, 3]
    assert labelled.labels.tolist() == [True, True]


def test_the_classifier_finds_the_foreground_and_survives_its_files(tmp_path: Path) -> None:
    classifier = ForegroundClassifier.fit([_picture(0), _picture(1)])
    table = leave_one_out([_picture(0), _picture(1), _picture(2)], Cs=[1e-3, 0.1])
    assert table.shape == (2, 3)
    assert table.min() > 0.9
    features = torch.randn(4, 4, 5)

    for name in ("fg.npz", "fg.pkl"):
        classifier.save(tmp_path / name)
        loaded = ForegroundClassifier.load(tmp_path / name, trust_pickle=name.endswith("pkl"))
        torch.testing.assert_close(loaded.score(features), classifier.score(features))
    import pickle

    model = pickle.loads((tmp_path / "fg.pkl").read_bytes())  # what the published notebooks expect
    torch.testing.assert_close(
        torch.from_numpy(model.predict_proba(features.view(-1, 5).numpy())[:, 1]).float(),
        classifier.score(features).flatten(),
    )


def test_a_pickle_is_not_read_unasked(tmp_path: Path) -> None:
    classifier = ForegroundClassifier(torch.ones(3), 0.0)
    classifier.save(tmp_path / "fg.pkl")
    with pytest.raises(ValueError, match="trust_pickle"):
        ForegroundClassifier.load(tmp_path / "fg.pkl")
    with pytest.raises(ValueError, match=r"\.npz or \.pkl"):
        classifier.save(tmp_path / "fg.json")


def test_smooth_scores_lose_single_patches() -> None:
    features = torch.full((5, 5, 1), -9.0)
    features[2, 2] = 9.0
    classifier = ForegroundClassifier(torch.ones(1), 0.0)
    assert classifier.score(features)[2, 2] > 0.99
    assert classifier.score(features, smooth=True)[2, 2] < 0.01


def test_one_kind_of_patches_is_refused() -> None:
    patches = LabelledPatches(torch.randn(4, 3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="both foreground and background"):
        ForegroundClassifier.fit([patches])
    with pytest.raises(ValueError, match="knows 3 features, got 2"):
        ForegroundClassifier(torch.ones(3), 0.0).score(torch.ones(1, 1, 2))


def test_colours_tell_parts_apart_and_leave_the_background_black() -> None:
    features = torch.zeros(4, 6, 5)
    features[:, 2:4] = torch.tensor([1.0, 0, 0, 0, 0])
    features[:, 4:] = torch.tensor([0.0, 1, 0, 0, 0])
    features += 0.01 * torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, :2] = False
    colours = pca_colors(features, mask)
    assert colours.shape == (4, 6, 3)
    assert (colours[:, :2] == 0).all()
    assert (colours[:, 2:4].mean((0, 1)) - colours[:, 4:].mean((0, 1))).abs().max() > 0.5
    with pytest.raises(ValueError, match="at least 4"):
        pca_colors(features, torch.zeros(4, 6, dtype=torch.bool))


def test_sizes_are_multiples_and_errors_are_clear() -> None:
    for width, height in ((640, 481), (333, 1000), (500, 500)):
        rows, columns = resize_to_patches(width, height, 224, 16)
        assert rows % 16 == columns % 16 == 0
        assert abs(columns / rows - width / height) < 16 / rows + 0.01
        short = min(resize_to_multiple(width, height, 100, 16))
        assert short == 112
    with pytest.raises(ValueError, match="less than a patch"):
        resize_to_patches(4, 1000, 64, 16)
    with pytest.raises(ValueError, match="height must be at least 1"):
        resize_to_patches(4, 0)
    with pytest.raises(ValueError, match="divisible by 4"):
        patch_means(torch.zeros(5, 4), 4)
