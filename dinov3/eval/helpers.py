"""Command line to configuration, and results to a file: what every evaluation's `main` needs.

Arguments are OmegaConf's dot-list: `train.ks=[1,5] output_dir=/out`. See `cli_parser` and `args_dict_to_dataclass`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dinov3 import distributed
from dinov3.eval.feature_files import are_feature_files
from dinov3.eval.probe import collective_timeout
from dinov3.eval.results import save_from_dict

logger = logging.getLogger("dinov3")

ConfigT = TypeVar("ConfigT")

_ALLOW_UNKNOWN_KEYS = "allow_unknown_keys"


def run_main(argv: Sequence[str] | None, launcher: Callable[[dict[str, Any]], Any], config_dataclass: type[Any]) -> int:
    """What `main(argv)` of every evaluation does: parse, set up the job, evaluate, clean up. Returns 0.

    With `--help` it shows how the script is called, and its keys with their defaults, instead.

    Args:
        argv: arguments without the program's name; None: those of this process.
        launcher: called with the parsed arguments inside the job (logging, process group, seeds).
        config_dataclass: the evaluation's configuration.
    """
    from dinov3.run.init import job_context

    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        usage = sys.modules[config_dataclass.__module__].__doc__
        keys = OmegaConf.to_yaml(OmegaConf.structured(config_dataclass))
        sys.stdout.write(f"{usage}\nKeys and defaults (??? must be given):\n\n{keys}")
        return 0
    eval_args = cli_parser(argv)
    with job_context(output_dir=eval_args["output_dir"], distributed_timeout=collective_timeout()):
        launcher(eval_args)
        if distributed.get_world_size() > 1:
            torch.distributed.barrier()  # the main process writes last; a job that follows must not meet it in this one
    return 0


def check_arguments_with(read: Callable[[dict[str, Any]], object], argv: Sequence[str], n_processes: int) -> None:
    """Refuse arguments that a script can't read: the launcher asks before it starts any process.

    Scripts offer it as `check_arguments = partial(check_arguments_with, <what reads the parsed arguments>)`.

    Raises:
        ValueError: unknown keys, missing or wrong values.
    """
    with as_value_errors():
        read(cli_parser(argv))


def check_eval_arguments(config_dataclass: type[Any], argv: Sequence[str], n_processes: int) -> None:
    """`check_arguments_with` what reads a configuration; scripts bind its class with `partial`."""
    read = partial(args_dict_to_dataclass, config_dataclass=config_dataclass, save_config=False)
    check_arguments_with(read, argv, n_processes)


@contextlib.contextmanager
def as_value_errors() -> Iterator[None]:
    """Turn the errors of OmegaConf, whatever their classes, into ValueErrors with the same text."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error


def cli_parser(argv: Sequence[str]) -> dict[str, Any]:
    """Nested dictionary of the arguments `a.b=value` (split at the first `=`, the value read as YAML).

    `output_dir` comes from `output_dir=`, else from `--output-dir=X` or `--output-dir X`, else it is `"."`.
    `--allow-unknown-keys` makes unknown keys a warning.

    Raises:
        ValueError: an argument of another form.
    """
    from_flag: str | None = None
    flags: dict[str, Any] = {}
    dot_list = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--output-dir":
            from_flag = next(rest, None)
            if from_flag is None:
                raise ValueError("--output-dir needs a folder after it")
        elif argument.startswith("--output-dir="):
            from_flag = argument.partition("=")[2]
        elif argument == "--allow-unknown-keys":
            flags[_ALLOW_UNKNOWN_KEYS] = True
        elif argument.startswith("-") or "=" not in argument:
            raise ValueError(
                f"got the argument {argument!r}, expected key=value (or --output-dir=, --allow-unknown-keys)"
            )
        else:
            dot_list.append(argument)
    parsed = OmegaConf.to_container(OmegaConf.from_cli(dot_list), resolve=True)
    assert isinstance(parsed, dict)
    return {"output_dir": from_flag or "."} | {str(key): value for key, value in parsed.items()} | flags


def with_config_alias(eval_args: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed arguments with `config=<YAML>` under its other name `config_file`.

    Raises:
        ValueError: both names are given.
    """
    values = dict(eval_args)
    if "config" in values:
        if "config_file" in values:
            raise ValueError("got config= and config_file=, which mean the same: give one")
        values["config_file"] = values.pop("config")
    return values


def args_dict_to_dataclass(
    eval_args: Mapping[str, Any], config_dataclass: type[ConfigT], save_config: bool = True
) -> tuple[ConfigT, str]:
    """The configuration object of the arguments, and the output directory.

    Args:
        eval_args: nested values. The reserved key `config_file` names a YAML file with values below these.
        config_dataclass: the configuration's class; `MISSING` marks what must be given.
        save_config: write `eval_config.yaml` into the output directory (main process only).

    Raises:
        ConfigKeyError: unknown key; the message names the nearest known one.
        MissingMandatoryValue, ValidationError: a required value is missing, or a value has the wrong type.
    """
    values = dict(eval_args)
    allow_unknown = bool(values.pop(_ALLOW_UNKNOWN_KEYS, False))
    config_file = values.pop("config_file", None)
    merged = OmegaConf.merge(OmegaConf.load(config_file) if config_file else {}, values)
    plain = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(plain, dict)
    if are_feature_files((plain.get("train") or {}).get("dataset")):
        plain.setdefault("model", {})  # the files say which model they are of
    _drop_unknown_keys(plain, config_dataclass, allow_unknown)
    _enum_names(plain, config_dataclass)
    config = OmegaConf.merge(OmegaConf.structured(config_dataclass), plain)
    result: ConfigT = OmegaConf.to_object(config)  # type: ignore[assignment]
    output_dir = str(values.get("output_dir") or "")
    if save_config and distributed.is_main_process():
        path = Path(output_dir or ".") / "eval_config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, path)
    return result, output_dir


def _drop_unknown_keys(values: dict[Any, Any], config_dataclass: type, allow: bool) -> None:
    known = dict(_leaves(config_dataclass))
    for path in list(_unknown_keys(values, config_dataclass)):
        name = ".".join(path)
        # The whole name first (`trian.ks`), then the last part anywhere (`batch_size` without its section).
        nearest = get_close_matches(name, known, n=1, cutoff=0.5) or [k for k in known if k.split(".")[-1] == path[-1]]
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known keys: {', '.join(known)}"
        if not allow:
            raise ConfigKeyError(f"unknown key {name!r} for {config_dataclass.__name__}{hint}")
        logger.warning("ignoring the unknown key %r%s", name, hint)
        _delete(values, path)


def _leaves(config_dataclass: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all keys."""
    for name, hint in get_type_hints(config_dataclass).items():
        if is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def _unknown_keys(
    values: Mapping[Any, Any], config_dataclass: type, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    hints = get_type_hints(config_dataclass)
    for key, value in values.items():
        if key not in hints:
            yield (*prefix, str(key))
        elif is_dataclass(hints[key]) and isinstance(value, Mapping):
            yield from _unknown_keys(value, hints[key], (*prefix, key))


def _delete(values: dict[Any, Any], path: Sequence[str]) -> None:
    for key in path[:-1]:
        values = values[key]
    del values[path[-1]]


def _enum_names(values: dict[Any, Any], config_dataclass: type) -> None:
    """Write members of enums by their names, as OmegaConf knows them; they may be given by value, in any case."""
    hints = get_type_hints(config_dataclass)
    for field in fields(config_dataclass):
        hint, value = hints[field.name], values.get(field.name)
        if is_dataclass(hint) and isinstance(value, dict):
            _enum_names(value, hint)  # type: ignore[arg-type]
            continue
        enums = [t for t in (hint, *get_args(hint)) if isinstance(t, type) and issubclass(t, Enum)]
        if enums and isinstance(value, str):
            values[field.name] = _enum_name(enums[0], value)
        elif enums and isinstance(value, list):
            values[field.name] = [_enum_name(enums[0], v) if isinstance(v, str) else v for v in value]


def _enum_name(enum: type[Enum], text: str) -> str:
    """The name of the member with this name or value; other texts in capitals, for OmegaConf to refuse."""
    by_value = {str(member.value).lower(): member.name for member in enum}
    return text.upper() if text.upper() in enum.__members__ else by_value.get(text.lower(), text.upper())


def write_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write a configuration object as YAML (main process only)."""
    if not distributed.is_main_process():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), path)


def write_results(results: Mapping[str, Any], output_dir: str | os.PathLike[str], filename: str) -> None:
    """Write the results as a table of one row, in the format of the file's extension (main process only)."""
    if not distributed.is_main_process():
        return
    path = Path(output_dir) / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    save_from_dict(results, path)
    logger.info("results written to %s", path)
