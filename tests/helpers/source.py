"""What the guard tests know of our source: the modules of a package, what each imports, and where."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        target: dotted name; for `from a import b` it is `a.b`.
        line: line number.
        at_import: run when the module is imported, not inside a function.
        typing_only: under `if TYPE_CHECKING:`.
    """

    target: str
    line: int
    at_import: bool
    typing_only: bool


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, of hubconf.py and every module of dinov3/."""
    paths = [ROOT / "hubconf.py", *sorted((ROOT / "dinov3").rglob("*.py"))]
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in paths if path.exists()}


def module_name(path: Path) -> str:
    """`dinov3/a/b.py` -> `dinov3.a.b`, `dinov3/a/__init__.py` -> `dinov3.a`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, tree: ast.Module) -> list[Import]:
    """Every import of a module. Relative ones are resolved (a package is recognised by `modules()`)."""
    is_package = (ROOT / Path(*name.split(".")) / "__init__.py").exists()
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool, typing_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                base = ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [base])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, at_import, typing_only) for alias in node.names)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not in_function, typing_only or (guarded and child is not node.test))

    visit(tree, at_import=True, typing_only=False)
    return found


def module_of(target: str) -> str | None:
    """The module of ours that a dotted name lies in: its longest prefix that is a module, or None."""
    parts = target.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules()), None)
