"""The tokenizer: properties of the byte-level BPE, and where its vocabulary is found."""

import gzip
import hashlib
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dinov3.eval.text import tokenizer as module
from dinov3.eval.text.tokenizer import DEFAULT_VOCABULARY, Tokenizer, get_tokenizer, installed_vocabulary
from dinov3.thirdparty.CLIP.clip.simple_tokenizer import basic_clean, bytes_to_unicode, whitespace_clean
from tests.helpers.server import Answer, serve
from tests.helpers.tiny_dinotxt import byte_vocabulary

MERGES = ["l o", "lo w</w>", "lo w", "low e", "lowe r</w>", "n e", "ne w</w>"]


def write_vocabulary(path: Path, merges: list[str] = MERGES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(["#version: test", *merges]).encode(), mtime=0))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return get_tokenizer(write_vocabulary(tmp_path / "v.txt.gz"))


def symbols(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decoder[token] for token in tokenizer.encode(text)]


def test_the_alphabet_of_bytes_is_one_to_one_and_printable() -> None:
    alphabet = bytes_to_unicode()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in alphabet.values())
    assert alphabet[ord("a")] == "a"
    assert list(alphabet)[:2] == [0x21, 0x22]
    assert alphabet[0] == chr(256)


def test_pairs_are_merged_by_rank_and_words_end(tokenizer: Tokenizer) -> None:
    assert symbols(tokenizer, "low") == ["low</w>"]
    assert symbols(tokenizer, "LOWER new") == ["lower</w>", "new</w>"]
    assert symbols(tokenizer, "lowlow") == ["low", "low</w>"]
    assert symbols(tokenizer, "lo") == ["l", "o</w>"]  # "lo</w>" is no merge


def test_text_is_cleaned_and_split(tokenizer: Tokenizer) -> None:
    assert basic_clean(" &amp;lt;b ") == "<b"
    assert whitespace_clean(" a \n\t b ") == "a b"
    assert symbols(tokenizer, "it's 42!?") == ["i", "t</w>", "'", "s</w>", "4</w>", "2</w>", "!", "?</w>"]
    assert symbols(tokenizer, "<|startoftext|>x") == ["<|startoftext|>", "x</w>"]


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Co", "Cn")), max_size=40))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_decoded_is_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    cleaned = whitespace_clean(basic_clean(text)).lower()
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded.replace(" ", "") == cleaned.replace(" ", "").replace("</w>", "")
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode(text))


def test_batches_are_padded_and_cut(tokenizer: Tokenizer) -> None:
    batch = tokenizer.tokenize(["low", "low low low low", ""], context_length=4)
    low = tokenizer.encoder["low</w>"]
    start, end = tokenizer.start_token, tokenizer.end_token
    assert batch.tolist() == [[start, low, end, 0], [start, low, low, end], [start, end, 0, 0]]
    assert batch.dtype == torch.int64
    assert tokenizer.tokenize("low").shape == (1, 77)
    assert end == tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match="context_length"):
        tokenizer.tokenize("low", context_length=1)


def test_workers_get_the_tokenizer_by_pickle(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("new low") == tokenizer.encode("new low")


def test_the_cache_of_words_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3.thirdparty.CLIP.clip.simple_tokenizer._MAX_CACHED_WORDS", 4)
    for i in range(10):
        assert tokenizer.decode(tokenizer.encode("x" * (i + 1))) == "x" * (i + 1) + " "
    assert len(tokenizer._cache) <= 4


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"header\none two three\n"), gzip.compress(b"h\nalone")])
def test_other_files_are_no_vocabulary(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match="x.gz"):
        get_tokenizer(tmp_path / "x.gz")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"needs the package ftfy: pip install 'dinov3\[text\]'"):
        get_tokenizer(byte_vocabulary(tmp_path / "v.gz"))


# -- Where the vocabulary is ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and no open_clip."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "hub" / "checkpoints"


def released(monkeypatch: pytest.MonkeyPatch, path: Path) -> bytes:
    """A file that stands for the released one from now on."""
    content = write_vocabulary(path).read_bytes()
    monkeypatch.setattr(module, "_SHA256", hashlib.sha256(content).hexdigest())
    return content


def test_the_default_is_looked_for_in_the_cache_then_in_open_clip(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = Path(DEFAULT_VOCABULARY).name
    content = released(monkeypatch, tmp_path / "open_clip" / name)

    class Spec:
        submodule_search_locations = [str(tmp_path / "open_clip")]

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda package: Spec)
    before = set(sys.modules)
    assert module._find_default() == tmp_path / "open_clip" / name
    assert "open_clip" not in set(sys.modules) - before
    hub.mkdir(parents=True)
    (hub / name).write_bytes(b"another file")
    assert module._find_default() == tmp_path / "open_clip" / name
    (hub / name).write_bytes(content)
    assert module._find_default() == hub / name
    assert get_tokenizer(DEFAULT_VOCABULARY).encode("low") == get_tokenizer().encode("low")


def test_an_address_is_downloaded_once(hub: Path, tmp_path: Path) -> None:
    with serve() as server:
        server.answers["/mine.txt.gz"] = Answer(write_vocabulary(tmp_path / "x.gz").read_bytes())
        for _ in range(2):
            assert get_tokenizer(f"{server.address}/mine.txt.gz").encode("low") == [513]
        assert server.requests == ["/mine.txt.gz"]
    assert get_tokenizer((tmp_path / "x.gz").as_uri()).encode("low")


def test_a_download_that_is_another_file_is_not_kept(hub: Path, tmp_path: Path) -> None:
    name = Path(DEFAULT_VOCABULARY).name
    with serve() as server:
        server.answers[f"/{name}"] = Answer(write_vocabulary(tmp_path / "x.gz").read_bytes())
        with pytest.raises(ValueError, match="is not the vocabulary that its name says"):
            get_tokenizer(f"{server.address}/{name}")
    assert not (hub / name).exists()


def test_what_can_be_done_without_a_vocabulary_is_said(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve() as server:
        monkeypatch.setattr(module, "DEFAULT_VOCABULARY", f"{server.address}/none/{module._NAME}")
        with pytest.raises(FileNotFoundError, match=r"could not be downloaded: .*404.*pip install open_clip_torch"):
            get_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*none.gz.*pip install open_clip_torch"):
        get_tokenizer(tmp_path / "none.gz")


# -- Against open_clip, where it is -----------------------------------------------------------------------------------


def _open_clip() -> ModuleType | None:
    if installed_vocabulary() is None:
        return None
    import open_clip.tokenizer  # type: ignore[import-not-found]

    return open_clip.tokenizer  # type: ignore[no-any-return]


@pytest.mark.skipif(installed_vocabulary() is None, reason="open_clip and its vocabulary are not installed")
@pytest.mark.slow
def test_ten_thousand_texts_are_encoded_as_by_open_clip() -> None:
    pytest.importorskip("open_clip")
    theirs: Any = _open_clip()
    reference, ours = theirs.SimpleTokenizer(), get_tokenizer()

    @given(st.text(max_size=60))
    @settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def same(text: str) -> None:
        # There the special tokens have other spellings.
        assume(not re.search("(start|end)_?of_?text", text, re.IGNORECASE))
        assert ours.encode(text) == reference.encode(text)
        assert ours.tokenize([text]).tolist() == reference([text], context_length=77).tolist()

    same()
