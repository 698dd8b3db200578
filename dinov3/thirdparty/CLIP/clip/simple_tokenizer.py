"""Byte-level BPE of CLIP: text to token ids and back, by a list of merges.

The list is a file of its own (`bpe_simple_vocab_16e6.txt.gz`), which is not part of this package; where it can be had
is told by `dinov3.eval.text.tokenizer`. Needs the packages ftfy and regex.

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2; Radford et
al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2, for the alphabet of bytes.
"""

import gzip
import html
import os
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["SimpleTokenizer", "basic_clean", "bytes_to_unicode", "whitespace_clean"]

START, END = "<|startoftext|>", "<|endoftext|>"

_END_OF_WORD = "</w>"
_N_MERGES = 48894  # 49152 - 256 - 2 tokens: what CLIP uses of a longer file
_MAX_CACHED_WORDS = 1 << 16


@cache
def bytes_to_unicode() -> dict[int, str]:
    """A printable character for each of the 256 bytes: printable ones stand for themselves, others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def basic_clean(text: str) -> str:
    """`text` with mojibake repaired, HTML entities resolved (twice), and no white space at its ends."""
    return html.unescape(html.unescape(_import("ftfy").fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """`text` with every run of white space made one blank, and none at its ends."""
    return str(_import("regex").sub(r"\s+", " ", text)).strip()


class SimpleTokenizer:
    """Text to token ids and back.

    Args:
        bpe_path: gzip of UTF-8 text: a header line, then one merge a line, its two symbols separated by a blank.

    Attributes:
        encoder, decoder: symbol to id, and id to symbol.
        start_token, end_token: ids of the two special tokens, the largest ones.

    Raises:
        ImportError: ftfy or regex is missing; the message says how to install them.
        ValueError: the file isn't such a list.
    """

    def __init__(self, bpe_path: str | os.PathLike[str]) -> None:
        _import("ftfy")
        self._byte_to_symbol = bytes_to_unicode()
        self._symbol_to_byte = {symbol: byte for byte, symbol in self._byte_to_symbol.items()}
        merges = _read_merges(Path(bpe_path))
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        symbols = list(self._byte_to_symbol.values())
        vocabulary = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols), *map("".join, merges), START, END]
        self.encoder = {symbol: i for i, symbol in enumerate(vocabulary)}
        self.decoder = {i: symbol for symbol, i in self.encoder.items()}
        self.start_token, self.end_token = self.encoder[START], self.encoder[END]
        regex: Any = _import("regex")
        self._pieces = regex.compile(
            rf"{regex.escape(START)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
            regex.IGNORECASE,
        )
        self._cache: dict[str, tuple[int, ...]] = {START: (self.start_token,), END: (self.end_token,)}

    @property
    def vocab_size(self) -> int:
        """Number of different symbols."""
        return len(self.encoder)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` in lower case, without start and end."""
        text = whitespace_clean(basic_clean(text)).lower()
        return [token for piece in self._pieces.findall(text) for token in self._encode_piece(piece)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, with a blank after each word.

        Raises:
            KeyError: an id that the vocabulary doesn't have.
        """
        symbols = "".join(self.decoder[int(token)] for token in tokens)
        encoded = bytes(self._symbol_to_byte[symbol] for symbol in symbols)
        return encoded.decode("utf-8", errors="replace").replace(_END_OF_WORD, " ")

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        found = self._cache.get(piece)
        if found is None:
            symbols = [self._byte_to_symbol[byte] for byte in piece.encode("utf-8")]
            symbols[-1] += _END_OF_WORD
            found = tuple(self.encoder[symbol] for symbol in self._merge(symbols))
            if len(self._cache) < _MAX_CACHED_WORDS:
                self._cache[piece] = found
        return found

    def _merge(self, symbols: Sequence[str]) -> list[str]:
        """Join neighbours, the pair of the lowest rank first, everywhere from left to right, until no pair is known."""
        symbols = list(symbols)
        while True:
            known = [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in self._ranks]
            if not known:
                return symbols
            best = min(known, key=self._ranks.__getitem__)
            merged: list[str] = []
            i = 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == best:
                    merged.append("".join(best))
                    i += 2
                else:
                    merged.append(symbols[i])
                    i += 1
            symbols = merged


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} is no vocabulary: expected a gzip file of UTF-8 text ({error})") from error
    merges = []
    for number, line in enumerate(lines[1 : 1 + _N_MERGES], start=2):
        if not line.strip() and number == len(lines):  # after the last newline
            break
        symbols = line.split()
        if len(symbols) != 2:
            raise ValueError(f"{path}, line {number}: expected two symbols separated by a blank, got {line!r}")
        merges.append((symbols[0], symbols[1]))
    return merges


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"the tokenizer needs the package {name}: pip install 'dinov3[text]'") from error
