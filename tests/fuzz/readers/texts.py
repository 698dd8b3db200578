"""What people write: dataset strings, overrides, configuration files, texts for the tokenizer and its vocabulary."""

import gzip
import json
import random
from pathlib import Path
from typing import Any, ClassVar

import omegaconf
import torch

from dinov3.configs import schema
from dinov3.configs.check import check_config
from dinov3.configs.config import DinoV3SetupArgs, get_cfg_from_args, get_default_config
from dinov3.data.registry import check_dataset_str, dataset_names, parse_dataset_str
from dinov3.eval.text.tokenizer import get_tokenizer
from dinov3.thirdparty.CLIP.clip.simple_tokenizer import bytes_to_unicode
from tests.fuzz.core import Reader, require
from tests.fuzz.mutations import damage, damage_text, odd_text, odd_value


class DatasetStrings(Reader):
    """`parse_dataset_str` and `check_dataset_str`: what was put into a string comes out of it."""

    name, share = "dataset strings", 30.0
    # The types are contract; see `parse_dataset_str`.
    errors: ClassVar[tuple[type[Exception], ...]] = (ValueError, AssertionError, KeyError, TypeError)

    def make(self, rng: random.Random) -> tuple[str, dict[str, str] | None]:
        keys = ("root", "extra", "split", "channels", "max_value", "file", "scale", "label", "index_cache", "nothing")
        name = rng.choice((*dataset_names(), "Nothing", odd_text(rng)))
        wanted = {rng.choice(keys): odd_text(rng).replace('"', "") for _ in range(rng.randint(0, 3))}
        parts = [name]
        for key, value in wanted.items():
            quoted = any(c in value for c in ":=") or rng.random() < 0.2
            parts.append(f'{key}="{value}"' if quoted else f"{key}={value}")
        text = ":".join(parts)
        if rng.random() < 0.5:
            return damage_text(rng, text), None
        return text, wanted if name in dataset_names() else None

    def read(self, given: tuple[str, dict[str, str] | None]) -> dict[str, Any]:
        text, _ = given
        _, kwargs = parse_dataset_str(text)
        try:
            check_dataset_str(text)
        except TypeError as error:  # keys that are missing
            require("needs" in str(error) or "has no" in str(error), f"unclear: {error}")
        return kwargs

    def check(self, given: tuple[str, dict[str, str] | None], result: dict[str, Any]) -> None:
        _, wanted = given
        if wanted is not None:
            require(result.keys() == wanted.keys(), f"{sorted(result)} of {sorted(wanted)}")
            for key, value in wanted.items():
                require(result[key] == value or not isinstance(result[key], str), f"{key} is {result[key]!r}")


class Overrides(Reader):
    """Overrides of a configuration on the command line."""

    name, share = "overrides", 2.0
    errors: ClassVar[tuple[type[Exception], ...]] = (ValueError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.keys = sorted(schema.known_keys())
        self.defaults = omegaconf.OmegaConf.to_container(get_default_config())

    def make(self, rng: random.Random) -> list[str]:
        return [self._one(rng) for _ in range(rng.randint(1, 3))]

    def _one(self, rng: random.Random) -> str:
        key = rng.choice(self.keys)
        if rng.random() < 0.2:
            key = damage_text(rng, key)
        value = rng.choice(
            (json.dumps(odd_value(rng)), odd_text(rng), "${optim.lr}", "${oc.env:NOTHING}", "[1,2", "{a: 1}", "???")
        )
        return f"{key}={value}" if rng.random() < 0.95 else key

    def read(self, given: list[str]) -> Any:
        cfg = get_cfg_from_args(DinoV3SetupArgs(config_file="", opts=given))
        check_config(cfg)
        return cfg

    def check(self, given: list[str], result: Any) -> None:
        plain = omegaconf.OmegaConf.to_container(result)
        require(plain.keys() == self.defaults.keys(), "sections are missing")
        json.dumps(plain)


class ConfigFiles(Overrides):
    """Configuration files."""

    name, share = "configuration files", 1.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.text = omegaconf.OmegaConf.to_yaml(
            omegaconf.OmegaConf.create({k: self.defaults[k] for k in ("train", "optim")})
        )

    def make(self, rng: random.Random) -> Any:
        if rng.random() < 0.5:
            data = damage_text(rng, self.text).encode("utf-8", "surrogateescape")
        elif rng.random() < 0.9:
            data = damage(rng, self.text.encode()).data
        else:
            data = rng.choice(
                (b'!!python/object/apply:os.system ["exit 1"]', b"a: *b", b"- 1", b"a: &a [*a]", b"{" * 1000)
            )
        return self.file("by_a_stranger.yaml", data)

    def read(self, given: Any) -> Any:
        cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=str(given)))
        check_config(cfg)
        return cfg


def vocabulary() -> bytes:
    """A vocabulary of a few merges, in the form of CLIP's."""
    symbols = list(bytes_to_unicode().values())
    merges = [
        "t h",
        "th e</w>",
        "i n",
        "in g</w>",
        "a n",
        "an d</w>",
        *(f"{a} {b}" for a, b in zip(symbols[:40], symbols[40:80], strict=True)),
    ]
    return gzip.compress("\n".join(['"bpe"', *merges]).encode(), mtime=0)


class Tokens(Reader):
    """The tokenizer, with odd texts and a good vocabulary."""

    name, share = "tokenizer", 10.0
    errors: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokenizer = get_tokenizer(self.file("vocabulary.gz", vocabulary()))

    def make(self, rng: random.Random) -> str:
        if rng.random() < 0.3:
            return rng.randbytes(rng.randint(0, 200)).decode(
                "utf-8", rng.choice(("replace", "surrogateescape", "ignore"))
            )
        return damage_text(
            rng, rng.choice(("the thing and &amp;amp; it's", "<|endoftext|> a <|startoftext|>", odd_text(rng, 90)))
        )

    def read(self, given: str) -> torch.Tensor:
        return self.tokenizer.tokenize([given, given + " a"], context_length=16)

    def check(self, given: str, result: torch.Tensor) -> None:
        require(tuple(result.shape) == (2, 16), f"shape {tuple(result.shape)}")
        require(((result >= 0) & (result < self.tokenizer.vocab_size)).all(), "ids beyond the vocabulary")
        require((result[:, 0] == self.tokenizer.start_token).all(), "no start")
        require((result == self.tokenizer.end_token).any(1).all(), "no end")
        self.tokenizer.decode(self.tokenizer.encode(given))


class Vocabularies(Reader):
    """Vocabularies of the tokenizer."""

    name, share = "vocabularies", 4.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.content = vocabulary()
        self.text = gzip.decompress(self.content).decode()

    def make(self, rng: random.Random) -> Path:
        if rng.random() < 0.5:
            return self.file("by_a_stranger.gz", damage(rng, self.content).data)
        text = damage_text(rng, self.text).encode("utf-8", "surrogateescape")
        return self.file("by_a_stranger.gz", gzip.compress(text, mtime=0))

    def read(self, given: Path) -> Any:
        return get_tokenizer(given)

    def check(self, given: Path, result: Any) -> None:
        # Two merges may give one symbol: ids must then still be those of the list.
        require(result.tokenize("the thing").max() == result.end_token, "the end is not the largest id")

    def must_name(self, given: Path) -> str:
        return given.name
