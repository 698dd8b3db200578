"""The short way: whole tasks as Python functions and, through `cli.py`, as commands.

    import dinov3
    dinov3.pretrain(data="images", out="runs/mine")
    dinov3.evaluate("knn", run="runs/mine", data="labelled")
    dinov3.export("runs/mine", format="hf")

Each calls the script of that name with the same overrides; nothing is decided here but which arguments it gets.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dinov3.data.registry import as_dataset_str as as_dataset

EVALUATIONS = ("knn", "linear", "log_regression")
TASKS = ("segmentation", "depth", "detection")
_TEST_KEYS = {"knn": "eval.test_dataset", "linear": "train.val_dataset", "log_regression": "eval.test_dataset"}


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    weights: str | Path | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Pretrain a backbone on images; started again, it goes on where it was.

    Args:
        data: folder of images, or a dataset string.
        out: output folder.
        model: architecture, such as `vit_small`; default: that of the recipe.
        weights: go on from these: a hub name, a file, a Hugging Face folder, a teacher checkpoint.
        recipe: name of a file of `dinov3/configs/train`, or a path. Default: `continue_vits16` with weights, else
            `vits16_image_folder` with an accelerator, else `quickstart`: minutes on a CPU.
        overrides: further `key=value` of the configuration.

    Returns:
        The newest export, `<out>/teacher_checkpoint.pth`.

    Raises:
        FileNotFoundError: no such recipe or images.
        ValueError: a wrong setting.
    """
    from dinov3.train.train import main

    if recipe is None:
        recipe = "continue_vits16" if weights else _default_recipe()
    settings = [f"train.dataset_path={as_dataset(data)}"]
    settings += [f"student.arch={model}"] if model else []
    settings += [f"student.pretrained_weights={weights}"] if weights else []
    main(["--config-file", str(find_recipe(recipe)), "--output-dir", str(out), *settings, *overrides])
    return Path(out, "teacher_checkpoint.pth")


def evaluate(
    kind: str,
    *,
    data: str | Path,
    run: str | Path | None = None,
    model: str | None = None,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Evaluate frozen features of a training, or of a hub model.

    Args:
        kind: `knn`, `linear` or `log_regression`.
        data: folder with `train` and `val` (or `test`), each with one folder per class.
        run: output folder of a training.
        model: instead: name of a hub model.
        weights: of that model; default: the released ones.
        out: where results are written; default: `<run>/eval_<kind>`.
        overrides: further `key=value` of the evaluation's configuration.

    Returns:
        The folder of the results.

    Raises:
        FileNotFoundError: a folder that isn't there.
        ValueError: an unknown evaluation, neither or both of `run` and `model`.
    """
    from importlib import import_module

    if kind not in EVALUATIONS:
        raise ValueError(f"the evaluation is one of {', '.join(EVALUATIONS)}; got {kind!r}")
    settings = _model_settings(run, model, weights)
    if out is None:
        out = Path(run or ".", f"eval_{kind}")
    train, test = labelled_splits(data)
    settings += [f"train.dataset={as_dataset(train)}", f"{_TEST_KEYS[kind]}={as_dataset(test)}", f"output_dir={out}"]
    import_module(f"dinov3.eval.{kind}").main([*settings, *overrides])
    return Path(out)


def finetune(
    data: str | Path,
    out: str | Path,
    *,
    run: str | Path | None = None,
    model: str | None = None,
    weights: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Fine-tune a backbone on labelled images; started again, it goes on where it was.

    Args:
        data: folder with `train` and `val` (or `test`), each with one folder per class.
        out: output folder.
        run: output folder of the training whose backbone is tuned.
        model: instead: name of a hub model.
        weights: of that model; default: the released ones.
        overrides: further `key=value`, such as `method=lora`; see `dinov3/eval/finetune.py`.

    Returns:
        The tuned backbone, `<out>/backbone.pth`.

    Raises:
        FileNotFoundError: a folder that isn't there.
        ValueError: neither or both of `run` and `model`.
    """
    from dinov3.eval.finetune import main

    train, val = labelled_splits(data)
    datasets = [f"train.dataset={as_dataset(train)}", f"train.val_dataset={as_dataset(val)}"]
    main([*_model_settings(run, model, weights), *datasets, f"output_dir={out}", *overrides])
    return Path(out, "backbone.pth")


def export(source: str | Path, destination: str | Path | None = None, format: str = "meta", **options: Any) -> Path:
    """Write a backbone in another layout, or it or the model of a head file as a graph.

    Args:
        source: output folder of a training, or any weight or head file.
        destination: file, or folder for `hf`; default: beside the source.
        format: `meta`, `hf`, `timm`, `onnx` or `pt2`.
        options: further options of `python -m dinov3.run.export`, such as `half=True` or `backbone_weights`.

    Returns:
        The path written.
    """
    from dinov3.run.export import export as run_export

    return run_export(str(source), None if destination is None else str(destination), format, **options)


def predict(task: str, *, head: str | Path, images: Sequence[str | Path], out: str | Path, **options: Any) -> Path:
    """Predict images with a trained head.

    Args:
        task: `segmentation`, `depth` or `detection`.
        head: head file, or the output folder of the training that wrote it.
        images: files and folders.
        out: folder for the results.
        options: further options of `python -m dinov3.eval.<task>.predict`, such as `backbone_weights`.

    Returns:
        The folder of the results.
    """
    from importlib import import_module

    if task not in TASKS:
        raise ValueError(f"the task is one of {', '.join(TASKS)}; got {task!r}")
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["--head", str(head), "--images", *map(str, images), "--output-dir", str(out), *flags]
    import_module(f"dinov3.eval.{task}.predict").main(arguments)
    return Path(out)


def _model_settings(run: str | Path | None, model: str | None, weights: str | Path | None) -> list[str]:
    """Overrides that name the model of an evaluation."""
    if (run is None) == (model is None):
        raise ValueError("give either run=<output folder of a training> or model=<hub name>")
    if run is not None:
        return [f"model.config_file={run}/config.yaml", f"model.pretrained_weights={run}/teacher_checkpoint.pth"]
    return [f"model.dino_hub={model}"] + ([f"model.pretrained_weights={weights}"] if weights else [])


def labelled_splits(data: str | Path) -> tuple[Path, Path]:
    """The folders of the training and of the test images below a folder.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    root = Path(data).expanduser()
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise FileNotFoundError(
            f"data={data} needs the folders train and val (or test), each with one folder of images per class. For "
            "data sets of another kind call the evaluation's script with dataset strings (docs/evaluation.md)"
        )
    return root / "train", tests[0]


def find_recipe(name: str) -> Path:
    """The configuration file of a recipe, by name or path.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(str(files("dinov3.configs").joinpath("train")))
    for path in (Path(name).expanduser(), folder / f"{name}.yaml", folder / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")))
    raise FileNotFoundError(f"recipe={name} is no file; the recipes are {known}")


def _default_recipe() -> str:
    return "vits16_image_folder" if torch.accelerator.is_available() else "quickstart"
