from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import exit_job, setup_multidistillation
from dinov3.configs.multidistillation import DistillationPlan
from tests.helpers.distributed import run_distributed

BASE = """
MODEL: {META_ARCHITECTURE: MultiDistillationMetaArch}
optim: {epochs: 9, scaling_rule: linear_wrt_256}
multidistillation:
  enabled: true
  global_batch_size: 6
  students:
    - {name: small, config_path: SMALL, ranks_range: [0, 1]}
    - {name: large, config_path: LARGE, ranks_range: [1, 3]}
"""


def write(folder: Path) -> Path:
    (folder / "small.yaml").write_text("student: {arch: vit_small}\noptim: {epochs: 1, clip_grad: 1.0}\n")
    (folder / "large.yaml").write_text("student: {arch: vit_large}\n")
    base = BASE.replace("SMALL", str(folder / "small.yaml")).replace("LARGE", str(folder / "large.yaml"))
    (folder / "base.yaml").write_text(base)
    return folder / "base.yaml"


def _setup(base: Path, out: Path) -> dict[str, Any]:
    args = Namespace(config_file=str(base), output_dir=str(out), opts=["train.num_workers=1"], seed=4)
    cfg = setup_multidistillation(args)
    try:
        keys = [
            "student.arch",
            "optim.epochs",
            "optim.clip_grad",
            "optim.lr",
            "train.num_workers",
            "train.batch_size_per_gpu",
        ]
        values = {key: OmegaConf.select(cfg, key) for key in keys}
        return values | {
            "group": distributed.get_subgroup_size(),
            "output": cfg.train.output_dir,
            "args": args.output_dir,
        }
    finally:
        exit_job()


def test_every_process_gets_the_configuration_of_its_student(tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run_distributed(_setup, 3, tmp_path, write(tmp_path), out, init_group=False)
    for rank, result in enumerate(results):
        small = rank == 0
        assert result == {
            "student.arch": "vit_small" if small else "vit_large",
            "optim.epochs": 9,  # the base file wins over the student's
            "optim.clip_grad": 1.0 if small else 3.0,
            "optim.lr": 0.001 * 6 / 256,
            "train.num_workers": 1,
            "train.batch_size_per_gpu": 2,
            "group": 1 if small else 2,
            "output": str(out / ("small" if small else "large")),
            "args": str(out / ("small" if small else "large")),
        }
    assert OmegaConf.load(out / "small" / "config.yaml").optim.lr == 0.001
    assert {p.name for p in (out / "large" / "logs").iterdir()} == {"log.txt.rank1", "log.txt.rank2"}


def test_the_number_of_processes_must_fit(tmp_path: Path) -> None:
    args = Namespace(config_file=str(write(tmp_path)), output_dir=str(tmp_path / "out"), opts=[])
    with pytest.raises(ValueError, match="the students need 3 processes, but 1 were started"):
        setup_multidistillation(args)
    assert not distributed.is_enabled()


def plan(*ranges: list[int], size: Any = 12, enabled: bool = True, **changes: Any) -> DistillationPlan:
    students = [{"name": f"s{i}", "config_path": "x", "ranks_range": r} | changes for i, r in enumerate(ranges)]
    return DistillationPlan.from_config(
        {"multidistillation": {"enabled": enabled, "global_batch_size": size, "students": students}}
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plan([0, 1], enabled=False), r"multidistillation\.enabled: true"),
        (lambda: plan([0, 1], size=None), "global_batch_size must be a positive integer, got None"),
        (lambda: plan(), "must be a list of students"),
        (lambda: plan([1, 1]), "first < last"),
        (lambda: plan([0, 1], ranks_range="0-1"), "first < last"),
        (lambda: DistillationPlan.from_config({}), r"multidistillation\.enabled"),
        (lambda: plan([0, 5]).check(5), "12 is not divisible by the 5 ranks of s0"),
        (lambda: plan([0, 2], [1, 3]).check(4), "without gaps"),
        (lambda: plan([0, 1], [1, 2], name="same").check(2), "different names"),
    ],
)
def test_bad_plans_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
