"""Loading a callable from the path of a script, for the launcher."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def load_custom_callable(module_path: str | Path, callable_name: str) -> Callable[..., Any]:
    """The attribute `callable_name` of the Python file at `module_path`.

    A file of an importable package is imported under its dotted name, any other under its stem, or under a name of its
    own when a module from elsewhere has that stem: nothing that was imported before is replaced. During the import the
    folder of a lone file comes first on `sys.path`.

    Raises:
        FileNotFoundError: no such file.
        AttributeError: the module has no such attribute.
    """
    path = Path(module_path).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no Python file at {path}")
    module = _import_file(path)
    if not hasattr(module, callable_name):
        raise AttributeError(f"{path} defines no {callable_name!r}")
    loaded: Callable[..., Any] = getattr(module, callable_name)
    return loaded


@contextlib.contextmanager
def change_working_dir_and_pythonpath(new_dir: str | Path) -> Iterator[None]:
    """Work in `new_dir`, with it first on `sys.path`; both are restored afterwards, also after an error."""
    old_dir, new_dir = Path.cwd(), Path(new_dir).expanduser().resolve()
    os.chdir(new_dir)
    try:
        with _first_on_path(new_dir):
            yield
    finally:
        os.chdir(old_dir)


def _import_file(path: Path) -> ModuleType:
    dotted = _package_name(path)
    if dotted is not None:
        return importlib.import_module(dotted)
    name = path.stem
    if name in sys.modules and not _is_from(sys.modules[name], path):
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before running it: dataclasses and pickle look a class's module up here
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _package_name(path: Path) -> str | None:
    """Dotted name of a file inside a package, if importing that name gives this file."""
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) == 1:
        return None
    try:
        spec = importlib.util.find_spec(".".join(parts))
    except ImportError:
        return None
    return ".".join(parts) if spec and spec.origin and Path(spec.origin).resolve() == path else None


def _is_from(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code in between may have taken it out itself
            sys.path.remove(str(folder))
