"""Every notebook runs top to bottom in an empty folder with the installed wheel, and makes its figures."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.source import ROOT
from tests.helpers.wheel import install_wheel

nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient: install 'dinov3[notebooks]'")
nbformat = pytest.importorskip("nbformat")

FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLISHED = {
    "chmv2_inference",
    "dense_sparse_matching",
    "dinotxt_inference",
    "dinotxt_segmentation_inference",
    "foreground_segmentation",
    "pca",
    "segmentation_tracking",
}


def _read(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the installed package, first on the path of kernels."""
    folder = tmp_path_factory.mktemp("site")
    install_wheel(wheel, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("PYTHONWARNINGS", "ignore")  # kernels warn of their own affairs
        for name in [name for name in os.environ if name.startswith("DINOV3_") and name != "DINOV3_CACHE"]:
            patch.delenv(name)
        yield folder


def test_the_published_notebooks_are_there() -> None:
    assert PUBLISHED <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sources_are_clean(file: Path) -> None:
    notebook = _read(file)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "DINOV3_LOCATION" in code[0].source
    assert len(file.read_text()) < 50_000
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert not re.search(r"cuda|/home/|/Users/", cell.source)
        compile(cell.source, file.name, "exec")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom(file: Path, site: Path, tmp_path: Path) -> None:
    notebook = _read(file)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells.append(nbformat.v4.new_code_cell("import dinov3\nprint(dinov3.__file__)"))

    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        extra_arguments=["--log-level=ERROR"],
    )
    client.create_kernel_manager().kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute()

    assert Path(notebook.cells[-1].outputs[0].text.strip()).is_relative_to(site)
    figures = set(re.findall(r'"([\w-]+\.png)"', source))
    assert figures
    for name in figures:
        with Image.open(tmp_path / name) as figure:
            low, high = figure.convert("L").getextrema()
        assert high - low > 100, f"{name} shows nothing"
