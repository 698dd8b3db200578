import logging
import os
from argparse import Namespace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from dinov3.configs import (
    DinoV3SetupArgs,
    apply_scaling_rules_to_cfg,
    get_cfg_from_args,
    get_default_config,
    load_teacher_config,
    setup_config,
    write_config,
)


def config(*opts: str, file: str | Path = "", **kwargs: object) -> "OmegaConf":
    return get_cfg_from_args(DinoV3SetupArgs(config_file=str(file), opts=list(opts), **kwargs), strict=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text)
    return path


def test_defaults_file_overrides_in_this_order(tmp_path: Path) -> None:
    file = write(tmp_path, "optim: {epochs: 7, clip_grad: 1.5}\ncrops: {rgb_mean: [0, 0, 0]}\n")
    cfg = config("optim.epochs=8", "crops.global_crops_size=[32,48]", file=file)
    assert (cfg.optim.epochs, cfg.optim.clip_grad, cfg.optim.adamw_beta1) == (8, 1.5, 0.9)
    assert cfg.crops.rgb_mean == [0, 0, 0]
    assert cfg.crops.global_crops_size == [32, 48]


def test_scalars_without_a_dot_are_numbers(tmp_path: Path) -> None:
    cfg = config("optim.min_lr=2e-6", file=write(tmp_path, "optim: {lr: 1e-3}\n"))
    assert (cfg.optim.lr, cfg.optim.min_lr) == (0.001, 2e-6)


def test_null_sections_can_be_overridden_key_by_key() -> None:
    cfg = config("gram.loss_weight_schedule.start=0", "gram.loss_weight_schedule.peak=2")
    assert cfg.gram.loss_weight_schedule == {"start": 0, "peak": 2}


def test_output_dir_beats_overrides_and_may_hold_any_character(tmp_path: Path) -> None:
    folder = tmp_path / "a: b [c] = ${d}"
    cfg = config("train.output_dir=elsewhere", output_dir=str(folder))
    assert OmegaConf.to_container(cfg.train, resolve=False)["output_dir"] == os.path.realpath(folder)
    assert config("train.output_dir=elsewhere").train.output_dir == "elsewhere"


def test_overrides_given_through_omegaconf() -> None:
    args = DinoV3SetupArgs(config_file="", opts=OmegaConf.create(["optim.epochs=3"]))
    assert type(args.opts) is list
    assert get_cfg_from_args(args).optim.epochs == 3


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.batch_size_per_gpuu", "train.batch_size_per_gpu"),
        ("trian.seed", "train.seed"),
        ("batch_size_per_gpu", "train.batch_size_per_gpu"),
        ("student.n_storage_token", "student.n_storage_tokens"),
        ("schedules.lr.warmup_epoch", "schedules.lr.warmup_epochs"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_unknown_key_names_the_nearest_one(key: str, nearest: str, strict: bool) -> None:
    args = DinoV3SetupArgs(config_file="", opts=[f"{key}=1"])
    with pytest.raises(ConfigKeyError, match="--allow-unknown-keys") as error:
        get_cfg_from_args(args, strict=strict)
    assert isinstance(error.value, ValueError)
    assert f"the overrides: {key} (did you mean {nearest}?)" in str(error.value)


def test_unknown_keys_of_a_file_name_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "student: {arhc: vit_small}\n")
    with pytest.raises(ValueError, match=r"file\.yaml: student\.arhc \(did you mean student\.arch\?\)"):
        config(file=file)


def test_unknown_keys_can_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("my.own=1", allow_unknown_keys=True)
    assert cfg.my.own == 1
    assert any("my.own" in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    with pytest.raises(ConfigKeyError):
        get_cfg_from_args(DinoV3SetupArgs("", opts=["my.own=1"], allow_unknown_keys=True), strict=True)


def test_legacy_keys_are_accepted_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, "train: {saveckp_freq: 20, use_teacher_head: false}\nstudent: {patch_drop: 0.0}\n")
    with caplog.at_level("INFO"):
        cfg = config(file=file)
    assert cfg.train.use_teacher_head is False
    (line,) = [message for message in caplog.messages if "nothing reads" in message]
    assert "train.use_teacher_head" in line
    assert "student.patch_drop" in line
    assert "saveckp_freq" not in line  # it has its default value


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        config(file=tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=r"file\.yaml can't be read as YAML"):
        config(file=write(tmp_path, "a: [1\nb: {"))
    with pytest.raises(ValueError, match="expected a mapping"):
        config(file=write(tmp_path, "- 1\n- 2\n"))
    with pytest.raises(ValueError, match="form key=value, got optim"):
        config("optim")


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config(file="dinov3/configs/train/multidist_tests/vits_p16.yaml").student.arch == "vit_small"


def test_multidistillation_leaves_out_the_defaults(tmp_path: Path) -> None:
    args = DinoV3SetupArgs(config_file=str(write(tmp_path, "optim: {epochs: 2}\n")), opts=["train.seed=3"])
    assert get_cfg_from_args(args, multidistillation=True) == {"optim": {"epochs": 2}, "train": {"seed": 3}}


def test_config_file_is_from_before_scaling_and_can_be_fed_back(tmp_path: Path) -> None:
    args = Namespace(config_file="", output_dir=str(tmp_path), opts=["optim.scaling_rule=linear_wrt_256"])
    cfg = setup_config(args)
    assert cfg.optim.lr == 0.001 * 64 / 256
    saved = tmp_path / "config.yaml"
    assert OmegaConf.load(saved).optim.lr == 0.001
    again = setup_config(Namespace(config_file=str(saved), output_dir=str(tmp_path), opts=[]))
    assert again == cfg
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setup_config(DinoV3SetupArgs(config_file=""))
    assert list(tmp_path.iterdir()) == []


def test_write_config_returns_the_path(tmp_path: Path) -> None:
    path = write_config(get_default_config(), tmp_path, name="other.yaml")
    assert path == str(tmp_path / "other.yaml")
    assert OmegaConf.load(path) == get_default_config()


def test_scaling_leaves_v2_alone_and_names_a_null_rate() -> None:
    assert apply_scaling_rules_to_cfg(config("schedules.lr.start=0", "optim.lr=null")).optim.lr is None
    with pytest.raises(ValueError, match=r"optim\.lr is null"):
        apply_scaling_rules_to_cfg(config("optim.lr=null"))


def test_teacher_config_may_have_keys_of_other_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_teacher_config(write(tmp_path, "student: {arch: vit_small}\nsomebodys: {key: 1}\n"))
    assert cfg.student.arch == "vit_small"
    assert cfg.student.patch_size == 16
    assert any("somebodys.key" in message for message in caplog.messages)
