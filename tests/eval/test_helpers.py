"""From the command line to a configuration object, and the results file."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, ValidationError

from dinov3.eval.config import LossType
from dinov3.eval.helpers import args_dict_to_dataclass, cli_parser, write_results
from dinov3.eval.metrics import ClassificationMetricType


@dataclass
class _Train:
    dataset: str = MISSING
    batch_size: int = 8
    ks: tuple[int, ...] = (1, 2)
    metrics: tuple[ClassificationMetricType, ...] = ()
    loss: LossType = LossType.CROSS_ENTROPY
    limit: float | None = None


@dataclass
class _Config:
    train: _Train = field(default_factory=_Train)
    output_dir: str = ""


def _parse(*argv: str, save_config: bool = False) -> tuple[_Config, str]:
    return args_dict_to_dataclass(cli_parser(argv), _Config, save_config=save_config)


def test_values_are_split_at_the_first_equals_sign_and_read_as_yaml() -> None:
    config, output_dir = _parse("train.dataset=A:split=B:root=/c", "train.ks=[3,4]", "train.limit=1e-6")
    assert config.train.dataset == "A:split=B:root=/c"
    assert list(config.train.ks) == [3, 4]
    assert config.train.limit == 1e-6
    assert output_dir == config.output_dir == "."


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["output_dir=/a"], "/a"),
        (["--output-dir=/b"], "/b"),
        (["--output-dir", "/c"], "/c"),
        (["--output-dir=/b", "output_dir=/a"], "/a"),
    ],
)
def test_every_form_of_the_output_directory(argv: list[str], expected: str) -> None:
    assert cli_parser(argv)["output_dir"] == expected


@pytest.mark.parametrize("argv", [["knn"], ["--verbose"], ["--output-dir"]])
def test_other_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=r"expected key=value|needs a folder"):
        cli_parser(argv)


def test_enums_by_name_in_any_case() -> None:
    config, _ = _parse("train.dataset=a", "train.loss=binary_cross_entropy", "train.metrics=[AUROC,mean_accuracy]")
    assert config.train.loss is LossType.BINARY_CROSS_ENTROPY
    assert list(config.train.metrics) == [ClassificationMetricType.AUROC, ClassificationMetricType.MEAN_ACCURACY]
    with pytest.raises(ValidationError, match="CROSS_ENTROPY"):
        _parse("train.dataset=a", "train.loss=hinge")


def test_enums_by_value_where_it_is_not_the_name() -> None:
    config, _ = _parse("train.dataset=a", "train.metrics=[map_voc2007,auroc]")
    assert list(config.train.metrics) == [
        ClassificationMetricType.MEAN_AVERAGE_PRECISION_VOC_2007,
        ClassificationMetricType.AUROC,
    ]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("train.batchsize", "train.batch_size"), ("batch_size", "train.batch_size"), ("outdir", "output_dir")],
)
def test_unknown_keys_are_errors_that_name_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigKeyError, match=f"unknown key '{key}' for _Config; did you mean '{nearest}'"):
        _parse("train.dataset=a", f"{key}=3")


def test_unknown_keys_can_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        config, _ = _parse("train.dataset=a", "train.batchsize=3", "foo.bar=1", "--allow-unknown-keys")
    assert config.train.batch_size == 8
    assert "train.batchsize" in caplog.text
    assert "foo" in caplog.text


def test_missing_and_mistyped_values() -> None:
    with pytest.raises(MissingMandatoryValue):
        _parse()
    with pytest.raises(ValidationError):
        _parse("train.dataset=a", "train.batch_size=many")


def test_a_file_lies_below_the_arguments_and_the_result_is_saved(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train:\n  dataset: from_file\n  batch_size: 3\n")
    out = tmp_path / "new" / "folder"
    argv = [f"config_file={tmp_path}/base.yaml", "train.batch_size=5", f"output_dir={out}"]
    config, output_dir = _parse(*argv, save_config=True)
    assert (config.train.dataset, config.train.batch_size, output_dir) == ("from_file", 5, str(out))
    saved = OmegaConf.load(out / "eval_config.yaml")
    assert saved.train.dataset == "from_file"
    assert saved.train.loss == "CROSS_ENTROPY"
    again, _ = args_dict_to_dataclass({"config_file": str(out / "eval_config.yaml")}, _Config, save_config=False)
    assert again == config


def test_results_are_one_row(tmp_path: Path) -> None:
    write_results({"10 Top 1": 81.25, "best": "x"}, tmp_path / "made", "r.csv")
    assert (tmp_path / "made" / "r.csv").read_text() == "10 Top 1,best\n81.25,x\n"
