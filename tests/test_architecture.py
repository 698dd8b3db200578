"""The shape of the package, checked on its source: which room may import which, and what no file may contain.

The rooms and their levels are those of CONTRIBUTING.md. A module imports only lower levels or its own room.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.source import ROOT, Import, imports, module_of, modules

# The longest matching prefix decides. The parts of `eval` at level 4 are pure model code, which the hub uses too.
LEVELS = {
    "dinov3.utils": 0,
    "dinov3.env": 0,
    "dinov3.thirdparty": 0,
    "dinov3.distributed": 1,
    "dinov3.logging": 1,
    "dinov3.layers": 2,
    "dinov3.loss": 2,
    "dinov3.optim": 2,
    "dinov3.data": 2,
    "dinov3.models": 3,
    "dinov3.checkpointer": 3,
    "dinov3.fsdp": 3,
    "dinov3.configs": 3,
    "dinov3.run.init": 3,
    "dinov3.eval.segmentation.models": 4,
    "dinov3.eval.segmentation.config": 4,
    "dinov3.eval.depth.models": 4,
    "dinov3.eval.depth.config": 4,
    "dinov3.eval.depth.utils": 4,
    "dinov3.eval.detection.models": 4,
    "dinov3.eval.detection.config": 4,
    "dinov3.eval.detection.transforms": 4,
    "dinov3.eval.detection.util": 4,
    "dinov3.eval.text.text_transformer": 4,
    "dinov3.eval.text.text_tower": 4,
    "dinov3.eval.text.tower": 4,
    "dinov3.eval.text.vision_tower": 4,
    "dinov3.eval.text.dinotxt_model": 4,
    "dinov3.eval.text.tokenizer": 4,
    "dinov3.hub": 5,
    "hubconf": 5,
    "dinov3.train": 6,
    "dinov3.eval": 6,
    "dinov3.run": 7,
    "dinov3.__main__": 7,
}

# Arrows inside a level, beyond those within one room.
SAME_LEVEL = {
    ("dinov3.logging", "dinov3.distributed"),
    ("dinov3.models.build", "dinov3.checkpointer"),
    ("dinov3.models.build", "dinov3.configs"),
    ("dinov3.run.init", "dinov3.configs"),
    ("hubconf", "dinov3.hub"),
    ("dinov3.__main__", "dinov3.run"),
}

# Libraries with few doors: where a module may import them at its top, and where functions may too. Whatever a room
# imports at the top, all who import the room pay for; torchmetrics alone takes ten seconds.
DOORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "omegaconf": (("dinov3.configs", "dinov3.eval.config", "dinov3.eval.helpers"), ()),
    "torchvision": (
        ("dinov3.data", "dinov3.eval.segmentation.transforms", "dinov3.eval.depth.transforms", "dinov3.eval.detection"),
        ("dinov3.hub", "dinov3.eval", "dinov3.train", "dinov3.run", "dinov3.models.foreign"),
    ),
    "torchmetrics": ((), ("dinov3.eval",)),
    "sklearn": ((), ("dinov3.eval", "dinov3.run")),
    "pycocotools": ((), ("dinov3.eval",)),
    "matplotlib": ((), ("dinov3.eval", "dinov3.run")),
    "skimage": ((), ("dinov3.run",)),
    "submitit": (("dinov3.run",), ("dinov3.env", "dinov3.run")),
    "safetensors": ((), ("dinov3.checkpointer",)),
    "tensorboard": ((), ("dinov3.logging",)),
    "tqdm": ((), ("dinov3.logging",)),
    "termcolor": ((), ("dinov3.logging",)),
    "PIL": (
        ("dinov3.data", "dinov3.eval.segmentation.transforms", "dinov3.eval.depth.transforms", "dinov3.eval.detection"),
        ("dinov3.eval", "dinov3.run"),
    ),
    "timm": ((), ("dinov3.models.foreign",)),
    "transformers": ((), ()),
    "pandas": ((), ()),
}

# Import with torch alone: what `torch.hub` users get.
TORCH_ALONE = (
    "hubconf",
    "dinov3",
    "dinov3.utils",
    "dinov3.layers",
    "dinov3.models.vision_transformer",
    "dinov3.models.convnext",
    "dinov3.checkpointer.weights",
    "dinov3.hub.backbones",
)


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _level_and_room(module: str) -> tuple[int, str]:
    """Level, and room: the prefix of LEVELS, with the modules of one task counted as one room."""
    prefix = max((p for p in LEVELS if _within(module, p)), key=len, default=None)
    if prefix is None:
        return -1, module  # dinov3/__init__.py
    parts = prefix.split(".")
    return LEVELS[prefix], ".".join(parts[:3] if parts[:2] == ["dinov3", "eval"] else parts[:2])


def _our_imports() -> Iterator[tuple[str, Import, str]]:
    for name, tree in modules().items():
        for item in imports(name, tree):
            target = module_of(item.target)
            if target is not None:
                yield name, item, target


def _may_import(module: str, target: str) -> bool:
    level, room = _level_and_room(module)
    target_level, target_room = _level_and_room(target)
    if target_level == 4 and level == 4:
        return room == target_room
    if level == 4:
        return target_level in (-1, 0, 2, 3)
    return (
        target_level < level
        or (target_level == level and room == target_room)
        or any(_within(module, a) and _within(target, b) for a, b in SAME_LEVEL)
    )


def test_every_module_has_a_level() -> None:
    assert [name for name in modules() if name != "dinov3" and _level_and_room(name)[0] < 0] == []


def test_modules_import_lower_levels_only() -> None:
    wrong = [
        f"{module}:{i.line} imports {target}" for module, i, target in _our_imports() if not _may_import(module, target)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("dinov3.layers.block", "dinov3.utils.tensors", True),
        ("dinov3.layers.block", "dinov3.layers.attention", True),
        ("dinov3.layers.block", "dinov3.loss", False),
        ("dinov3.utils.info", "dinov3.layers", False),
        ("dinov3.logging", "dinov3.distributed", True),
        ("dinov3.distributed", "dinov3.logging", False),
        ("dinov3.models.build", "dinov3.configs", True),
        ("dinov3.models.features", "dinov3.configs", False),
        ("dinov3.train.loop", "dinov3.eval.knn", False),
        ("dinov3.eval.knn", "dinov3.train", False),
        ("dinov3.eval.depth.models.encoder", "dinov3.eval.segmentation.models", False),
        ("dinov3.eval.depth.models.encoder", "dinov3.distributed", False),
        ("dinov3.eval.depth.train", "dinov3.eval.depth.models", True),
        ("dinov3.hub.depthers", "dinov3.eval.depth.models", True),
        ("dinov3.hub.depthers", "dinov3.eval.depth.train", False),
        ("dinov3.run.init", "dinov3.configs", True),
        ("dinov3.train.train", "dinov3.run.init", True),
        ("dinov3.train.train", "dinov3.run.submit", False),
    ],
)
def test_the_rule_itself(module: str, target: str, allowed: bool) -> None:
    assert _may_import(module, target) is allowed


def test_no_module_is_imported_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, item, target in _our_imports():
        if not item.typing_only and target != module:
            graph.setdefault(module, set()).add(target)
    done: set[str] = set()

    def find(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph.get(module, ())):
            if circle := find(target, [*path, module]):
                return circle
        done.add(module)
        return None

    for module in sorted(graph):
        assert (circle := find(module, [])) is None, " -> ".join(circle)


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_few_doors(library: str) -> None:
    at_import, inside = DOORS[library]
    wrong = []
    for name, tree in modules().items():
        for item in imports(name, tree):
            if item.typing_only or not _within(item.target, library):
                continue
            doors = at_import if item.at_import else at_import + inside
            if not any(_within(name, door) for door in doors):
                wrong.append(f"{name}:{item.line} imports {library}{' at import' if item.at_import else ''}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "package", ["eval", *(f"eval.{task}" for task in ("segmentation", "depth", "detection", "text"))]
)
def test_importing_one_task_imports_no_other(package: str) -> None:
    tree = modules().get(f"dinov3.{package}", ast.parse(""))
    statements = [node for node in tree.body if not isinstance(node, ast.Expr)]  # a docstring may stand there
    assert not statements, f"dinov3/{package.replace('.', '/')}/__init__.py must stay empty"


# What no file may contain.


def _calls(node: ast.AST, attribute: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute


def _keyword(call: ast.AST, name: str) -> object:
    assert isinstance(call, ast.Call)
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def _prints(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "breakpoint")


def _hides_exceptions(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    wide = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
    return node.type is None or (wide and all(isinstance(s, ast.Pass | ast.Continue) for s in node.body))


def _loads_pickles(node: ast.AST) -> bool:
    is_torch_load = _calls(node, "load") and ast.unparse(node.func.value) == "torch"  # type: ignore[attr-defined]
    return is_torch_load and _keyword(node, "weights_only") is not True


def _unpickles(node: ast.AST) -> bool:
    """Ways to run code that is in a file. Those with a condition that a caller has to fulfil are in `UNPICKLING`."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    if name in ("pickle.loads", "pickle.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "marshal.loads"):
        return True
    return name in ("np.load", "numpy.load") and _keyword(node, "allow_pickle") is not False


def _half_loads(node: ast.AST) -> bool:
    return _calls(node, "load_state_dict") and (
        _keyword(node, "strict") is False or any(ast.unparse(a) == "False" for a in node.args[1:])  # type: ignore[attr-defined]
    )


def _names_a_device(node: ast.AST) -> bool:
    """A device chosen by a literal. Asking what a device is (`device.type == "cuda"`) is no choice."""
    if _calls(node, "cuda") and ast.unparse(node.func.value) != "torch":  # type: ignore[attr-defined]
        return True
    if not isinstance(node, ast.Call):
        return False
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return any(text.split(":")[0] in ("cuda", "mps", "xpu") for text in texts)


FORBIDDEN = {
    "print or breakpoint (use the logger `dinov3`)": (_prints, "print('x')"),
    "an exception swallowed": (_hides_exceptions, "try:\n    f()\nexcept:\n    g()"),
    "torch.load without weights_only=True": (_loads_pickles, "torch.load(path, weights_only=False)"),
    "a pickle or code of a file that runs": (_unpickles, "np.load(path)"),
    "load_state_dict(strict=False)": (_half_loads, "model.load_state_dict(state, strict=False)"),
    "a device literal (use dinov3.utils.device.default_device)": (_names_a_device, "torch.zeros(1, device='cuda:0')"),
}


# Functions whose caller has to say that the file may run code.
UNPICKLING = {"dinov3.eval.feature_files": "load_features_dict", "dinov3.eval.patches.foreground": "load"}


def _nodes_to_check(name: str, tree: ast.AST) -> Iterator[ast.AST]:
    skipped = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == UNPICKLING.get(name)
        for inner in ast.walk(function)
        if _unpickles(inner)
    }
    return (node for node in ast.walk(tree) if id(node) not in skipped)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains(what: str) -> None:
    is_wrong, example = FORBIDDEN[what]
    assert any(is_wrong(node) for node in ast.walk(ast.parse(example))), "the rule does not see its own example"
    wrong = [
        f"{name}:{node.lineno}"  # type: ignore[attr-defined]
        for name, tree in modules().items()
        if not _within(name, "dinov3.configs")
        for node in _nodes_to_check(name, tree)
        if is_wrong(node)
    ]
    assert not wrong, f"{what}: {wrong}"


# What imports bring with them, asked in a new process.

_BLOCK_OTHERS = """
import sys
own = {"torch", "torchgen", "functorch", "dinov3", "hubconf", "triton", "nvidia", "cuda"}
# What torch itself requires.
own |= {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "setuptools"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in own and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_backbones_need_torch_alone() -> None:
    """Import the hub's part of the package, then build and run a ViT and a ConvNeXt, with everything else blocked."""
    code = _BLOCK_OTHERS + "\n".join(f"import {name}" for name in TORCH_ALONE)
    code += """
import torch
vit = hubconf.dinov3_vits16(pretrained=False, depth=1).eval()
convnext = hubconf.dinov3_convnext_tiny(pretrained=False, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]).eval()
with torch.inference_mode():
    print(tuple(vit(torch.zeros(1, 3, 32, 32)).shape), tuple(convnext(torch.zeros(1, 3, 64, 64)).shape))
try:
    import numpy
except ModuleNotFoundError:
    print("numpy blocked")
"""
    assert _python(code).split("\n")[:2] == ["(1, 384) (1, 8)", "numpy blocked"]


def test_hubconf_loads_torch_and_nothing_else() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import hubconf
print(*sorted(set(sys.modules) - before))
"""
    new = _python(code).split()
    assert "hubconf" in new
    others = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"dinov3", "hubconf", "torch"}
    assert not others
    rooms = {_level_and_room(name)[1] for name in new if name.startswith("dinov3.")}
    assert rooms <= {"dinov3.hub", "dinov3.utils", "dinov3.layers", "dinov3.models", "dinov3.checkpointer"}
