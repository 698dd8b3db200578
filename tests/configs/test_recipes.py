"""Every file below configs/train: complete but for what it names, consistent, and its networks can be built."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
from dinov3.configs.check import check_config
from dinov3.train.train import META_ARCHITECTURES

RECIPES = Path(__file__).parents[2] / "dinov3" / "configs" / "train"
ALL = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))
# Files of students, which a recipe in another file refers to.
PARTS = [name for name in ALL if name.startswith("multidist_tests/") or name.endswith("_p16.yaml")]
VITL = "dinov3/configs/train/vitl_im1k_lin834.yaml"
# What recipes of the original code leave to the command line.
GAPS = {
    "dinov3_vit7b16_pretrain.yaml": [],
    "dinov3_vit7b16_gram_anchor.yaml": ["gram.ckpt=X"],
    "dinov3_vit7b16_high_res_adapt.yaml": ["gram.ckpt=X"],
}


def placeholders(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values stand in angle brackets."""
    if isinstance(node, dict):
        return [key for name, value in node.items() for key in placeholders(value, f"{prefix}{name}.")]
    return [prefix[:-1]] if isinstance(node, str) and re.fullmatch(r"<.*>", node) else []


def filled(recipe: str, *overrides: str) -> Any:
    """The merged configuration, with what the command line has to give."""
    content = yaml.safe_load((RECIPES / recipe).read_text())
    opts = ["train.dataset_path=X", *GAPS.get(recipe, [])]
    opts += [f"{key}={VITL if key.endswith('full_cfg_path') else 'X'}" for key in placeholders(content)]
    if "lvd1689m_distilled" in recipe:
        ranges = ([0, 48], [48, 96], [96, 176], [176, 296])
        students = ", ".join(f"{{name: {r[0]}, config_path: X, ranks_range: {r}}}" for r in ranges)
        opts.append(f"multidistillation.students=[{students}]")
        opts.append("distillation.full_cfg_path=dinov3/configs/train/dinov3_vit7b16_pretrain.yaml")
    return get_cfg_from_args(DinoV3SetupArgs(str(RECIPES / recipe), opts=[*opts, *overrides]))


@pytest.mark.parametrize("recipe", ALL)
def test_recipes_fit_together_and_build_on_the_meta_device(recipe: str) -> None:
    cfg = filled(recipe)
    check_config(cfg)
    with torch.device("meta"):
        model = META_ARCHITECTURES[cfg.MODEL.META_ARCHITECTURE](cfg)
    assert all(param.is_meta for param in model.parameters())
    assert any(param.requires_grad for param in model.student["backbone"].parameters())


@pytest.mark.parametrize("recipe", [name for name in ALL if name not in PARTS])
def test_recipes_say_how_to_run_them_and_what_to_expect(recipe: str) -> None:
    lines = (RECIPES / recipe).read_text().splitlines()
    header = "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])
    if recipe == "quickstart.yaml":
        assert "python -m dinov3.run.quickstart" in header
        return
    assert f"--config-file dinov3/configs/train/{recipe}" in header
    assert "--output-dir OUT" in header
    assert "Hardware: " in header
    assert re.search(r"Time(:| and accuracy:|, as published:)", header)
    assert ("--multi-distillation" in header) == ("MultiDistillationMetaArch" in "\n".join(lines))


def test_published_figures_are_marked_as_not_reproduced() -> None:
    text = (RECIPES / "vitl_im1k_lin834.yaml").read_text()
    assert re.search(r"k-NN 82\.0 %, linear 83\.5 %.*\n?.*82\.2 % and 83\.3 %\. Not reproduced here", text)


@pytest.mark.parametrize("size", ["s", "b"])
def test_the_settings_for_each_gpu_pass(size: str) -> None:
    recipe = f"vit{size}16_image_folder.yaml"
    settings = re.findall(r"^# +(\d+) GB  (\S+)$", (RECIPES / recipe).read_text(), re.MULTILINE)
    assert [memory for memory, _ in settings] == ["24", "48", "80", "141"]
    batches = []
    for _, override in settings:
        cfg = filled(recipe, override)
        check_config(cfg)
        batches.append(cfg.train.batch_size_per_gpu)
    assert batches == sorted(set(batches))
    assert filled(recipe).train.batch_size_per_gpu == batches[0]


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_the_later_stages_have_the_networks_of_the_first(size: str) -> None:
    stages = [filled(f"vit{size}16_{stage}.yaml") for stage in ("gram_anchor", "high_res_adapt")]
    if size != "l":
        stages.insert(0, filled(f"vit{size}16_image_folder.yaml"))
    for one, other in zip(stages, stages[1:], strict=False):
        assert one.ibot == other.ibot
        assert {k: v for k, v in one.dino.items() if "head" in k} == {
            k: v for k, v in other.dino.items() if "head" in k
        }
        starts = ("resume_from_teacher_chkpt",)
        assert {k: v for k, v in one.student.items() if k not in starts} == {
            k: v for k, v in other.student.items() if k not in starts
        }


def test_weights_that_are_not_given_are_asked_for_by_name() -> None:
    for recipe, key in (
        ("vits16_gram_anchor.yaml", "gram.ckpt"),
        ("continue_vits16.yaml", "student.pretrained_weights"),
    ):
        cfg = get_cfg_from_args(DinoV3SetupArgs(str(RECIPES / recipe), opts=["train.dataset_path=X"]))
        with pytest.raises(ValueError, match=f"{key} is the placeholder"):
            check_config(cfg)
