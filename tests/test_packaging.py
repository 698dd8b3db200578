"""What is installed: requirements say the same everywhere, and the wheel works away from the repository."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

from tests.helpers.images import write_image_folder
from tests.helpers.source import ROOT
from tests.helpers.wheel import install_wheel

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def _bounds(requirements: list[str]) -> dict[str, str]:
    """Name -> lower bound, of requirements of the form `name>=bound`; those that name our own extras are left out."""
    return dict(r.split(">=") for r in requirements if not r.startswith("dinov3["))


def _everything() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, bound in (pair for extra in EXTRAS.values() for pair in _bounds(extra).items()):
        assert found.setdefault(name, bound) == bound, f"two lower bounds for {name}: {found[name]} and {bound}"
    return found | _bounds(PROJECT["dependencies"])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def test_the_core_needs_torch_alone() -> None:
    assert PROJECT["dependencies"] == ["torch>=2.7.1"]


def test_all_brings_every_extra() -> None:
    (everything,) = EXTRAS["all"]
    assert set(everything.removeprefix("dinov3[").rstrip("]").split(",")) == set(EXTRAS) - {"all"}


def test_every_dependency_has_its_lower_bound_on_a_line_of_its_own() -> None:
    """`make test-min` reads the bounds line by line."""
    lines = re.findall(r'^ *"([A-Za-z0-9_-]+)>=([^",]+)",?', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert dict(lines) == _everything()


def test_constraints_pin_every_dependency_at_or_above_its_bound() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert list(pins) == sorted(pins)
    for name, bound in _everything().items():
        assert _version(pins[name]) >= _version(bound), name


def test_conda_environment_says_the_same() -> None:
    lines = re.findall(r"^  - (\S+?)>=(\S+)$", (ROOT / "conda.yaml").read_text(), re.MULTILINE)
    conda = {"torch" if name == "pytorch" else name: bound for name, bound in lines}
    assert conda.pop("python") == PROJECT["requires-python"].removeprefix(">=")
    assert conda == _everything()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    patterns = ("*.py", "*.yaml", "*.html", "py.typed")
    files = {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "dinov3").rglob(pattern)}
    assert {name for name in names if ".dist-info/" not in name} == files
    assert metadata["License-Expression"] == "Apache-2.0"
    assert [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r] == ["torch>=2.7.1"]


CONFIG = """
compute_precision: {param_dtype: fp32}
student: {arch: vit_small, patch_size: 16}
dino: {head_n_prototypes: 16, head_bottleneck_dim: 8, head_hidden_dim: 24}
ibot: {head_n_prototypes: 12, head_bottleneck_dim: 8, head_hidden_dim: 24}
crops: {local_crops_number: 1, global_crops_size: 32, local_crops_size: 16}
optim: {epochs: 1, warmup_epochs: 0}
train: {batch_size_per_gpu: 2, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 1, compile: false}
teacher: {warmup_teacher_temp_epochs: 0}
"""


def test_the_wheel_trains_and_evaluates_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees this one's dependencies but not the repository."""
    venv.create(tmp_path / "venv", with_pip=False)
    variables = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", variables))
    python = Path(sysconfig.get_path("scripts", "venv", variables)) / Path(sys.executable).name
    install_wheel(wheel, site)
    # A folder added this way brings its packages, not its own .pth files, so not this repository's editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*arguments: str) -> str:
        done = subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        return done.stdout

    assert Path(run("-c", "import dinov3; print(dinov3.__file__)").strip()).is_relative_to(site)
    write_image_folder(tmp_path / "images", classes=2, per_class=4, size=40, seed=0)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    dataset = f"ImageFolder:root={tmp_path / 'images'}"
    run(
        "-m", "dinov3.train.train", "--config-file", "tiny.yaml", "--output-dir", "out", f"train.dataset_path={dataset}"
    )
    knn = ("train.num_workers=0", "eval.num_workers=0", "train.batch_size=4", "train.ks=[1,2]", "output_dir=knn")
    sizes = ("transform.resize_size=32", "transform.crop_size=32")
    model = ("model.config_file=out/config.yaml", "model.pretrained_weights=out/teacher_checkpoint.pth")
    data = (f"train.dataset={dataset}", f"eval.test_dataset={dataset}")
    run("-m", "dinov3.eval.knn", *model, *data, *knn, *sizes)
    assert (tmp_path / "knn/results-knn.csv").read_text().strip()
