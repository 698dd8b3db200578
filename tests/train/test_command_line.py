"""What the training script accepts and refuses on its command line."""

import re

import pytest

from dinov3.train.train import build_meta_arch, parse_args


def test_overrides_come_last_and_keep_their_order() -> None:
    args = parse_args(["--config-file", "c.yaml", "--output-dir=OUT", "--seed", "3", "train.seed=1", "optim.lr=1e-4"])
    assert (args.config_file, args.output_dir, args.seed) == ("c.yaml", "OUT", 3)
    assert args.opts == ["train.seed=1", "optim.lr=1e-4"]
    assert not args.no_resume


def test_every_published_flag_is_accepted() -> None:
    flags = ["--eval-only", "--eval", "x", "--eval_pretrained_weights", "y", "--benchmark-codebase", "--test-ibot"]
    flags += ["--profiling", "--dump-fsdp-weights", "--record_ref_losses", "--ref_losses_path", "z", "--no-resume"]
    assert parse_args([*flags, "--multi-distillation"]).multi_distillation


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train.seed=1", "--output-dir", "OUT"], "options must come before the key=value overrides.*--output-dir"),
        (["train.seed"], "overrides have the form key=value; got: train.seed"),
        (["--output", "OUT"], "unrecognized arguments: --output"),
    ],
)
def test_misplaced_or_malformed_arguments_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert re.search(message, capsys.readouterr().err)


def test_unknown_meta_architectures_are_refused_with_the_choices() -> None:
    from dinov3.configs import get_default_config

    cfg = get_default_config()
    cfg.MODEL.META_ARCHITECTURE = "SSLMeta"
    with pytest.raises(ValueError, match="'SSLMeta'; expected one of SSLMetaArch, MultiDistillationMetaArch"):
        build_meta_arch(cfg, multi_distillation=False)
    cfg.MODEL.META_ARCHITECTURE = "SSLMetaArch"
    with pytest.raises(ValueError, match="--multi-distillation needs"):
        build_meta_arch(cfg, multi_distillation=True)
