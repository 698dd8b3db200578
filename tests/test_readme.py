"""The README keeps its word: snippets run as printed, commands parse, the map shows every room, links exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov3.data.photos import bundled_file
from dinov3.run import cli
from tests.helpers import tiny_depther, tiny_detector, tiny_segmentor
from tests.helpers.source import ROOT
from tests.helpers.tiny_dinotxt import small_hub
from tests.test_packaging import EXTRAS

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    """Every command of the shell blocks, split into words, comments left out."""
    lines = "\n".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = _commands()
# The hub's entries on ViT-7B/16, and what registers a tiny backbone under that name.
TINY = {
    "dinov3_vit7b16_ms": tiny_segmentor,
    "dinov3_vit7b16_dd": tiny_depther,
    "dinov3_vit7b16_de": tiny_detector,
}
SNIPPETS = _blocks("python")


def _entry(code: str) -> str:
    """The name of the hub that a snippet loads."""
    return re.findall(r"dinov3_\w+", code)[0]


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Meta releases it, of a ViT-S/16 with random weights."""
    import hubconf

    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(hubconf.dinov3_vits16(pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def user_folder(tmp_path: Path, weight_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader who has the repository, a backbone and a photograph where the README says."""
    photograph = bundled_file("skimage", "data/astronaut.png")
    assert photograph is not None
    (tmp_path / "path/to").mkdir(parents=True)
    for name, target in (("path/to/dinov3", ROOT), ("path/to/weights.pth", weight_file), ("photo.jpg", photograph)):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run_as_printed(code: str) -> None:
    """Execute a snippet with nothing replaced but the device; shapes that its comments promise must be printed."""
    printed: list[object] = []
    scope: dict[str, object] = {"print": lambda *values: printed.extend(values)}
    exec(compile(code.replace('device = "cuda"', 'device = "cpu"'), "README.md", "exec"), scope)
    promised = [
        tuple(map(int, shape.split(","))) for shape in re.findall(r"print\(.*\[([\d, ]+)\]$", code, re.MULTILINE)
    ]
    assert [tuple(value) for value in printed if isinstance(value, torch.Size)] == promised
    for picture in re.findall(r'savefig\("(.*)"\)', code):
        with Image.open(picture) as drawn:
            assert min(drawn.size) > 100


@pytest.mark.parametrize("code", SNIPPETS, ids=_entry)
def test_python_snippets_run_as_printed(code: str, user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are narrow here; `test_snippets_run_with_heads_of_the_released_size` has them in full."""
    if "dinotxt" in code:
        files, _ = small_hub(monkeypatch, user_folder / "hub")
        (user_folder / "path/to/dinotxt.pth").symlink_to(files.weights)
        (user_folder / "path/to/vitl16.pth").symlink_to(files.backbone_weights)
    if _entry(code) in TINY:
        released = TINY[_entry(code)].small_hub(monkeypatch, user_folder)
        (user_folder / "path/to/head.pth").symlink_to(released.head)
        (user_folder / "path/to/7b.pth").symlink_to(released.backbone)
    _run_as_printed(code)


@pytest.mark.slow  # minutes, 6 GB of memory, 3 GB of disk
@pytest.mark.parametrize("entry", ["dinov3_vit7b16_ms", "dinov3_vit7b16_dd"])
def test_snippets_run_with_heads_of_the_released_size(
    entry: str, user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three substitutions: a tiny backbone, a bundled photograph, the device."""
    (code,) = (code for code in SNIPPETS if _entry(code) == entry)
    released = TINY[entry].small_hub(monkeypatch, user_folder, narrow=False)
    (user_folder / "path/to/head.pth").symlink_to(released.head)
    (user_folder / "path/to/7b.pth").symlink_to(released.backbone)
    try:
        _run_as_printed(code)
    finally:
        released.head.unlink()  # pytest keeps the folder, which should not hold gigabytes


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_name_what_exists(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extras = re.findall(r"\.\[([\w,]+)\]", " ".join(rest))
        assert extras
        assert set(extras[0].split(",")) <= set(EXTRAS)
    elif program == "dinov3":
        assert rest[0] in cli.COMMANDS
    else:
        assert program in ("python", "torchrun"), f"no check for the program {program}"
        script = _script(rest)
        assert script is not None, f"no script of ours in {rest}"
        for word in rest:
            path = word.partition("=")[2] or word
            if path.endswith((".yaml", ".py")) and path.startswith("dinov3/"):
                assert (ROOT / path).is_file(), path


def _script(words: list[str]) -> Path | None:
    """The file that a Python command line runs: `dinov3/x/y.py`, or `-m dinov3.x.y`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-m":
            return ROOT / Path(*following.split(".")).with_suffix(".py")
        if word.endswith(".py"):
            return ROOT / word
    return None


def _arguments(script: str) -> list[list[str]]:
    """What the README gives to a script, one list per command, without what the launcher takes for itself."""
    from dinov3.run.submit import get_run_parser

    given = []
    for words in COMMANDS:
        if script in words:
            argv = words[words.index(script) + 1 :]
            if "dinov3.run.submit" in words:
                launcher, argv = get_run_parser().parse_known_args([script, *argv])
                argv = [f"--output-dir={launcher.output_dir}", *argv] if launcher.output_dir else argv
            given.append(argv)
    return given


@pytest.mark.parametrize("argv", _arguments("dinov3/train/train.py"), ids=" ".join)
def test_training_commands_parse_and_know_every_key(argv: list[str], tmp_path: Path) -> None:
    from dinov3.configs import get_cfg_from_args
    from dinov3.train.train import parse_args

    args = parse_args(argv)
    args.output_dir = str(tmp_path)
    args.config_file = str(ROOT / args.config_file)
    cfg = get_cfg_from_args(args, multidistillation=args.multi_distillation, strict=not args.multi_distillation)
    for override in args.opts:
        key, _, value = override.partition("=")
        assert str(OmegaConf.select(cfg, key)) == value


@pytest.mark.parametrize(
    ("script", "config_class"),
    [("knn", "KnnEvalConfig"), ("linear", "LinearEvalConfig"), ("log_regression", "LogregEvalConfig")],
)
def test_evaluation_commands_parse_and_know_every_key(script: str, config_class: str, tmp_path: Path) -> None:
    from dinov3.eval.helpers import args_dict_to_dataclass, cli_parser

    commands = _arguments(f"dinov3/eval/{script}.py")
    assert commands
    for argv in commands:
        arguments = {**cli_parser(argv), "output_dir": str(tmp_path)}
        schema = getattr(import_module(f"dinov3.eval.{script}"), config_class)
        config, _ = args_dict_to_dataclass(arguments, schema, save_config=False)
        assert config.train.dataset.startswith("ImageNet:split=TRAIN")


@pytest.mark.parametrize("script", ["train_dinotxt", "classification", "retrieval", "segmentation"])
def test_text_commands_parse_and_know_every_key(script: str) -> None:
    commands = _arguments(f"dinov3/eval/text/{script}.py")
    assert commands
    for argv in commands:
        import_module(f"dinov3.eval.text.{script}").check_arguments(argv, 1)


def test_segmentation_commands_know_every_key() -> None:
    from dinov3.eval.segmentation.run import check_arguments

    commands = _arguments("dinov3/eval/segmentation/run.py")
    assert commands
    for argv in commands:
        check_arguments(argv, 1)


def test_detection_commands_know_every_key() -> None:
    from dinov3.eval.detection.run import check_arguments

    commands = _arguments("dinov3/eval/detection/run.py")
    assert commands
    for argv in commands:
        check_arguments(argv, 1)


def test_the_map_shows_every_room() -> None:
    (tree,) = (block for block in _blocks("text") if "hubconf.py" in block)
    shown = re.findall(r"^ *(?:\d )?([\w<>/.]+)", tree, re.MULTILINE)
    rooms = {path.name + "/" for path in (ROOT / "dinov3").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(shown), rooms - set(shown)
    for name in shown:
        below = name.replace("<task>/", "*/")
        assert list(ROOT.glob(below)) or list((ROOT / "dinov3").glob(below)), f"{name} is on the map but not there"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
