"""The training of dino.txt: command line, exact resume, several processes, exports."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.checkpointer.weights import read_state_dict
from dinov3.data.photos import available_photos
from dinov3.eval.text import example, train_dinotxt
from dinov3.eval.text.build_dinotxt import (
    build_model_and_tokenizer,
    build_model_for_eval,
    load_backbone_checkpoint,
    rename_register_token,
)
from dinov3.eval.text.config import load_model_config, model_config_of
from dinov3.eval.text.train_dinotxt import FiniteCheck, Step, build_optimizer, check_arguments, main, parse
from dinov3.loss import memory_efficient_clip_loss
from tests.golden import fill
from tests.helpers.distributed import run_distributed
from tests.helpers.source import ROOT
from tests.helpers.tiny_text_training import config_of, prepare

EXAMPLE = "dinov3/eval/text/configs/dinov3_vitl_text.yaml"
FILLED = ["train_dataset_str=CocoCaptions:split=TRAIN:root=x", "vision_backbone_pretrained_weights=w.pth"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare(tmp_path_factory.mktemp("text"))


def exported(output_dir: Path, iteration: int = 5) -> dict[str, Tensor]:
    return read_state_dict(output_dir / "eval" / f"training_{iteration}" / "sharded_model_checkpoint")


# -- Command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling", [["output_dir=out"], ["output-dir=out"], ["--output-dir", "out"], ["--output-dir=out"]]
)
def test_the_output_folder_can_be_spelt_in_every_way(spelling: list[str]) -> None:
    config = parse([f"trainer_config_file={EXAMPLE}", *FILLED, *spelling, "lr=0.5", "use_full_ac=true"])
    assert config.output_dir == "out"
    assert (config.lr, config.use_full_ac, config.max_iteration) == (0.5, True, 50000)


def test_the_file_may_name_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("embed_dim: 8\ntrain_dataset_str: x\noutput_dir: from-file\n")
    assert parse([f"trainer_config_file={tmp_path}/c.yaml"]).output_dir == "from-file"
    assert parse([f"trainer_config_file={tmp_path}/c.yaml", "output-dir=other"]).output_dir == "other"


def test_the_example_has_the_published_values() -> None:
    config = parse([f"trainer_config_file={EXAMPLE}", *FILLED])
    assert (config.embed_dim, config.vision_model_num_head_blocks, config.lr) == (2048, 2, 7e-4)
    assert (config.batch_size, config.warmup_length, config.eval_freq) == (256, 2000, 5000)
    assert config.init_logit_scale == 2.659260036932778
    assert config.text_model_head_blocks_is_causal


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [f"trainer_config_file={EXAMPLE}"],
            "placeholders are left.*vision_backbone_pretrained_weights=<.*train_dataset_str=<",
        ),
        ([f"trainer_config_file={EXAMPLE}", *FILLED, "batch_sise=3"], "unknown key 'batch_sise'.*'batch_size'"),
        ([f"trainer_config_file={EXAMPLE}", *FILLED, "lr=fast"], "fast"),
        ([f"trainer_config_file={EXAMPLE}", *FILLED, "lr_scheduler_type=linear"], "the only schedule is cosine"),
        ([f"trainer_config_file={EXAMPLE}", *FILLED, "warmup_length=60000"], "warmup_length=60000 must lie between"),
        ([f"trainer_config_file={EXAMPLE}", *FILLED, "batch_size=0"], "batch_size must be at least 1"),
        ([f"trainer_config_file={EXAMPLE}", *FILLED, "max_checkpoints_to_keep=0"], "max_checkpoints_to_keep"),
        (["embed_dim=8"], "train_dataset_str"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_start(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(given, 1)


def test_help_shows_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "trainer_config_file=" in shown
    assert "checkpointing_period: 500" in shown


# -- One process ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    main([*arguments, f"output_dir={folder}"])
    return folder


def test_a_training_leaves_what_it_promises(undisturbed: Path) -> None:
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*")}
    assert {
        "eval_config.yaml",
        "clip_model_config.yaml",
        "training_metrics.json",
        "ckpt/3/.metadata",
        "ckpt/5/.metadata",
        "eval/training_5/sharded_model_checkpoint/.metadata",
    } <= names
    assert "ckpt/1" not in names  # two are kept
    rows = [json.loads(line) for line in (undisturbed / "training_metrics.json").read_text().splitlines()]
    assert {"contrastive_loss", "gram_loss", "lr", "logit_scale", "iteration"} <= rows[-1].keys()
    assert load_model_config(undisturbed / "clip_model_config.yaml").embed_dim == 128


@pytest.mark.parametrize("at", [3, 5])
def test_a_training_that_was_interrupted_goes_on_bit_for_bit(
    at: int, arguments: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = FiniteCheck.add

    def interrupted(self: FiniteCheck, metrics: Any, iteration: int) -> None:
        if iteration == at:
            raise KeyboardInterrupt
        add(self, metrics, iteration)

    with monkeypatch.context() as patched:
        patched.setattr(FiniteCheck, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, f"output_dir={tmp_path}"])
    assert not (tmp_path / "eval").exists()
    main([*arguments, f"output_dir={tmp_path}", "num_workers=1"])
    want = exported(undisturbed)
    got = exported(tmp_path)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_new_start_keeps_the_checkpoints_of_the_old_one_apart(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        main([*arguments, f"output_dir={tmp_path}", "no_resume=true", "max_iteration=2", "seed=3"])
    assert (tmp_path / "ckpt_before_1" / "1" / ".metadata").exists()
    assert (tmp_path / "ckpt" / "1" / ".metadata").exists()


def test_a_loss_that_is_not_finite_ends_the_training_without_a_checkpoint(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not finite in one of the iterations 0 to 1"):
        main([*arguments, f"output_dir={tmp_path}", "init_logit_scale=.nan"])
    assert not list((tmp_path / "ckpt").glob("[0-9]*"))


def test_the_scale_is_kept_within_its_bounds(arguments: list[str], tmp_path: Path) -> None:
    main([*arguments, f"output_dir={tmp_path}", "init_logit_scale=9", "max_iteration=1", "warmup_length=0"])
    assert exported(tmp_path, 0)["logit_scale"].exp().item() == pytest.approx(100)


def test_activation_checkpointing_changes_no_number(arguments: list[str], tmp_path: Path) -> None:
    results = []
    for name, options in (("none", ["use_ac=false"]), ("some", ["use_ac=true"]), ("full", ["use_full_ac=true"])):
        main([*arguments, f"output_dir={tmp_path / name}", "max_iteration=2", *options])
        results.append(exported(tmp_path / name, 1))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, msg=key)
        torch.testing.assert_close(results[2][key], value, msg=key)


def test_images_without_captions_are_named(arguments: list[str], tmp_path: Path) -> None:
    folder = Path(arguments[0].partition("=")[2]).parent
    with pytest.raises(ValueError, match="got the target 0, expected a caption"):
        main([*arguments, f"output_dir={tmp_path}", f"train_dataset_str=ImageList:file={folder}/labels.csv"])


@pytest.fixture(scope="module", autouse=True)
def _labels(arguments: list[str]) -> None:
    folder = Path(arguments[0].partition("=")[2]).parent
    (folder / "labels.csv").write_text("path,label\n" + "".join(f"{i}.png,0\n" for i in range(6)))


# -- Weights ----------------------------------------------------------------------------------------------------------


def test_an_export_is_used_again(undisturbed: Path) -> None:
    config = load_model_config(undisturbed / "clip_model_config.yaml")
    model, transform, tokenizer = build_model_for_eval(
        config, undisturbed / "eval/training_5/sharded_model_checkpoint", use_fsdp=False, do_compile=False
    )
    assert not model.training
    state = exported(undisturbed)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert transform(torch.zeros(3, 30, 40, dtype=torch.uint8)).shape == (3, 16, 16)
    assert model.encode_text(tokenizer.tokenize(["x"])).shape == (1, 128)


def test_a_frozen_backbone_is_loaded_and_left_out_of_checkpoints(arguments: list[str], tmp_path: Path) -> None:
    trained = config_of(arguments, tmp_path, vision_model_freeze_backbone="false")
    model, *_ = build_model_and_tokenizer(model_config_of(trained), use_fsdp=False)
    backbone = {f"backbone.{key}": fill.weight(key, tuple(value.shape)) if value.is_floating_point() else value
                for key, value in model.visual_model.backbone.state_dict().items()}  # fmt: skip
    backbone["dino_head.x"] = torch.zeros(1)
    weights = tmp_path / "teacher.pth"
    torch.save({"teacher": backbone}, weights)
    frozen = ["vision_model_freeze_backbone=true", f"vision_backbone_pretrained_weights={weights}", "max_iteration=2"]
    main([*arguments, f"output_dir={tmp_path}", *frozen])
    state = exported(tmp_path, 1)
    assert not any(key.startswith("visual_model.backbone.") for key in state)
    config = load_model_config(tmp_path / "clip_model_config.yaml")
    source = tmp_path / "eval/training_1/sharded_model_checkpoint"
    used, *_ = build_model_for_eval(config, source, use_fsdp=False)
    key = "blocks.0.attn.proj.weight"
    assert torch.equal(used.visual_model.backbone.state_dict()[key], backbone[f"backbone.{key}"])
    config.vision_backbone_pretrained_weights = None
    with pytest.raises(ValueError, match="no vision backbone, and vision_backbone_pretrained_weights is not set"):
        build_model_for_eval(config, source, use_fsdp=False)
    with pytest.raises(ValueError, match="frozen and would stay random: set vision_backbone_pretrained_weights"):
        build_model_and_tokenizer(config)


def test_backbones_are_loaded_from_files_of_several_kinds(arguments: list[str], tmp_path: Path) -> None:
    config = config_of(arguments, tmp_path)
    model, *_ = build_model_and_tokenizer(model_config_of(config), use_fsdp=False)
    vision, text = model.visual_model.backbone, model.text_model.backbone
    assert set(rename_register_token({"a.register_tokens": torch.zeros(1)})) == {"a.storage_tokens"}
    whole = {key: torch.full_like(value, 2) for key, value in text.state_dict().items()}
    torch.save({f"text_model.backbone.{key}": value for key, value in whole.items()} | {"logit_scale": torch.ones(1)},
               tmp_path / "text.pth")  # fmt: skip
    load_backbone_checkpoint(text, tmp_path / "text.pth")
    assert all((value == 2).all() for value in text.state_dict().values())
    state = {f"module.backbone.{key}": torch.full_like(value, 3) for key, value in vision.state_dict().items()}
    torch.save(state, tmp_path / "vision.pth")
    load_backbone_checkpoint(vision, tmp_path / "vision.pth")
    assert all((value == 3).all() for value in vision.state_dict().values())
    del state["module.backbone.cls_token"]
    torch.save(state, tmp_path / "vision.pth")
    with pytest.raises(ValueError, match=r"vision.pth: .*1 missing: cls_token"):
        load_backbone_checkpoint(vision, tmp_path / "vision.pth")


def test_a_vocabulary_larger_than_the_model_is_refused(arguments: list[str], tmp_path: Path) -> None:
    config = config_of(arguments, tmp_path)
    (tmp_path / "small.yaml").write_text(Path(str(config.text_backbone_config)).read_text().replace("514", "400"))
    config.text_backbone_config = str(tmp_path / "small.yaml")
    with pytest.raises(ValueError, match="ids up to 513, the text backbone embeds 400: set vocab_size=514"):
        build_model_and_tokenizer(model_config_of(config))


# -- Several processes ------------------------------------------------------------------------------------------------

B, N_STEPS = 8, 3


def train_steps(arguments: list[str], output_dir: Path, use_fsdp: bool) -> dict[str, Any]:
    """Some steps on this process's share of fixed batches, from random weights; whole tensors of what it ends with."""
    from dinov3 import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(5 if use_fsdp or world == 1 else 5 + rank)
    config = config_of(arguments, output_dir, vision_model_head_blocks_drop_path=0)
    model, *_ = build_model_and_tokenizer(model_config_of(config), use_fsdp=use_fsdp)
    initial = {name: whole(value) for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    step = Step(model, optimizer, gram_loss_weight=0.5)
    own = slice(rank * B // world, (rank + 1) * B // world)
    losses = []
    for i in range(N_STEPS):
        images = fill.tensor(f"text.images{i}", (B, 3, 16, 16))[own]
        tokens = (fill.tensor(f"text.tokens{i}", (B, 9)).abs() * 1000).long().remainder(514)[own]
        metrics = step(images, tokens, 1e-3)
        losses.append([metrics["contrastive_loss"].item(), metrics["gram_loss"].item()])
    return {
        "losses": losses,
        "initial": initial,
        "state": {name: whole(value) for name, value in model.state_dict().items()},
        "sharded": any(hasattr(p, "full_tensor") for p in model.parameters()),
    }


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@pytest.mark.parametrize(("world", "use_fsdp"), [(2, True), pytest.param(4, True, marks=pytest.mark.slow), (2, False)])
def test_several_processes_train_as_one(world: int, use_fsdp: bool, arguments: list[str], tmp_path: Path) -> None:
    alone = train_steps(arguments, tmp_path, use_fsdp=False)
    ranks = run_distributed(train_steps, world, tmp_path, arguments, tmp_path, use_fsdp)
    for result in ranks:
        assert result["sharded"] is use_fsdp
        for key, value in alone["initial"].items():
            assert torch.equal(result["initial"][key], value), key
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(alone["losses"]), rtol=1e-4, atol=1e-6)
        for key, value in alone["state"].items():
            torch.testing.assert_close(result["state"][key], value, rtol=1e-3, atol=2e-5, msg=key)
            assert torch.equal(result["state"][key], ranks[0]["state"][key]), f"{key} differs between processes"


def whole_training(arguments: list[str]) -> None:
    main(arguments)


def test_two_processes_save_and_one_goes_on(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = [*arguments, f"output_dir={folder}", "batch_size=2"]
    run_distributed(whole_training, 2, tmp_path, [*options, "max_iteration=3", "eval_freq=2"], init_group=False)
    assert (folder / "eval/training_1/sharded_model_checkpoint/.metadata").exists()
    main([*options, "max_iteration=5"])
    before, after = exported(folder, 2), exported(folder, 4)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], value) for key, value in after.items())


def add_nan_on_one_rank() -> str:
    """What a process raises when another one has a loss that isn't finite."""
    rank = torch.distributed.get_rank()
    image = torch.full((2, 3), float("nan") if rank == 1 else 1.0)
    from dinov3 import distributed

    loss = memory_efficient_clip_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0) + image.sum()
    check = FiniteCheck()
    check.add(distributed.reduce_dict({"contrastive_loss": loss}), 0)
    try:
        check.look(0)
    except RuntimeError as error:
        return str(error)
    return ""


def test_all_processes_notice_a_loss_that_is_not_finite_on_one(tmp_path: Path) -> None:
    for message in run_distributed(add_nan_on_one_rank, 2, tmp_path):
        assert "a loss is not finite" in message


# -- The bars ---------------------------------------------------------------------------------------------------------


def test_all_training_pairs_are_found_again(tmp_path: Path) -> None:
    """A tiny model on real photographs with captions; then classification and segmentation without training."""
    photos = available_photos()[:4]
    if len(photos) < 4:
        pytest.skip("the photographs of scikit-image are not installed")
    data = example.make_example(tmp_path / "data", photos)
    run = tmp_path / "run"
    quick = ["vision_model_train_img_size=32", "max_iteration=120", "warmup_length=10", "eval_freq=0"]
    train_dinotxt.main([f"trainer_config_file={data.training}", f"output_dir={run}", *quick])
    results = json.loads((run / "eval/training_119/results.json").read_text())
    assert results["text_to_image_recall@1"] == results["image_to_text_recall@1"] == 100.0


@pytest.mark.slow
def test_the_example_runs_as_published(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dinov3.eval.text.example", "--output-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    retrieval = (tmp_path / "retrieval/results-retrieval.csv").read_text().splitlines()
    assert set(retrieval[1].split(",")) == {"100"}
    assert list((tmp_path / "segmentation/pictures").glob("*.png"))


@pytest.mark.slow
def test_the_published_command_trains_evaluates_and_goes_on(arguments: list[str], tmp_path: Path) -> None:
    folder = Path(arguments[0].partition("=")[2]).parent
    vision = tmp_path / "vision.yaml"
    vision.write_text("student: {arch: vit_nano, patch_size: 8}\ncrops: {global_crops_size: 16}\n")
    command = [
        *(sys.executable, "-m", "dinov3.run.submit", "dinov3/eval/text/train_dinotxt.py", "--nodes", "1"),
        *("--cluster", "local", "--ngpus", "2", *arguments, f"output-dir={tmp_path}/out"),
        *(f"vision_backbone_config={vision}", f"eval_dataset_str=CaptionList:file={folder}/captions.csv"),
        *("batch_size=3", "eval_freq=2"),
    ]
    for max_iteration in (3, 4):
        done = subprocess.run(
            [*command, f"max_iteration={max_iteration}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resum" in (tmp_path / "out/logs/log.txt").read_text() or (tmp_path / "out/ckpt/3").is_dir()
    results = json.loads((tmp_path / "out/eval/training_1/results.json").read_text())
    assert results["text_to_image_recall@10"] == 100.0  # of six images
    assert (tmp_path / "out/eval/training_3/sharded_model_checkpoint/.metadata").exists()
