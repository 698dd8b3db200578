"""The documentation keeps its word: it builds without a warning, its snippets run, its error messages exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.source import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "dinov3").rglob("*.py")))


def _blocks(document: str, language: str) -> list[str]:
    text = (ROOT / "docs" / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Meta releases it, of a ViT-S/16 with random weights."""
    import hubconf

    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(hubconf.dinov3_vits16(pretrained=False).state_dict(), path)
    return path


@pytest.mark.parametrize("number", range(len(_blocks("coming_from.md", "python"))))
def test_snippets_of_coming_from_run_as_printed(
    number: int, weight_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = _blocks("coming_from.md", "python")[number]
    code = code.replace("path/to/dinov3", str(ROOT)).replace("path/to/weights.pth", str(weight_file))
    monkeypatch.chdir(tmp_path)
    printed: list[object] = []
    exec(compile(code, f"coming_from.md, snippet {number}", "exec"), {"print": lambda *values: printed.extend(values)})
    promised = [tuple(map(int, sizes.split(","))) for sizes in re.findall(r"# \[([\d, ]+)\]$", code, re.MULTILINE)]
    assert [tuple(value) for value in printed if isinstance(value, torch.Size)] == promised


@pytest.mark.parametrize("document", ["coming_from.md", "weights.md"])
def test_commands_parse(document: str) -> None:
    from dinov3.run import api, cli, explore, export

    parsers = {"dinov3.run.export": export.get_args_parser(), "dinov3.run.explore": explore.get_args_parser()}
    lines = [shlex.split(line) for block in _blocks(document, "bash") for line in block.splitlines() if line]
    assert lines
    for words in lines:
        if words[0] == "dinov3":
            assert words[1] in cli.COMMANDS
            assert words[1] != "eval" or words[2] in api.EVALUATIONS
            module, arguments = f"dinov3.run.{words[1]}", words[2:]
        else:
            assert words[:2] == ["python", "-m"]
            module, arguments = words[2], words[3:]
        if module in parsers:
            parsers[module].parse_args(arguments)


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 10
    plain = re.sub(r'"\s*f?"', "", SOURCE)  # strings that go on in the next line
    assert [message for message in messages if message not in plain] == []


def test_every_page_is_on_the_site() -> None:
    configuration = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w]+\.md", str(configuration["nav"])))
    assert listed == {path.name for path in DOCS}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built with mkdocs: dinov3[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "extract_features" in page
