"""Loading a callable from a script."""

import importlib
import sys
from pathlib import Path

import pytest

from dinov3.utils.custom_callable import change_working_dir_and_pythonpath, load_custom_callable


@pytest.fixture(autouse=True)
def keep_interpreter_state(monkeypatch: pytest.MonkeyPatch):
    modules, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_script_sees_its_neighbours_while_it_is_imported(tmp_path: Path) -> None:
    write(tmp_path, "some_neighbour.py", "value = 3\n")
    script = write(tmp_path, "some_script.py", "import some_neighbour\ndef main(): return some_neighbour.value\n")
    main = load_custom_callable(script, "main")
    assert main() == 3
    assert main.__module__ == "some_script"


def test_same_stem_in_two_folders_gives_two_modules(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "some_script.py", "def main(): return 1\n")
    second = write(tmp_path / "b", "some_script.py", "def main(): return 2\n")
    main = load_custom_callable(first, "main")
    assert (main(), load_custom_callable(str(second), "main")(), main()) == (1, 2, 1)
    assert load_custom_callable(first, "main") is main


def test_file_of_a_package_keeps_its_dotted_name() -> None:
    module = importlib.import_module("dinov3.utils.info")
    assert load_custom_callable(module.__file__, "get_sha") is module.get_sha


def test_failed_import_leaves_nothing_behind(tmp_path: Path) -> None:
    script = write(tmp_path, "some_broken_script.py", "raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        load_custom_callable(script, "main")
    assert "some_broken_script" not in sys.modules


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.py"):
        load_custom_callable(tmp_path / "nothing.py", "main")
    with pytest.raises(AttributeError, match="'main'"):
        load_custom_callable(write(tmp_path, "some_empty_script.py", ""), "main")


def test_working_directory_and_path_are_restored_after_an_error(tmp_path: Path) -> None:
    def fail_inside() -> None:
        with change_working_dir_and_pythonpath(tmp_path):
            assert Path.cwd() == tmp_path.resolve()
            assert sys.path[0] == str(tmp_path.resolve())
            raise KeyError

    before = Path.cwd()
    with pytest.raises(KeyError):
        fail_inside()
    assert Path.cwd() == before
