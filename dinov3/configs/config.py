"""From files and overrides to the configuration of a run, and the set-up of the job around it.

A configuration is the defaults, overlaid by a file, overlaid by `key=value` overrides: mappings are merged, everything
else (lists too) is replaced.
"""

import copy
import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

import dinov3
from dinov3 import distributed
from dinov3.configs import schema
from dinov3.configs.legacy import LEGACY_DEFAULTS, LEGACY_KEYS, add_legacy_defaults, flatten, is_legacy
from dinov3.configs.multidistillation import DistillationPlan, StudentPlan
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.logging.setup import configured_loggers
from dinov3.optim import lr_scale
from dinov3.utils import fix_random_seeds, get_conda_env, get_sha
from dinov3.utils.files import atomically

logger = logging.getLogger("dinov3")


class UnknownConfigKeyError(ConfigKeyError, ValueError):
    """A configuration has a key that neither the schema nor the legacy table knows."""


@dataclass
class DinoV3SetupArgs:
    """What `get_cfg_from_args` and `setup_config` read, for callers without a command line.

    Attributes:
        config_file: YAML file over the defaults; empty: the defaults alone.
        pretrained_weights: weights that an evaluation loads.
        shard_unsharded_model: accepted for compatibility.
        output_dir: folder of the run; empty or None: none, and no `config.yaml` is written.
        opts: `key=value` overrides.
        allow_unknown_keys: warn of unknown keys instead of refusing them.
    """

    config_file: str
    pretrained_weights: str | None = None
    shard_unsharded_model: bool = False
    output_dir: str = ""
    opts: list[Any] = field(default_factory=list)
    allow_unknown_keys: bool = False

    def __post_init__(self) -> None:
        # Given through OmegaConf (evaluations), the overrides arrive as its own list type.
        opts: Any = self.opts
        if isinstance(opts, ListConfig):
            self.opts = list(opts)


# -- Files and overrides ----------------------------------------------------------------------------------------------


def get_default_config() -> DictConfig:
    """The defaults of the schema, legacy keys included."""
    return OmegaConf.create(add_legacy_defaults(schema.default_values()))


def get_cfg_from_args(args: Any, multidistillation: bool = False, strict: bool = True) -> DictConfig:
    """The configuration that arguments ask for: defaults, `args.config_file`, overrides, each over the one before.

    Args:
        args: has `config_file`, `opts`, `output_dir` (if given, it becomes `train.output_dir`, whatever the overrides
            say) and perhaps `allow_unknown_keys`; see `DinoV3SetupArgs`.
        multidistillation: leave out the defaults.
        strict: refuse unknown keys even if `args.allow_unknown_keys`.

    Raises:
        FileNotFoundError: no such file.
        UnknownConfigKeyError: an unknown key (also a `ConfigKeyError` and a `ValueError`).
        ValueError: the file isn't a YAML mapping, or an override isn't of the form `key=value`.
    """
    layers = [] if multidistillation else [get_default_config()]
    layers += _user_layers(args, allow_unknown_keys=_allows_unknown_keys(args) and not strict)
    return _with_output_dir(_merge(layers), args.output_dir)


def load_teacher_config(path: str | os.PathLike[str]) -> DictConfig:
    """The defaults overlaid by a file; what doesn't concern a teacher's networks may be unknown."""
    return _merge([get_default_config(), _load_file(path, allow_unknown_keys=True)])


def setup_config(
    args: Any, strict_cfg: bool = True, *, check: Callable[[DictConfig], None] | None = None
) -> DictConfig:
    """`get_cfg_from_args`, saved as `config.yaml` in the output folder, then with the learning rate scaled.

    The file holds the rate before scaling: it can be given as `--config-file` again. What `check` refuses is not saved:
    the file in the folder goes on describing the training that is there.
    """
    cfg = get_cfg_from_args(args, strict=strict_cfg)
    logger.info("arguments: %s", _one_per_line(vars(args)))
    if check is not None:
        check(cfg)
    if args.output_dir and distributed.is_subgroup_main_process():
        write_config(cfg, args.output_dir)
    return apply_scaling_rules_to_cfg(cfg)


def write_config(cfg: Any, output_dir: str | os.PathLike[str], name: str = "config.yaml") -> str:
    """Log a configuration (or dataclass) and save it as a YAML file; returns the file's absolute path."""
    logger.info("configuration:\n%s", OmegaConf.to_yaml(cfg))
    path = Path(output_dir, name).resolve()
    with atomically(path) as file:
        OmegaConf.save(config=cfg, f=file)
    return str(path)


def apply_scaling_rules_to_cfg(cfg: DictConfig) -> DictConfig:
    """Scale `optim.lr` in place for the global batch, by `optim.scaling_rule`; returns `cfg`.

    Configurations with a section `schedules` stay as they are: their rates are scaled when the schedule is built.

    Raises:
        ValueError: `optim.lr` is null without a section `schedules`.
    """
    if "schedules" in cfg:
        return cfg
    if cfg.optim.lr is None:
        raise ValueError("optim.lr is null and there is no section `schedules`: set one of the two")
    old, batch_size = cfg.optim.lr, cfg.train.batch_size_per_gpu * distributed.get_world_size()
    cfg.optim.lr = old * lr_scale(cfg.optim.scaling_rule, batch_size)
    logger.info("learning rate %g becomes %g (%s, batch %d)", old, cfg.optim.lr, cfg.optim.scaling_rule, batch_size)
    return cfg


def flat_config(cfg: DictConfig) -> dict[str, Any]:
    """Dotted keys and plain values of a configuration; lists are values."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {key: value for name, section in plain.items() for key, value in flatten(str(name), section).items()}


def _user_layers(args: Any, *, allow_unknown_keys: bool) -> list[DictConfig]:
    """The file and the overrides of `args`, checked for unknown keys."""
    layers = []
    if args.config_file:
        layers.append(_load_file(args.config_file, allow_unknown_keys=allow_unknown_keys))
    overrides = [str(option) for option in args.opts or []]
    if malformed := [option for option in overrides if "=" not in option]:
        raise ValueError(f"overrides must have the form key=value, got {' '.join(malformed)}")
    layers.append(_from_overrides(overrides))
    _check_keys(layers[-1], "the overrides", allow_unknown_keys=allow_unknown_keys)
    return layers


def _from_overrides(overrides: list[str]) -> DictConfig:
    for some in (*([option] for option in overrides), overrides):
        try:
            config = OmegaConf.from_cli(some)
        except Exception as error:  # parsers have error classes of their own
            raise ValueError(f"the override {' '.join(some)!r} can't be read: {error}") from error
    return config if overrides else OmegaConf.from_cli([])


def _load_file(path: str | os.PathLike[str], *, allow_unknown_keys: bool) -> DictConfig:
    config = _read_yaml(path)
    _check_keys(config, str(path), allow_unknown_keys=allow_unknown_keys)
    return config


def _read_yaml(path: str | os.PathLike[str]) -> DictConfig:
    found = find_config_file(path)
    try:
        config = OmegaConf.load(found)
    except Exception as error:  # parsers have error classes of their own
        raise ValueError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} holds a list, expected a mapping of sections")
    return config


def load_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a YAML file of any schema; `path` as in `find_config_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no mapping.
    """
    plain = OmegaConf.to_container(_read_yaml(path), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def find_config_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or, for `dinov3/...`, the one that is installed with the package.

    Raises:
        FileNotFoundError: there is neither.
    """
    candidates = [Path(path).expanduser()]
    if Path(path).parts[:1] == ("dinov3",):
        candidates.append(Path(dinov3.__file__).parent.joinpath(*Path(path).parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no configuration file {path} (working directory: {os.getcwd()})")


def _merge(layers: Iterable[DictConfig]) -> DictConfig:
    try:
        merged = OmegaConf.merge(*layers)
    except Exception as error:  # such as a value where a section stands; merging has error classes of its own
        raise ValueError(f"the configuration can't be put together: {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _with_output_dir(cfg: DictConfig, output_dir: str | None) -> DictConfig:
    # Not as an override: a path may hold characters that mean something in YAML.
    if output_dir:
        OmegaConf.update(cfg, "train.output_dir", os.path.realpath(output_dir))
    return cfg


def _check_keys(config: DictConfig, origin: str, *, allow_unknown_keys: bool) -> None:
    """Refuse unknown keys, and say which ones have no effect."""
    plain: Any = OmegaConf.to_container(config)
    extra = {k: v for key, value in schema.unknown_keys(plain) for k, v in flatten(key, value).items()}
    unknown = [key for key in extra if not is_legacy(key)]
    if unknown:
        message = f"unknown configuration keys in {origin}: {', '.join(map(_with_nearest, unknown))}"
        if not allow_unknown_keys:
            raise UnknownConfigKeyError(f"{message}. Correct them, or go on with --allow-unknown-keys")
        logger.warning("%s; nothing reads them", message)
    idle = [key for key, value in extra.items() if is_legacy(key) and value != LEGACY_DEFAULTS.get(key, "")]
    if idle:
        logger.info("keys in %s that nothing reads (accepted for old files): %s", origin, ", ".join(idle))


def _with_nearest(key: str) -> str:
    known = [*schema.known_keys(), *LEGACY_DEFAULTS, *LEGACY_KEYS]
    same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.7) or same_name[:1]
    nearest = nearest or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{key} (did you mean {nearest[0]}?)"


def _allows_unknown_keys(args: Any) -> bool:
    return bool(getattr(args, "allow_unknown_keys", False))


def _one_per_line(values: dict[str, Any]) -> str:
    return "".join(f"\n  {name}: {value}" for name, value in sorted(values.items()))


# -- Jobs -------------------------------------------------------------------------------------------------------------


def setup_job(
    output_dir: str | os.PathLike[str] | None = None,
    distributed_enabled: bool = True,
    logging_enabled: bool = True,
    seed: int | None = 0,
    restrict_print_to_main_process: bool = True,
    distributed_timeout: timedelta | None = None,
) -> None:
    """Prepare this process for a job: output folder, log, process group, seeds; `exit_job` undoes it.

    Args:
        output_dir: made if needed; receives `logs/log.txt`.
        distributed_enabled: initialise the process group (also in a job of one process).
        logging_enabled: set up the log.
        seed: processes are seeded with `seed + rank`; None: not at all.
        restrict_print_to_main_process: silence `print` on ranks above 0.
        distributed_timeout: of collectives; torch's default if None.

    Raises:
        OSError: the output folder can't be made or written to.
    """
    if output_dir:
        _make_output_dir(Path(output_dir))
    if logging_enabled:
        setup_logging(output=None if output_dir is None else os.fspath(output_dir), level=logging.INFO)
    try:
        if distributed_enabled:
            distributed.enable(
                overwrite=True,
                nccl_async_error_handling=True,
                restrict_print_to_main_process=restrict_print_to_main_process,
                timeout=distributed_timeout,
            )
        if seed is not None:
            fix_random_seeds(seed + distributed.get_rank())
    except BaseException:
        exit_job(distributed_enabled, logging_enabled)
        raise
    logger.info("git: %s", get_sha())
    logger.info("conda environment: %s at %s", *get_conda_env())
    logger.info("python path: %s", ":".join(sys.path))


def exit_job(distributed_enabled: bool = True, logging_enabled: bool = True) -> None:
    """Undo `setup_job`: leave the process group, close the log files (those of named loggers too)."""
    if distributed_enabled:
        distributed.disable()
    if logging_enabled:
        for name in configured_loggers():
            cleanup_logging(name=name)


def student_configs(args: Any, world_size: int) -> list[DictConfig]:
    """The configurations of all students of a multi-distillation, before the learning rate is scaled.

    Raises:
        ValueError: see `setup_multidistillation`.
    """
    base, plan = _distillation_plan(args, world_size)
    return [_student_config(_student_args(args, plan, student, world_size), base) for student in plan.students]


def setup_multidistillation(
    args: Any, *, distributed_timeout: timedelta | None = None, check: Callable[[DictConfig], None] | None = None
) -> DictConfig:
    """Set up the job of a multi-distillation, and return the configuration of this process's student.

    The base file `args.config_file` lists the students and their ranks. Every process joins the subgroup of its
    student, and logs and writes into `<args.output_dir>/<student's name>`. Its configuration is the defaults, overlaid
    by the student's file, the base file and the overrides, in this order. `args` is changed accordingly.

    Args:
        args: see `get_cfg_from_args`.
        distributed_timeout: of collectives; torch's default if None.
        check: called with this student's configuration before it is saved; see `setup_config`.

    Raises:
        ValueError: the base file doesn't describe a multi-distillation, or it doesn't fit the number of processes.
    """
    if not args.output_dir:
        raise ValueError("a multi-distillation needs --output-dir: every student gets a folder below it")
    _make_output_dir(Path(args.output_dir))
    distributed.enable(
        overwrite=True,
        nccl_async_error_handling=True,
        restrict_print_to_main_process=True,
        timeout=distributed_timeout,
    )
    try:
        world_size = distributed.get_world_size()
        base, plan = _distillation_plan(args, world_size)
        distributed.new_subgroups(plan.subgroup_ranks)
        student = plan.student_of(distributed.get_rank())
        vars(args).update(vars(_student_args(args, plan, student, world_size)))

        os.makedirs(args.output_dir, exist_ok=True)
        setup_logging(output=args.output_dir, level=logging.INFO)
        if "arch" in base.get("student", {}):
            logger.warning("the base file sets student.arch: %s, for every student", base.student.arch)
        fix_random_seeds(getattr(args, "seed", 0) + distributed.get_rank())
        cfg = _student_config(args, base)
        if check is not None:
            check(cfg)
        if distributed.is_subgroup_main_process():
            write_config(cfg, args.output_dir)
        return apply_scaling_rules_to_cfg(cfg)
    except BaseException:
        exit_job()
        raise


def _distillation_plan(args: Any, world_size: int) -> tuple[DictConfig, DistillationPlan]:
    """What all students share, and which processes train which."""
    base = get_cfg_from_args(args, multidistillation=True, strict=False)
    plan = DistillationPlan.from_config(OmegaConf.to_container(base))
    plan.check(world_size)
    return base, plan


def _student_args(args: Any, plan: DistillationPlan, student: StudentPlan, world_size: int) -> Any:
    """The arguments as the processes of one student read them."""
    own = copy.copy(args)
    own.output_dir = os.path.join(args.output_dir, student.name)
    own.opts = [*(args.opts or []), f"train.batch_size_per_gpu={plan.global_batch_size // world_size}"]
    own.config_file = str(find_config_file(student.config_path).resolve())
    return own


def _student_config(args: Any, base: DictConfig) -> DictConfig:
    from_file, overrides = _user_layers(args, allow_unknown_keys=_allows_unknown_keys(args))
    return _with_output_dir(_merge([get_default_config(), from_file, base, overrides]), args.output_dir)


def _make_output_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        message = f"cannot write to the output folder {path} ({error.strerror}): choose another --output-dir"
        raise OSError(error.errno, message) from error
