import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf

from dinov3.configs import get_default_config, schema
from dinov3.configs.check import check_config
from dinov3.configs.legacy import LEGACY_DEFAULTS, LEGACY_KEYS, LEGACY_REASONS
from dinov3.configs.render import DEFAULTS_FILE, field_docs, render_defaults


def test_the_yaml_file_equals_the_schema() -> None:
    defaults = OmegaConf.to_container(get_default_config())
    assert OmegaConf.to_container(OmegaConf.load(DEFAULTS_FILE)) == defaults
    assert yaml.safe_load(DEFAULTS_FILE.read_text()) == defaults  # plain YAML readers agree: no "1e-06" strings
    assert DEFAULTS_FILE.read_text() == render_defaults(), "run python -m dinov3.configs.render"


def sections(cls: type = schema.SSLConfig) -> Iterator[type]:
    yield cls
    for spec in dataclasses.fields(cls):
        if "section" in spec.metadata:
            yield from sections(spec.metadata["section"])


def test_every_field_is_explained() -> None:
    for cls in sections():
        for spec in dataclasses.fields(cls):
            assert field_docs(cls).get(spec.name), f"{cls.__name__}.{spec.name} has no docstring"


def test_no_key_is_both_known_and_legacy() -> None:
    known = set(schema.known_keys())
    assert not known & set(LEGACY_DEFAULTS)
    assert not known & LEGACY_KEYS
    assert not set(LEGACY_DEFAULTS) & LEGACY_KEYS


def test_every_legacy_key_has_one_reason() -> None:
    explained = [key for keys in LEGACY_REASONS.values() for key in keys]
    assert len(explained) == len(set(explained))
    assert set(explained) == set(LEGACY_DEFAULTS) | LEGACY_KEYS


def test_defaults_satisfy_the_checks_and_are_not_shared() -> None:
    cfg = get_default_config()
    check_config(cfg)
    cfg.crops.rgb_mean[0] = 9.0
    assert get_default_config().crops.rgb_mean[0] != 9.0


def test_unknown_keys_are_found_at_any_depth() -> None:
    config: dict[str, Any] = {
        "student": {"arch": "vit_small", "depth": 3},
        "schedules": {"lr": {"start": 0, "warm_up": 1}},
        "multidistillation": {"students": [{"name": "a"}, {"nam": "b"}]},
        "extra": {"a": 1},
        "gram": {"loss_weight_schedule": None},
    }
    assert dict(schema.unknown_keys(config)) == {
        "student.depth": 3,
        "schedules.lr.warm_up": 1,
        "multidistillation.students[1].nam": "b",
        "extra": {"a": 1},
    }


def test_the_schema_needs_python_alone() -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('omegaconf', 'torch', 'numpy'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from dinov3.configs import schema\n"
        "assert schema.default_values()['student']['arch'] == 'vit_large'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
