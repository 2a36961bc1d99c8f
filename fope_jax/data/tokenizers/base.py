"""The interface of tokenizers, and the byte tokenizer, which needs no library."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

# SentencePiece writes spaces as this character; in a text it would decode to a space.
SPACE_MARK = "\u2581"
_IDS_AT_ONCE = 2**20  # bounds memory: a temporary array is larger than the text


class TokenizerError(ValueError):
    """A tokenizer cannot be trained or read; the message names the value to change."""


class Tokenizer:
    """The interface of all tokenizers; V includes special tokens.

    Attributes:
      eos_id: ends every document.
      pad_id: fills windows; never scored.
      token_bytes: ``[V]`` int32, UTF-8 bytes of each token, special tokens 0; gives bits per byte.
      prefix: text before every document that is not part of it: " " for Llama 2, mostly "".
      fingerprint: hex digest of everything that decides the tokens of a text.
      num_threads: that a batch is encoded with, where the library lets one choose.
    """

    kind: str
    vocab_size: int
    eos_id: int
    pad_id: int
    prefix: str = ""
    fingerprint: str
    num_threads: int = os.cpu_count() or 1
    token_texts: TokenTexts

    @property
    def token_bytes(self) -> np.ndarray:
        return self.token_texts.sizes

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without control tokens."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens ``[n]`` int32 of each text."""
        raise NotImplementedError

    def encode_and_compare(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """As `encode_batch`, and of each text whether its tokens decode to another."""
        tokens = self.encode_batch(texts)
        return tokens, [
            self.token_texts.join(ids) != text.encode() and self.decode(ids) != text
            for ids, text in zip(tokens, texts, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Leaves out special tokens; invalid UTF-8 becomes U+FFFD."""
        return self.token_texts.join(ids).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        """The id of a token such as ``"<s>"``, or None."""
        return None

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's file, if it has one."""


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[list[np.ndarray], list[bool]]:
    """Tokens ``[n]`` int32 of each document, and whether they decode to another text.

    They begin with the tokenizer's prefix and have no EOS; an empty document has none.
    """
    whole = [tokenizer.prefix + text if text else "" for text in texts]
    return tokenizer.encode_and_compare(whole)


class TokenTexts:
    """The bytes that each token stands for, ``[V]``.

    >>> texts = TokenTexts([b"", b"a ", b"b"])
    >>> texts.sizes.tolist(), texts.join([1, 0, 2, 7])
    ([0, 2, 1], b'a b')
    """

    def __init__(self, texts: Sequence[bytes]):
        self.sizes = np.array([len(text) for text in texts], np.int32)
        # One before the first and one after the last, for ids that there are not.
        self._texts = np.array([b"", *texts, b""], object)

    def join(self, ids: Iterable[int]) -> bytes:
        """The joined bytes of ``ids``; ids beyond V have none."""
        ids = ids if isinstance(ids, np.ndarray) else np.array(list(ids), np.int64)
        if len(ids) <= _IDS_AT_ONCE:
            # numpy takes the texts of all tokens at once: a loop over tokens would slow a build.
            return b"".join(self._texts.take(ids + 1, mode="clip").tolist())
        starts = range(0, len(ids), _IDS_AT_ONCE)
        return b"".join(self.join(ids[start : start + _IDS_AT_ONCE]) for start in starts)


def byte_of_piece(piece: str) -> bytes:
    """
    >>> byte_of_piece("<0xE2>")
    b'\\xe2'
    """
    return bytes.fromhex(piece[3:5])


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes after three special tokens: token ``3 + b`` is byte ``b``. V is 259.

    >>> BytesTokenizer().encode("a\\n")
    [100, 13]
    """

    kind = "bytes"
    vocab_size = 259
    pad_id, eos_id = 0, 1
    _first = 3
    fingerprint = hashlib.sha256(b"bytes after pad, eos, unk").hexdigest()

    def __init__(self):
        self.token_texts = TokenTexts([b""] * self._first + [bytes([b]) for b in range(256)])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first for text in texts
        ]
