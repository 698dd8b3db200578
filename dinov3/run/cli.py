"""The command `dinov3`: every task under one name, thin calls to the scripts.

dinov3                    lists the commands
dinov3 <command> --help   shows how it is used
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from dinov3.run import api


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: one line for the list.
        run: called with the arguments behind the command's name.
        usage: for `--help`; empty where the script that is called has a `--help` of its own.
    """

    summary: str
    run: Callable[[Sequence[str]], object]
    usage: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for arguments that don't fit."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"dinov3: no command {name!r}\n\n{_overview()}")
        return 2
    command = COMMANDS[name]
    if command.usage and (not arguments or {"-h", "--help"} & set(arguments)):
        sys.stdout.write(f"{command.summary}\n\n{command.usage}")
        return 0
    try:
        command.run(arguments)
    except Exception as error:
        if not _says_what_to_change(error):
            raise
        sys.stderr.write(f"dinov3 {name}: {error}\n")
        return 2
    return 0


def _says_what_to_change(error: Exception) -> bool:
    """Whether an error is about the arguments, unknown keys of configurations included, and needs no traceback."""
    return isinstance(error, ValueError | FileNotFoundError) or type(error).__module__.startswith("omegaconf.")


def call(function: Callable[..., object], arguments: Sequence[str], *positional: str) -> object:
    """Call one of `api` with the `key=value` that it knows; the others become `overrides`.

    Raises:
        ValueError: an argument of another form, or a required one that is missing.
    """
    parameters = inspect.signature(function).parameters
    known: dict[str, object] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"got {argument!r}, expected key=value")
        if key in parameters and key != "overrides":
            known[key] = value
        else:
            overrides.append(argument)
    required = [name for name, one in parameters.items() if one.default is inspect.Parameter.empty]
    missing = [f"{name}=" for name in required[len(positional) :] if name not in known]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given; see --help")
    return function(*positional, **known, overrides=overrides)


def _evaluate(arguments: Sequence[str]) -> object:
    kind, *rest = arguments
    return call(api.evaluate, rest, kind)


def _predict(arguments: Sequence[str]) -> object:
    task, *rest = arguments
    if task not in api.TASKS:
        raise ValueError(f"the task is one of {', '.join(api.TASKS)}; got {task!r}")
    return import_module(f"dinov3.eval.{task}.predict").main(rest)


def _script(module: str) -> Callable[[Sequence[str]], object]:
    return lambda arguments: import_module(module).main(list(arguments))


_PRETRAIN = """dinov3 pretrain data=DIR out=RUN [model=ARCH] [weights=WEIGHTS] [recipe=NAME] [key=value ...]

  data      folder of images (any sub-folders), or a dataset string
  out       output folder; the same command again goes on where it was
  model     architecture, such as vit_small; default: that of the recipe
  weights   go on from these: a hub name, a file, a Hugging Face folder, a teacher checkpoint
  recipe    file of dinov3/configs/train, without .yaml, or a path; default: for this machine
  key=value any key of the configuration

examples:
  dinov3 pretrain data=photos out=runs/mine
  dinov3 pretrain data=photos out=runs/mine recipe=vitb16_image_folder optim.epochs=50
  dinov3 pretrain data=photos out=runs/mine weights=dinov3_vits16_pretrain_lvd1689m.pth
"""
_EVAL = """dinov3 eval knn|linear|log_regression data=DIR run=RUN [out=DIR] [key=value ...]
dinov3 eval knn|linear|log_regression data=DIR model=HUB_NAME [weights=FILE] [out=DIR] [key=value ...]

  data      folder with train and val (or test), each with one folder of images per class
  run       output folder of a training
  model     instead: a hub model; weights: its file, default: the released ones
  out       where results go; default: RUN/eval_KIND
  key=value any key of the evaluation's configuration

examples:
  dinov3 eval knn data=labelled run=runs/mine
  dinov3 eval linear data=labelled model=dinov3_vits16 weights=vits16.pth out=results train.epochs=2
"""
_FINETUNE = """dinov3 finetune data=DIR out=RUN run=RUN|model=HUB_NAME [weights=FILE] [key=value ...]

  data      folder with train and val (or test), each with one folder of images per class
  out       output folder: backbone.pth, classifier.pth, results-finetune.csv
  run       output folder of the training whose backbone is tuned
  model     instead: a hub model; weights: its file, default: the released ones
  key=value any key of dinov3/eval/finetune.py

examples:
  dinov3 finetune data=labelled out=runs/tuned run=runs/mine
  dinov3 finetune data=labelled out=runs/tuned model=dinov3_vits16 weights=vits16.pth method=lora
"""
_PREDICT = """dinov3 predict segmentation|depth|detection --head HEAD --images IMAGE... --output-dir OUT

examples:
  dinov3 predict segmentation --head runs/segmentation --images photos --output-dir out
  dinov3 predict depth --help
"""

COMMANDS: dict[str, Command] = {
    "pretrain": Command(
        "Pretrain a backbone on a folder of images.", lambda arguments: call(api.pretrain, arguments), _PRETRAIN
    ),
    "eval": Command("Evaluate frozen features: knn, linear, log_regression.", _evaluate, _EVAL),
    "finetune": Command(
        "Fine-tune a backbone on labelled images.", lambda arguments: call(api.finetune, arguments), _FINETUNE
    ),
    "predict": Command("Predict images with a trained head: segmentation, depth, detection.", _predict, _PREDICT),
    "export": Command(
        "Write a backbone for Hugging Face, timm and others; it or a head's model as ONNX.",
        _script("dinov3.run.export"),
    ),
    "features": Command("Write the features of a folder of images to files.", _script("dinov3.eval.features")),
    "explore": Command("Write a page in which patch features can be pointed at.", _script("dinov3.run.explore")),
    "quickstart": Command("Pretrain, evaluate, explain a small backbone in minutes.", _script("dinov3.run.quickstart")),
    "submit": Command("Start any script on all accelerators here, or on SLURM.", _script("dinov3.run.submit")),
}


def _overview() -> str:
    lines = [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    return "dinov3 <command> [arguments]; dinov3 <command> --help tells more.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
