"""Where weights come from: whatever a user writes for `weights=` -> a path on this machine.

Owns the download cache (`$TORCH_HOME/hub/checkpoints`, shared with torch.hub), the check of hashes in file names, and
the look-up of repositories in the local Hugging Face cache. Local files are used where they lie. Reading is in
`files.py`.
"""

import hashlib
import http.client
import logging
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

import torch

from dinov3.checkpointer.files import sniff

logger = logging.getLogger("dinov3")

LEGAL_SOURCES = (
    "DINOv3 weights are given out by Meta on request "
    "(https://ai.meta.com/resources/models-and-libraries/dinov3-downloads) and on Hugging Face "
    "(https://huggingface.co/facebook, dinov3-*). Then pass weights= the address you were sent, the path of a local "
    "file, or a Hugging Face name such as 'facebook/dinov3-vits16-pretrain-lvd1689m'"
)

_CHUNK = 1 << 20
_TIMEOUT_S = 60.0
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z0-9.]+$")
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


class DownloadError(OSError):
    """A download that failed; the message says why and where weights can be had."""


def local_path(source: str | os.PathLike[str], *, check_hash: bool | None = None) -> Path:
    """The file or folder on this machine that `source` names, downloaded first if it is a web address.

    Args:
        source: a path (`~` is expanded), a `file://`, `http://` or `https://` address, or the name of a repository in
            the local Hugging Face cache (`facebook/dinov3-…`), which nothing is fetched for.
        check_hash: whether the file's SHA-256 must begin with the hex digits in its name (`-<8 or more>.pth`). True:
            for cached and local files too, and a name without such digits is an error. None: when downloading, if the
            name has them. False: never; a download that differs is logged.

    Raises:
        TypeError: `source` is neither a string nor a path.
        FileNotFoundError: nothing there.
        DownloadError: the address could not be fetched.
        ValueError: another kind of address, a hash that differs, or a download that is not a weight file.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"got {type(source).__name__} for the weights, expected a path, an address or a name")
    text = os.fspath(source)
    scheme = urlsplit(text).scheme.lower() if "://" in text or text.lower().startswith("file:") else ""
    if scheme in ("http", "https"):
        return _download_once(text, check_hash)
    if scheme not in ("", "file"):
        raise ValueError(f"got {text!r}: addresses can be http://, https:// or file://")
    path = Path(urllib.request.url2pathname(urlsplit(text).path)) if scheme == "file" else Path(text).expanduser()
    if not path.exists():
        is_name = isinstance(source, str) and not scheme and re.fullmatch(r"[\w.-]+/[\w.-]+", text)
        if not is_name or text.endswith(_FILE_SUFFIXES):
            raise FileNotFoundError(f"no weights at {path}. {LEGAL_SOURCES}")
        path = huggingface_snapshot(text)
    if check_hash:
        _require_hash(path)
    return path


# --- Hugging Face cache ----------------------------------------------------------------------------------------------


def huggingface_cache() -> Path:
    """The folder where `huggingface_hub` keeps repositories, by the same environment variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def huggingface_snapshot(name: str) -> Path:
    """The folder of the repository `organisation/name` in the local Hugging Face cache.

    Raises:
        FileNotFoundError: it isn't there; the message says how to get it.
    """
    repository = huggingface_cache() / ("models--" + name.replace("/", "--"))
    snapshots = repository / "snapshots"
    main = repository / "refs" / "main"
    found = snapshots / main.read_text().strip() if main.is_file() else None
    if found is None and snapshots.is_dir():
        revisions = sorted(snapshots.iterdir())
        found = revisions[0] if len(revisions) == 1 else None
    if found is None or not found.is_dir():
        raise FileNotFoundError(
            f"no file {name!r}, and no repository of that name in the Hugging Face cache {huggingface_cache()}. To get "
            f"it: accept the licence at https://huggingface.co/{name}, then `pip install huggingface_hub`, "
            f"`hf auth login` and `hf download {name}`. {LEGAL_SOURCES}"
        )
    return found


# --- Hashes ----------------------------------------------------------------------------------------------------------


def hash_in_name(name: str) -> str | None:
    """The hex digits at the end of a file name (`…-08c60483.pth`), or None."""
    match = _HASH_IN_NAME.search(name)
    return match[1] if match else None


def _require_hash(path: Path) -> None:
    wanted = hash_in_name(path.name)
    if wanted is None or not path.is_file():
        raise ValueError(f"check_hash: {path} has no hash in its name (…-<8 hex digits>.pth), so it can't be checked")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(wanted):
        raise ValueError(f"{path} is not the file its name says: SHA-256 {digest[: len(wanted)]}…, expected {wanted}")


# --- Downloads -------------------------------------------------------------------------------------------------------


def _download_once(url: str, check_hash: bool | None) -> Path:
    """The cached copy of a web file, fetched if there is none.

    A file whose content matches the hash in its name is kept as `checkpoints/<name>`, as torch.hub does; any other in a
    folder named by its address, because two addresses may end in one name.
    """
    parts = urlsplit(url)
    name = re.sub(r"[^\w.+-]", "_", unquote(PurePosixPath(parts.path).name)) or "weights"
    # A signature in the query changes from day to day and names no file; without a file name the query is all there is.
    query = "" if name.endswith(_FILE_SUFFIXES) else parts.query
    address = hashlib.sha256(f"{parts.netloc}{parts.path}?{query}".encode()).hexdigest()[:16]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    by_name, by_address = cache / name, cache / address / name
    wanted = hash_in_name(name)
    if check_hash and wanted is None:
        raise ValueError(f"check_hash: {name!r} has no hash in its name (…-<8 hex digits>.pth), so it can't be checked")

    cached = next((path for path in ([by_name] if wanted else []) + [by_address] if path.is_file()), None)
    if cached is not None:
        if check_hash:
            _require_hash(cached)
        return cached

    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary_name = tempfile.mkstemp(prefix=".", suffix=".part", dir=cache)
    temporary = Path(temporary_name)
    try:
        with open(handle, "wb") as file:
            digest = _fetch(url, file)
        target = by_address
        if wanted and digest.startswith(wanted):
            target = by_name
        elif wanted:
            difference = f"{_shown(url)} sent a file with SHA-256 {digest[: len(wanted)]}…, its name says {wanted}"
            if check_hash is not False:
                raise ValueError(f"{difference}; nothing was kept. {LEGAL_SOURCES}")
            logger.warning("%s; used all the same, because check_hash=False", difference)
        try:
            sniff(temporary)
        except ValueError as error:
            reason = str(error).replace(str(temporary), f"what {_shown(url)} sent")
            raise ValueError(f"{reason}; nothing was kept. {LEGAL_SOURCES}") from error
        target.parent.mkdir(exist_ok=True)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _fetch(url: str, file: IO[bytes]) -> str:
    """Write the body of `url` to `file` and return its SHA-256, or raise `DownloadError`."""
    shown = _shown(url)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "dinov3"})  # noqa: S310  (http or https)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
                led = "" if response.url == url else f", after leading to {_shown(response.url)}"
                raise DownloadError(
                    f"{shown} answered with a web page in place of weights{led}: a login or an expired link? "
                    f"Nothing was kept. {LEGAL_SOURCES}"
                )
            expected = response.headers.get("Content-Length")
            logger.info("Downloading %s%s", shown, f" ({int(expected) / 1e6:,.1f} MB)" if expected else "")
            digest, received = hashlib.sha256(), 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        why = {401: "it needs a login", 403: "access refused, or the link has expired", 404: "no such file"}
        reason = why.get(error.code, str(error.reason))
        raise DownloadError(f"{shown} answered {error.code} ({reason}). {LEGAL_SOURCES}") from error
    except http.client.IncompleteRead as error:
        raise DownloadError(f"the connection to {shown} ended early; nothing was kept, try again") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise DownloadError(f"{shown} could not be reached: {error}. {LEGAL_SOURCES}") from error
    if expected is not None and received != int(expected):
        raise DownloadError(f"{shown} sent {received:,} of {expected} bytes; nothing was kept, try again")
    return digest.hexdigest()


def _shown(url: str) -> str:
    """The address without its query and user part, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
