"""The tokenizer of dino.txt, and where its vocabulary comes from."""

import hashlib
import importlib.util
import logging
import os
import urllib.error
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dinov3.thirdparty.CLIP.clip.simple_tokenizer import SimpleTokenizer

logger = logging.getLogger("dinov3")

DEFAULT_VOCABULARY = "https://dl.fbaipublicfiles.com/dinov3/thirdparty/bpe_simple_vocab_16e6.txt.gz"
CONTEXT_LENGTH = 77

_NAME = "bpe_simple_vocab_16e6.txt.gz"
_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_SOURCES = (
    f"The vocabulary {_NAME} (of OpenAI's CLIP, MIT licence) is not part of this package. Install a package that has "
    "it inside (`pip install open_clip_torch`), or pass the path or address of a copy"
)


class Tokenizer(SimpleTokenizer):
    """`SimpleTokenizer` that makes batches.

    Its attributes `start_token` and `end_token` are the ids around a text. Padding has no id of its own: it is 0, which
    is also the token of "!".
    """

    def tokenize(self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
        """Token ids int64 `[n, context_length]`: start, text, end, then zeros.

        Longer texts are cut; their last id is the end as well.

        Raises:
            ValueError: a context of less than two tokens.
        """
        if context_length < 2:
            raise ValueError(f"context_length must hold start and end of a text, got {context_length}")
        batch = torch.zeros(1 if isinstance(texts, str) else len(texts), context_length, dtype=torch.int64)
        for row, text in zip(batch, [texts] if isinstance(texts, str) else texts, strict=True):
            tokens = [self.start_token, *self.encode(text), self.end_token][:context_length]
            tokens[-1] = self.end_token
            row[: len(tokens)] = torch.tensor(tokens)
        return batch


def get_tokenizer(bpe_path_or_url: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Args:
        bpe_path_or_url: a path; or an address, downloaded once into the cache of torch.hub. None, or Meta's address:
            the copy in that cache, else the one inside an installed `open_clip`, else that address.

    Raises:
        FileNotFoundError: there is no vocabulary; the message says where it can be had.
        ImportError: ftfy or regex is missing.
        ValueError: the file is no vocabulary, or not the one that its name says.
    """
    if bpe_path_or_url is None or os.fspath(bpe_path_or_url) == DEFAULT_VOCABULARY:
        return Tokenizer(_find_default())
    text = os.fspath(bpe_path_or_url)
    if "://" in text:
        return Tokenizer(_download(text))
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary at {path}. {_SOURCES}")
    return Tokenizer(path)


def installed_vocabulary() -> Path | None:
    """The released vocabulary inside an installed `open_clip`, which isn't imported; None if there is none."""
    spec = importlib.util.find_spec("open_clip")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if _is_released(path := Path(folder, _NAME))), None)


def _find_default() -> Path:
    cached = _cache_folder(DEFAULT_VOCABULARY) / _NAME
    if _is_released(cached):
        return cached
    return installed_vocabulary() or _download(DEFAULT_VOCABULARY)


def _is_released(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256


def _cache_folder(url: str) -> Path:
    """In the folder of torch.hub: the released file under its name, others apart by their addresses."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = PurePosixPath(urlsplit(url).path).name
    return folder if name == _NAME else folder / hashlib.sha256(url.encode()).hexdigest()[:16]


def _download(url: str) -> Path:
    """The copy of a web file in the cache, downloaded if there is none."""
    name = PurePosixPath(urlsplit(url).path).name
    path = _cache_folder(url) / name
    if path.is_file() and (name != _NAME or _is_released(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Written under another name first, and compared with the hash before it is put in place.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_SHA256 if name == _NAME else None, progress=False)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise FileNotFoundError(f"the vocabulary {url} could not be downloaded: {error}. {_SOURCES}") from error
    except RuntimeError as error:
        raise ValueError(f"{url} is not the vocabulary that its name says: {error}. {_SOURCES}") from error
    return path
