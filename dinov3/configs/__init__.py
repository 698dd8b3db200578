"""Training configurations.

`schema.py`: keys and defaults. `config.py`: files, overrides, jobs. `check.py`: contradictions. `train/`: recipes.
Names of `config.py` are loaded when they are first used: `dinov3.configs.schema` works without OmegaConf.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov3.configs.config import (
        DinoV3SetupArgs,
        apply_scaling_rules_to_cfg,
        exit_job,
        get_cfg_from_args,
        get_default_config,
        load_teacher_config,
        setup_config,
        setup_job,
        setup_multidistillation,
        write_config,
    )

__all__ = [
    "DinoV3SetupArgs",
    "apply_scaling_rules_to_cfg",
    "exit_job",
    "get_cfg_from_args",
    "get_default_config",
    "load_teacher_config",
    "setup_config",
    "setup_job",
    "setup_multidistillation",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dinov3.configs import config

    return getattr(config, name)
