"""No key of the schema is dead: code outside its definition, or a check, reads it."""

import re
from pathlib import Path

import dinov3
from dinov3.configs import schema

PACKAGE = Path(dinov3.__file__).parent
# They must keep one value, which `check.py` sees to.
ONE_VALUE = {"compute_precision.sharding_strategy", "dino.koleo_distributed_replicas", "ibot.separate_head"}


def test_every_key_is_read() -> None:
    definitions = {PACKAGE / "configs" / name for name in ("schema.py", "legacy.py", "render.py", "check.py")}
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path not in definitions]
    words = set(re.findall(r"\w+", "\n".join(sources)))
    checks = (PACKAGE / "configs" / "check.py").read_text()
    for key in schema.known_keys():
        name = key.rpartition(".")[2].removesuffix("[]")
        assert name in words or (key in ONE_VALUE and f'"{name}"' in checks), f"nothing reads {key}"
