from pathlib import Path
from typing import Any

import pytest

from dinov3.data import make_dataset, register_dataset, registry
from dinov3.data.datasets import ADE20K, ImageFolder, ImageNet
from dinov3.data.loaders import _parse_dataset_str
from tests.helpers.images import write_image_folder


def test_split_becomes_the_member_of_the_datasets_own_enumeration() -> None:
    kind, kwargs = _parse_dataset_str("ImageNet:root=/a:split=VAL:extra=/b")
    assert kind is ImageNet
    assert kwargs == {"root": "/a", "split": ImageNet.Split.VAL, "extra": "/b"}
    assert _parse_dataset_str("ImageFolder:root=/a:split=train") == (ImageFolder, {"root": "/a", "split": "train"})


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ('ImageFolder:root="C:/my images"', "C:/my images"),
        ('ImageFolder:root="/runs/lr=0.1:wd=2":split=val', "/runs/lr=0.1:wd=2"),
        ("ImageFolder:root=/with space", "/with space"),
        ("ImageFolder:root=", ""),
    ],
)
def test_quotes_keep_colons_and_equal_signs(text: str, root: str) -> None:
    assert _parse_dataset_str(text)[1]["root"] == root


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("ImageNte:root=/a", ValueError, r"unknown dataset 'ImageNte'.*did you mean 'ImageNet'\?.*ADE20K.*ImageFolder"),
        ("imagefolder:root=/a", ValueError, "did you mean 'ImageFolder'"),
        ("Zebra", ValueError, "unknown dataset 'Zebra' in 'Zebra'; known datasets: ImageNet, "),
        ("", ValueError, "unknown dataset ''"),
        ("ImageNet:rot=/a", AssertionError, r"unknown key 'rot'.*did you mean 'root'\?.*keys of ImageNet: split, root"),
        (
            "ImageFolder:colour=red",
            AssertionError,
            "unknown key 'colour'.*of ImageFolder: root, split, index_cache",
        ),
        ("NYU:split=TRIAN", KeyError, r"unknown split 'TRIAN' of NYU \(did you mean 'TRAIN'\?\); splits: TRAIN, VAL"),
        ("NYU:split=train", KeyError, "did you mean 'TRAIN'"),
        ("NYU:split", ValueError, "'split' in 'NYU:split' must be key=value"),
        ("NYU:root=a=b", ValueError, "double quotes"),
        ("NYU:root=/a:", ValueError, "'' in 'NYU:root=/a:' must be key=value"),
        ('NYU:root="/a', ValueError, "isn't closed"),
    ],
)
def test_mistakes_are_named_with_what_is_possible(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _parse_dataset_str(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ADE20K:split=VAL:root=/a:extra=/b", "dataset ADE20K has no 'extra'.*its keys: split, root"),
        ("ImageNet22k:split=TRAIN:root=/a", "dataset ImageNet22k has no 'split'"),
        (
            "ImageNet:split=TRAIN",
            "dataset ImageNet needs root and extra.*ImageNet:split=<SPLIT>:root=<ROOT>:extra=<EXTRA>",
        ),
        ("ImageFolder", "dataset ImageFolder needs root"),
    ],
)
def test_keys_a_dataset_does_not_take_or_needs(text: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_dataset(dataset_str=text)


def test_datasets_are_made_with_their_transforms(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    dataset = make_dataset(
        dataset_str=f"ImageFolder:root={tmp_path}",
        transform=lambda image: image.size,
        target_transform=lambda label: (),
    )
    assert dataset[0] == ((40, 40), ())
    assert dataset.transform is not None
    assert make_dataset(dataset_str=f"ImageFolder:root={tmp_path}", transforms=lambda *pair: 7)[0] == 7


class Squares:
    def __init__(self, n: int = 3, **transforms: Any) -> None:
        self.n = n


def test_a_class_of_your_own_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_dataset("Squares", Squares, keys=["n"], converters={"n": int})
    transform = str.upper
    dataset = make_dataset(dataset_str="Squares:n=5", transform=transform)
    assert (dataset.n, dataset.transform, dataset.target_transform) == (5, transform, None)
    assert "Squares" in registry.dataset_names()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ImageNet", {}, "taken"),
        ("a:b", {}, "letters"),
        ("New", {"required": ["x"]}, r"\['x'\] are not among its keys"),
    ],
)
def test_registering_refuses_what_could_not_be_used(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_dataset(name, Squares, **options)


def test_datasets_refuse_a_missing_root_by_name() -> None:
    with pytest.raises(ValueError, match="ADE20K needs root"):
        ADE20K(split=ADE20K.Split.TRAIN)


class Numbers:
    """A user's dataset, named by its module."""

    def __init__(
        self,
        root: str,
        n: int = 3,
        *,
        half: "float | None" = None,
        odd: bool = False,
        transform: Any = None,
        target_transform: Any = None,
        transforms: Any = None,
    ) -> None:
        self.arguments = (root, n, half, odd)
        self.transform = transform


class TakesAnything:
    def __init__(self, **options: Any) -> None:
        self.options = options


def test_a_class_is_named_by_its_module() -> None:
    dataset = make_dataset(dataset_str=f'{__name__}:Numbers:root="/a:b":n=7:half=0.5:odd=true', transform=str.upper)
    assert dataset.arguments == ("/a:b", 7, 0.5, True)
    assert dataset.transform is str.upper
    assert _parse_dataset_str(f"{__name__}:Numbers:root=/a") == (Numbers, {"root": "/a"})
    assert make_dataset(dataset_str=f"{__name__}:TakesAnything:colour=red").options["colour"] == "red"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tests.data.nothing:Numbers:root=/a", ValueError, "there is no module 'tests.data.nothing'"),
        (f"{__name__}:Numbrs:root=/a", ValueError, "has no class 'Numbrs'"),
        (f"{__name__}:Numbers:rot=/a", AssertionError, r"unknown key 'rot'.*did you mean 'root'\?.*root, n, half, odd"),
        (f"{__name__}:Numbers:n=3", TypeError, "Numbers needs root"),
        (f"{__name__}:Numbers:root=/a:n=many", ValueError, "n=many of dataset .*Numbers: invalid literal"),
        (f"{__name__}:Numbers:root=/a:odd=1", ValueError, "odd=1 of dataset .*: expected true or false"),
        ("Zebra:Crossing", ValueError, "unknown dataset 'Zebra:Crossing'.*known datasets are ImageNet"),
    ],
)
def test_mistakes_in_classes_of_users_are_explained(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_dataset(dataset_str=text)
