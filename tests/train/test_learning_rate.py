"""The learning rate that a training resolves is said at its start, with the rule that led to it."""

import logging

import pytest

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args, setup_config
from dinov3.train.schedules import build_schedulers

V2 = [
    f"schedules.{name}.{key}={value}"
    for name in ("lr", "weight_decay", "momentum", "teacher_temp")
    for key, value in {"start": 0, "peak": 0.5, "end": 0.25, "warmup_epochs": 0}.items()
] + ["schedules.lr.freeze_last_layer_epochs=0"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["optim.lr=0.001"], "learning rate 0.001 becomes 0.001 (sqrt_wrt_1024, batch 64)"),
        (["optim.lr=0.001", "optim.scaling_rule=linear_wrt_256"], "becomes 0.00025 (linear_wrt_256, batch 64)"),
        ([*V2, "train.batch_size_per_gpu=256"], "peak 0.5 x 2 (sqrt_wrt_1024, 256 images per iteration)"),
        ([*V2, "optim.scaling_rule=none"], "peak 0.5 x 1 (none, 64 images per iteration)"),
    ],
)
def test_rate_and_rule_are_logged(opts: list[str], message: str, caplog: pytest.LogCaptureFixture) -> None:
    opts = [*opts, "optim.epochs=20", "train.OFFICIAL_EPOCH_LENGTH=2"]
    with caplog.at_level(logging.INFO, logger="dinov3"):
        cfg = setup_config(DinoV3SetupArgs(config_file="", opts=opts))
        lr = build_schedulers(cfg).lr
    assert message in caplog.text
    factor = float(message.split(" x ")[1].split()[0]) if " x " in message else 1.0
    assert max(lr[i] for i in range(len(lr))) == pytest.approx(
        0.5 * factor if " x " in message else float(message.split("becomes ")[1].split()[0])
    )
    assert get_cfg_from_args(DinoV3SetupArgs(config_file="", opts=opts)).optim.lr == 0.001, "the file keeps its rate"
