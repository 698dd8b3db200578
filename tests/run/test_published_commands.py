"""The published training and evaluation commands: as printed they pass the launcher's check, at tiny size they run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer.weights import read_weights
from dinov3.eval import knn, linear, log_regression
from dinov3.eval.text import train_dinotxt
from dinov3.models.vision_transformer import vit_nano
from dinov3.run.submit import get_run_parser
from dinov3.train import train
from tests.helpers.imagenet import write_imagenet, write_imagenet22k
from tests.helpers.source import ROOT
from tests.helpers.tiny_text_training import prepare

# Words in capitals are what the reader puts in.
TRAINING = {
    "vitl": "--nodes 4 --config-file dinov3/configs/train/vitl_im1k_lin834.yaml --output-dir OUT "
    "train.dataset_path=ImageNet22k:root=D22:extra=X22",
    "vitl_1k": "--nodes 4 --config-file dinov3/configs/train/vitl_im1k_lin834.yaml --output-dir OUT "
    "train.dataset_path=ImageNet:split=TRAIN:root=D1:extra=X1",
    "pretrain": "--nodes 32 --config-file dinov3/configs/train/dinov3_vit7b16_pretrain.yaml --output-dir OUT "
    "train.dataset_path=ImageNet22k:root=D22:extra=X22",
    "gram_anchor": "--nodes 32 --config-file dinov3/configs/train/dinov3_vit7b16_gram_anchor.yaml --output-dir OUT "
    "train.dataset_path=ImageNet22k:root=D22:extra=X22 gram.ckpt=TEACHER",
    "high_res_adapt": "--nodes 32 --config-file dinov3/configs/train/dinov3_vit7b16_high_res_adapt.yaml "
    "--output-dir OUT train.dataset_path=ImageNet22k:root=D22:extra=X22 gram.ckpt=TEACHER "
    "student.resume_from_teacher_chkpt=TEACHER",
    "multi_distillation": "--nodes 1 --config-file dinov3/configs/train/multi_distillation_test.yaml --output-dir OUT "
    "--multi-distillation train.dataset_path=ImageNet:split=TRAIN:root=D1:extra=X1",
}
# Its file says in <> which values are the reader's own.
TEXT = "--nodes 4 trainer_config_file=dinov3/eval/text/configs/dinov3_vitl_text.yaml output-dir=OUT"
TEXT_OWN = ["train_dataset_str=CaptionList:file=PAIRS/captions.csv"]
TEXT_OWN += ["vision_backbone_pretrained_weights=PAIRS/backbone.pth"]
MODEL = "model.config_file=OUT/config.yaml model.pretrained_weights=OUT/teacher_checkpoint.pth output_dir=OUT "
TRAIN_SET, VAL_SET = (f"ImageNet:split={split}:root=D1:extra=X1" for split in ("TRAIN", "VAL"))
EVALUATION = {
    "log_regression": f"{MODEL} train.dataset={TRAIN_SET} eval.test_dataset={VAL_SET}",
    "knn": f"{MODEL} train.dataset={TRAIN_SET} eval.test_dataset={VAL_SET}",
    "linear": f"{MODEL} train.dataset={TRAIN_SET} train.val_dataset={VAL_SET}",
}
CHECKS: dict[str, Any] = {
    "log_regression": log_regression.check_arguments,
    "knn": knn.check_arguments,
    "linear": linear.check_arguments,
}

HEADS = [f"{head}.{key}" for head in ("dino", "ibot") for key in ("head_n_prototypes=64", "head_bottleneck_dim=32")]
TINY = [
    "compute_precision.param_dtype=fp32",
    "crops.local_crops_number=2",
    "train.num_workers=1",
    *HEADS,
    *(f"{head}.head_hidden_dim=64" for head in ("dino", "ibot")),
    "student.arch=vit_nano",
    "student.patch_size=8",
    "student.fp8_enabled=false",
]
ONE_SIZE = ["train.OFFICIAL_EPOCH_LENGTH=2", "crops.global_crops_size=32", "crops.local_crops_size=16"]
V1 = [*TINY, *ONE_SIZE, "train.batch_size_per_gpu=2", "optim.epochs=2", "optim.warmup_epochs=1"]
V2 = [*TINY, "train.batch_size_per_gpu=2"]
FIRST = [*V2, *ONE_SIZE, "schedules.lr.warmup_epochs=1", "schedules.teacher_temp.warmup_epochs=1"]
GRAM = ["optim.epochs=4", "crops.gram_teacher_crops_size=64", "gram.update_frequency=2", "gram.it_first_update=6"]
GRAM += [f"{name}_weight_schedule.warmup_epochs=2" for name in ("dino.local_loss", "gram.loss")]
SIZES = {"global": [32, 48, 48, 48, 48], "local": [16, 16, 24, 16, 24], "gram_teacher": [48, 72, 72, 72, 72]}
HIGH = [*V2, "train.OFFICIAL_EPOCH_LENGTH=1", "dino.koleo_distributed_loss_group_size=4"]
EVAL_WORKERS = ["train.num_workers=0", "eval.num_workers=0"]
EVAL_SIZES = {
    "knn": ["transform.resize_size=32", "transform.crop_size=32", *EVAL_WORKERS, "train.ks=[1,3]"],
    "log_regression": ["transform.resize_size=32", "transform.crop_size=32", *EVAL_WORKERS],
    "linear": ["transform.crop_size=32", *EVAL_WORKERS, "train.batch_size=2", "train.epochs=1", "train.epoch_length=4"],
}
EVAL_SIZES["linear"] += ["train.learning_rates=[0.01,0.1]"]
HIGH += [f"crops.{name}_crops_size={sizes}" for name, sizes in SIZES.items()]


@pytest.mark.parametrize("name", TRAINING)
def test_training_commands_pass_the_check_as_they_are_printed(name: str, tmp_path: Path) -> None:
    words = shlex.split(TRAINING[name].replace("OUT", str(tmp_path)))
    args, rest = get_run_parser().parse_known_args(["dinov3/train/train.py", *words])
    train.check_arguments([f"--output-dir={args.output_dir}", *rest], args.nodes * args.ngpus)
    assert not list(tmp_path.iterdir())


def test_the_text_command_asks_for_what_its_file_leaves_open(tmp_path: Path) -> None:
    words = shlex.split(TEXT.replace("OUT", str(tmp_path)))
    args, rest = get_run_parser().parse_known_args(["dinov3/eval/text/train_dinotxt.py", *words])
    n_processes = args.nodes * args.ngpus
    with pytest.raises(ValueError, match=r"command line: vision_backbone_pretrained_weights, train_dataset_str$"):
        train_dinotxt.check_arguments(rest, n_processes)
    train_dinotxt.check_arguments([*rest, *TEXT_OWN], n_processes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_commands_pass_the_check_as_they_are_printed(name: str) -> None:
    CHECKS[name](shlex.split(EVALUATION[name]), 8)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder / "1k")
    write_imagenet22k(folder / "22k")
    return {"D1": f"{folder}/1k", "X1": f"{folder}/1k/extra", "D22": f"{folder}/22k", "X22": f"{folder}/22k/extra"}


def words_of(command: str, places: dict[str, str], n_nodes: int = 1) -> list[str]:
    """A command with what the reader puts in, on another number of nodes."""
    words = shlex.split(re.sub(r"\b(?:OUT|TEACHER|PAIRS|[DX](?:1|22))\b", lambda name: places[name[0]], command))
    if "--nodes" in words:
        words[words.index("--nodes") + 1] = f"{n_nodes}"
    return words


def run(script: str, command: str, places: dict[str, str], *overrides: str) -> None:
    """A command on two processes of this machine instead of its nodes, with sizes that they can compute."""
    words = words_of(command, places)
    launcher = [sys.executable, "-m", "dinov3.run.submit", script, "--cluster", "local", "--ngpus", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, *words, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def iterations(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "training_metrics.json").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vitl", "vitl_1k"])
def test_vitl_trains_and_is_evaluated(name: str, places: dict[str, str], tmp_path: Path) -> None:
    places = places | {"OUT": str(tmp_path)}
    run("dinov3/train/train.py", TRAINING[name], places, *V1)
    assert iterations(tmp_path) == [0, 3]
    if name == "vitl":
        return
    for kind, command in EVALUATION.items():
        run(f"dinov3/eval/{kind}.py", command, places, *EVAL_SIZES[kind])
    for script in (knn, linear, log_regression):
        assert (tmp_path / script.RESULTS_FILENAME).is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_three_stages_of_the_7b_load_each_other(places: dict[str, str], tmp_path: Path) -> None:
    base, high = tmp_path / "base", tmp_path / "high"
    run("dinov3/train/train.py", TRAINING["pretrain"], places | {"OUT": str(base)}, *FIRST, "optim.epochs=2")
    first = base / "eval" / "training_3" / "sharded_teacher_checkpoint"
    anchored = places | {"OUT": str(base), "TEACHER": str(first)}
    run("dinov3/train/train.py", TRAINING["gram_anchor"], anchored, *FIRST, *GRAM)
    assert iterations(base) == [0, 3, 7]
    second = base / "eval" / "training_7" / "sharded_teacher_checkpoint"
    adapted = places | {"OUT": str(high), "TEACHER": str(second)}
    run("dinov3/train/train.py", TRAINING["high_res_adapt"], adapted, *HIGH)
    assert iterations(high) == [0, 10, 20, 29]
    assert read_weights(high / "teacher_checkpoint.pth")["cls_token"].isfinite().all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_students_are_distilled_from_the_published_base_file(places: dict[str, str], tmp_path: Path) -> None:
    """Its own students, ViT-S and ViT-B, on one process each; a teacher smaller than its ViT-L."""
    teacher = tmp_path / "teacher.yaml"
    heads = "{head_n_prototypes: 64, head_bottleneck_dim: 32, head_hidden_dim: 64}"
    teacher.write_text(f"student: {{arch: vit_nano, patch_size: 16}}\ndino: {heads}\nibot: {heads}\n")
    folder = "dinov3/configs/train/multidist_tests"
    students = ", ".join(
        f"{{name: {name}, config_path: {folder}/{name}_p16.yaml, ranks_range: [{i}, {i + 1}]}}"
        for i, name in enumerate(("vits", "vitb"))
    )
    sizes = [*TINY[:3], *HEADS, *ONE_SIZE, "optim.epochs=2", "optim.warmup_epochs=1"]
    sizes += [f"multidistillation.students=[{students}]", "multidistillation.global_batch_size=4"]
    sizes += [f"distillation.full_cfg_path={teacher}", "optim.freeze_last_layer_epochs=0"]
    out = tmp_path / "out"
    run("dinov3/train/train.py", TRAINING["multi_distillation"], places | {"OUT": str(out)}, *sizes)
    for name, width in (("vits", 384), ("vitb", 768)):
        assert iterations(out / name) == [0, 3]
        assert read_weights(out / name / "teacher_checkpoint.pth")["cls_token"].shape[-1] == width


@pytest.mark.slow
def test_text_is_aligned_with_a_frozen_backbone(tmp_path: Path) -> None:
    """The published file, whatever stands in it: over it only data, weights and sizes."""
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    prepare(pairs)
    torch.save(vit_nano(8, layerscale_init=1e-5).state_dict(), pairs / "backbone.pth")
    (pairs / "vision.yaml").write_text("student: {arch: vit_nano, patch_size: 8}\n")
    places = {"OUT": str(out), "PAIRS": str(pairs)}
    sizes = [f"{tower}_backbone_config={pairs}/{tower}.yaml" for tower in ("vision", "text")]
    sizes += [f"text_vocab_path_or_url={pairs}/bytes.txt.gz", "embed_dim=128", "vision_model_train_img_size=16"]
    sizes += ["batch_size=2", "num_workers=0", "max_iteration=3", "warmup_length=1", "do_compile=false"]
    run("dinov3/eval/text/train_dinotxt.py", " ".join([TEXT, *TEXT_OWN]), places, *sizes)
    assert (out / "eval" / "training_2" / "sharded_model_checkpoint" / ".metadata").is_file()
