"""The wheel, as users install it."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.helpers.source import ROOT


def build_wheel(folder: Path) -> Path:
    """Build it from a copy of what it needs: a `build/` of the repository could hold deleted files."""
    source = folder / "source"
    licences = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    shutil.copytree(ROOT / "dinov3", source / "dinov3", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", *licences):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True, timeout=200)
    (built,) = folder.glob("*.whl")
    return built


def install_wheel(wheel: Path, site: Path) -> None:
    """Install it, without its dependencies, into a folder of packages."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=200)
