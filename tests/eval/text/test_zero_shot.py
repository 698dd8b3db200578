"""Use without training: class vectors, retrieval, segmentation, prompts, and the commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3.eval.results import load
from dinov3.eval.text import classification, retrieval, segmentation
from dinov3.eval.text.prompts import find_class_names, find_templates, read_lines
from dinov3.eval.text.tokenizer import Tokenizer
from dinov3.eval.text.zero_shot import (
    class_vectors,
    classify,
    fill_templates,
    predict_slide,
    predict_whole,
    resize_short_side,
    retrieval_recall,
    upsample,
)
from tests.helpers.images import class_image
from tests.helpers.tiny_dinotxt import byte_vocabulary, small_hub, tiny_dinotxt

TEMPLATES = ["a photo of a {}.", "{}"]
HUB = "model.hub=dinov3_vitl16_dinotxt_tet1280d20h24l"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(byte_vocabulary(tmp_path / "bytes.gz"))


def test_class_vectors_are_unit_means_of_unit_prompts(tokenizer: Tokenizer) -> None:
    model = tiny_dinotxt()
    classes = class_vectors(model, tokenizer.tokenize, ["cat", "dog", "bed"], TEMPLATES, batch_size=4)
    assert classes.shape == (3, 256)
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(3))
    by_hand = model.encode_text(tokenizer.tokenize(fill_templates("dog", TEMPLATES)), normalize=True).mean(0)
    torch.testing.assert_close(classes[1], by_hand / by_hand.norm())
    patch_level = class_vectors(model, tokenizer.tokenize, ["cat"], ["{}"], patch_level=True)
    half = model.encode_text(tokenizer.tokenize("cat"))[:, 128:]
    torch.testing.assert_close(patch_level, torch.nn.functional.normalize(half, dim=-1))
    images = torch.randn(2, 3, 32, 32)
    logits = classify(model, images, classes)
    torch.testing.assert_close(logits, 100 * model.encode_image(images, normalize=True) @ classes.T)


def test_recall_counts_any_text_of_an_image() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1], [0.0, 0.0, 1.0]])
    found = retrieval_recall(images, texts, [0, 1, 2, 2], ks=(1, 2))
    assert found == {
        "text_to_image_recall@1": 75.0,  # the third text is nearest to another image
        "text_to_image_recall@2": 100.0,
        "image_to_text_recall@1": 100.0,  # the last image is found by its other text
        "image_to_text_recall@2": 100.0,
    }
    without_text = retrieval_recall(torch.eye(3), torch.eye(3)[:2], [0, 1], ks=(1,))
    assert without_text["image_to_text_recall@1"] == 100.0
    with pytest.raises(ValueError, match="got 3 images, 2 texts and the images of 1 texts"):
        retrieval_recall(torch.eye(3), torch.eye(3)[:2], [0])


def vectors(k: int = 4) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(k, 128), dim=-1)


def test_one_window_is_the_whole_image() -> None:
    model, classes, image = tiny_dinotxt(), vectors(), torch.randn(3, 32, 48)
    whole = predict_whole(model, image, classes)
    assert whole.shape == (4, 2, 3)
    expected = upsample(whole, (32, 48)).softmax(dim=0)
    torch.testing.assert_close(predict_slide(model, image, classes, side=48, stride=16), expected)


def test_patches_are_of_the_backbone_unless_the_head_is_asked_for() -> None:
    model, classes, image = tiny_dinotxt(), vectors(), torch.randn(3, 32, 48)
    _, of_head, of_backbone = model.encode_image_with_patch_tokens(image[None])
    for patches, tokens in (({}, of_backbone), ({"patches": "backbone"}, of_backbone), ({"patches": "head"}, of_head)):
        cosines = (torch.nn.functional.normalize(tokens[0], dim=-1) @ classes.T).T.unflatten(1, (2, 3))
        torch.testing.assert_close(predict_whole(model, image, classes, **patches), cosines)


def test_tokens_of_another_width_ask_for_those_of_the_head() -> None:
    model, image = tiny_dinotxt(embed_dim=64), torch.randn(3, 32, 48)
    classes = torch.nn.functional.normalize(torch.randn(4, 32), dim=-1)
    with pytest.raises(ValueError, match=r"of the backbone are 128 wide, class vectors 32.* use patches=head"):
        predict_whole(model, image, classes)
    assert predict_whole(model, image, classes, patches="head").shape == (4, 2, 3)


@pytest.mark.parametrize("size", [(32, 32), (40, 57), (20, 70), (16, 16)])
def test_windows_cover_every_pixel_and_probabilities_sum_to_one(size: tuple[int, int]) -> None:
    model, classes, image = tiny_dinotxt(), vectors(), torch.randn(3, *size)
    found = predict_slide(model, image, classes, side=32, stride=16)
    torch.testing.assert_close(found.sum(0), torch.ones(size))
    one_by_one = predict_slide(model, image, classes, side=32, stride=16, batch_size=1)
    torch.testing.assert_close(found, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: predict_slide(m, torch.zeros(3, 32, 32), vectors(), 16, 32), "stride 32 and side 16"),
        (lambda m: predict_whole(m, torch.zeros(3, 32, 32), torch.zeros(2, 256)), "128 wide, class vectors 256"),
        (lambda m: predict_whole(m, torch.zeros(3, 32, 32), vectors(), patches="x"), "'head' or of the 'backbone'"),
        (lambda m: class_vectors(m, None, [], ["{}"]), "at least one class name"),
        (lambda m: fill_templates("cat", ["a photo"]), "needs {} for the name"),
        (lambda m: fill_templates("cat", []), "at least one prompt template"),
    ],
)
def test_wrong_calls_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_dinotxt())


def test_a_model_of_class_tokens_only_has_no_patch_level(tokenizer: Tokenizer) -> None:
    model = tiny_dinotxt(vision_model_use_patch_tokens=False, embed_dim=128)
    with pytest.raises(ValueError, match="vision_model_use_patch_tokens=true"):
        class_vectors(model, tokenizer.tokenize, ["cat"], ["{}"], patch_level=True)


def test_sizes_follow_the_shorter_side() -> None:
    assert resize_short_side((100, 200), 50) == (50, 100)
    assert resize_short_side((201, 100), 50) == (100, 50)
    assert resize_short_side((512, 999), 512) == (512, 999)


def test_intersection_over_union_is_that_of_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    truth, predicted = torch.randint(0, 4, (30, 40)), torch.randint(0, 4, (30, 40))
    truth[:3] = 255
    matrix = segmentation.confusion(predicted, truth, 5)  # the fifth class is nowhere
    found = segmentation.intersection_over_union(matrix)
    expected = MulticlassJaccardIndex(5, average="macro", ignore_index=255)(predicted, truth)
    assert found.nanmean().item() == pytest.approx(100 * expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="a mask has the class 3, there are 2 class names"):
        segmentation.confusion(predicted, truth, 2)


def test_prompts_come_from_files_data_sets_or_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names.txt").write_text("# classes\ncat\n\nsofa, couch\n")
    assert find_class_names(str(tmp_path / "names.txt")) == ["cat", "sofa, couch"]
    assert find_class_names(str(tmp_path / "names.txt"), first_synonym=True) == ["cat", "sofa"]
    (tmp_path / "info.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.2\tbuilding;edifice\n")
    assert find_class_names(str(tmp_path / "info.txt"), first_synonym=True) == ["wall", "building"]
    (tmp_path / "names.json").write_text(json.dumps(["a", "b"]))
    assert read_lines(tmp_path / "names.json") == ["a", "b"]
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match="JSON list of strings"):
        read_lines(tmp_path / "wrong.json")
    with pytest.raises(FileNotFoundError, match="no file .*none.txt"):
        find_templates(str(tmp_path / "none.txt"))
    assert find_templates("a {}") == ["a {}"]
    with pytest.raises(ValueError, match="list has no class names"):
        find_class_names("dataset", [])
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        find_templates("open_clip")


# -- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder of images with captions, classes and masks, and the arguments that name a small model."""
    files, _ = small_hub(monkeypatch, tmp_path / "hub")
    for i in range(3):
        (tmp_path / f"class{i}").mkdir()
        class_image(i, 0).save(tmp_path / f"class{i}/x.png")
        for name in ("images", "annotations"):
            (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
        class_image(i, 0).resize((40, 33)).save(tmp_path / f"pairs/images/{i}.png")
        Image.fromarray(np.full((33, 40), i, np.uint8)).save(tmp_path / f"pairs/annotations/{i}.png")
    (tmp_path / "pairs/classes.txt").write_text("zero\none\ntwo\n")
    (tmp_path / "captions.csv").write_text("path,caption\nclass0/x.png,zero\nclass1/x.png,one\nclass1/x.png,uno\n")
    (tmp_path / "classes.csv").write_text("path,label\n" + "".join(f"class{i}/x.png,class{i}\n" for i in range(3)))
    weights = [f"model.weights={files.weights}", f"model.backbone_weights={files.backbone_weights}"]
    return tmp_path, [HUB, *weights, "num_workers=0", "n_pictures=2", f"output_dir={tmp_path}/out"]


SIZES = ["transform.resize_size=32", "transform.crop_size=32"]


def test_classification_as_a_command(data: tuple[Path, list[str]]) -> None:
    folder, model = data
    options = [f"dataset=ImageList:file={folder}/classes.csv", "templates='a photo of a {}.'", *SIZES]
    classification.main([*model, *options])
    (row,) = load(folder / "out" / classification.RESULTS_FILENAME).rows()
    assert {name.rpartition("_")[2] for name in row} >= {"top-1"}
    assert all(0 <= float(value) <= 100 for value in row.values())
    assert len(list((folder / "out/pictures").glob("*.png"))) == 2


def test_retrieval_as_a_command(data: tuple[Path, list[str]]) -> None:
    folder, model = data
    retrieval.main([*model, f"dataset=CaptionList:file={folder}/captions.csv", "ks=[1,2]", *SIZES])
    (row,) = load(folder / "out" / retrieval.RESULTS_FILENAME).rows()
    assert row["text_to_image_recall@2"] == 100
    assert len(list((folder / "out/pictures").glob("*.png"))) == 2


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_segmentation_as_a_command(mode: str, data: tuple[Path, list[str]]) -> None:
    folder, model = data
    options = [f"dataset=SegmentationFolder:root={folder}/pairs", "templates={}", "resize=32", "side=32", "stride=16"]
    segmentation.main([*model, *[o.replace("templates={}", "templates='{}'") for o in options], f"mode={mode}"])
    (row,) = load(folder / "out" / segmentation.RESULTS_FILENAME).rows()
    classes = load(folder / "out" / segmentation.CLASSES_FILENAME).rows()
    assert [c["class"] for c in classes] == ["zero", "one", "two"]
    assert sum(int(c["n_pixels"]) for c in classes) == 3 * 33 * 40
    assert float(next(iter(row.values()))) == pytest.approx(np.nanmean([float(c["iou"]) for c in classes]))
    assert len(list((folder / "out/pictures").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([], "model.hub=<name> or as model.config_file"),
        (["model.hub=dinov3_vits16"], "no dino.txt model of the hub; known: dinov3_vitl16_dinotxt"),
        (["model.config_file=x.yaml"], "needs model.weights"),
    ],
)
def test_a_model_that_is_not_named_well_is_refused(model: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("path,caption\nx.png,zero\n")
    with pytest.raises(ValueError, match=message):
        retrieval.main([f"output_dir={tmp_path}/out", f"dataset=CaptionList:file={tmp_path}/captions.csv", *model])
