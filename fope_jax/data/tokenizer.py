"""Tokenizers behind one interface: a trained SentencePiece BPE, bytes, and any tokenizer.json.

Encoding never adds a token of its own; the end-of-document token is added where documents are
joined. A special token's name inside a text is text, and encodes to ordinary tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fope_jax.extras import require
from fope_jax.files import read_json


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read; the message names the value to change."""


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer.

    Attributes:
      kind: "sentencepiece", "bytes" or "json".
      vocab_size: tokens V, special ones included.
      eos_id: ends every document.
      pad_id: fills windows; never scored.
      token_bytes: ``[V]`` int32, UTF-8 bytes of text that a token stands for; special tokens 0.
        Summed over a text's tokens it is the text's size, so bits per byte need no decoding.
      fingerprint: hex digest of everything that decides how a text is cut.
    """

    kind: str
    vocab_size: int
    eos_id: int
    pad_id: int
    token_bytes: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_id(self, name: str) -> int | None: ...

    def save(self, directory: Path) -> None: ...


# ---------------------------------------------------------------------------- bytes


class BytesTokenizer:
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
        self.token_bytes = np.ones(self.vocab_size, np.int32)
        self.token_bytes[: self._first] = 0

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first for text in texts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(list(ids), np.int64)
        text = (ids[ids >= self._first] - self._first).astype(np.uint8)
        return text.tobytes().decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        return None  # its tokens have no names

    def save(self, directory: Path) -> None:
        pass  # nothing to keep: the class is the tokenizer


# ---------------------------------------------------------------------------- SentencePiece


# SentencePiece writes spaces as this character, so one that is in the text would come back as a
# space. Its three bytes have pieces of their own, which are decoded as they stand.
_SPACE_MARK = "\u2581"
_LINE_END = re.compile(r"\n(?!\n)")
_PIECE_CHARS = 2048
_TRAINING_CHARS = 1000
TRAINING_TEXT_CHARS = 16_000_000


class SentencePieceTokenizer:
    """A SentencePiece model as `train_sentencepiece` makes it: lossless, pad 0, eos 1, unk 2.

    Runs of newlines are symbols that no other piece reaches into. A text cut after such a run thus
    gives the same tokens as the whole, in time that does not grow with the length of its
    documents, and on every core.
    """

    kind = "sentencepiece"
    pad_id, eos_id = 0, 1
    filename = "tokenizer.model"

    def __init__(self, model: bytes):
        self._model = model
        self._processor = require("sentencepiece", "train").SentencePieceProcessor(
            model_proto=model
        )
        self.vocab_size = self._processor.vocab_size()
        self.fingerprint = self.fingerprint_of(model)
        self.token_bytes = np.array(
            [self._piece_bytes(i) for i in range(self.vocab_size)], dtype=np.int32
        )
        self._mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()]

    @classmethod
    def load(cls, directory: Path) -> SentencePieceTokenizer:
        return cls((directory / cls.filename).read_bytes())

    @staticmethod
    def fingerprint_of(model: bytes) -> str:
        """The fingerprint of a serialised model, found without loading it."""
        return hashlib.sha256(b"sentencepiece" + model).hexdigest()

    def _piece_bytes(self, index: int) -> int:
        processor = self._processor
        if processor.is_control(index) or processor.is_unknown(index):
            return 0
        if processor.is_byte(index):
            return 1
        return len(processor.id_to_piece(index).replace(_SPACE_MARK, " ").encode())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        spans: list[list[int | None]] = []  # for each text its pieces, None a mark between them
        for text in texts:
            span: list[int | None] = []
            for number, part in enumerate(text.split(_SPACE_MARK)):
                cut = list(cut_lines(part, _PIECE_CHARS))
                span += [None] if number else []
                span += range(len(pieces), len(pieces) + len(cut))
                pieces += cut
            spans.append(span)
        encoded = self._processor.encode(pieces, num_threads=os.cpu_count() or 1)
        return [
            _join([self._mark_ids if k is None else encoded[k] for k in span]) for span in spans
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        index = self._processor.piece_to_id(name)
        return index if self._processor.id_to_piece(index) == name else None

    def save(self, directory: Path) -> None:
        (directory / self.filename).write_bytes(self._model)


def _join(ids: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in [[], *ids]])


def cut_lines(text: str, chars: int) -> Iterator[str]:
    """Cuts after the first end of a run of newlines that is ``chars`` or more characters on.

    >>> list(cut_lines("one\\ntwo\\n\\nthree\\n", 4))
    ['one\\ntwo\\n\\n', 'three\\n']
    """
    start = 0
    while start < len(text):
        end = _LINE_END.search(text, start + chars)
        stop = end.end() if end else len(text)
        yield text[start:stop]
        start = stop


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a lossless BPE with single digits and byte fallback; the same texts, the same model.

    Args:
      texts: documents; the first 16 million characters count.
      vocab_size: tokens V, with pad, eos, unk, 256 bytes and two newline symbols among them.

    Raises:
      TokenizerError: no text, or a vocabulary too large or too small for it.
    """
    sentencepiece = require("sentencepiece", "train")
    lines = list(_training_lines(texts))
    if not lines:
        raise TokenizerError("the training text has no characters to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\n\n"],
            byte_fallback=True,
            split_digits=True,
            required_chars="0123456789",
            max_sentence_length=8 * _TRAINING_CHARS,  # bytes; longer ones would be skipped
            num_threads=1,  # the model stores the number, and more threads do not train faster
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise TokenizerError(
            f"vocab_size = {vocab_size} does not fit the training text of"
            f" {sum(map(len, lines))} characters: {reason}"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most 1,000 characters, cut at spaces; SentencePiece skips lines with tabs."""
    budget = TRAINING_TEXT_CHARS
    for text in texts:
        text, budget = text[:budget], budget - len(text)
        for line in re.split(rf"[\n\t\0{_SPACE_MARK}]", text):
            yield from re.findall(
                rf".{{1,{_TRAINING_CHARS}}}(?= |$)|.{{1,{_TRAINING_CHARS}}}", line
            )
        if budget <= 0:
            return


# ---------------------------------------------------------------------------- tokenizer.json


_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "[SEP]")
_PAD_NAMES = ("<|padding|>", "<pad>", "[PAD]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class JsonTokenizer:
    """A ``tokenizer.json``, such as the paper's GPT-NeoX one, kept as it is.

    ``decode(encode(text)) == text`` as far as the file's own normaliser leaves text unchanged;
    the build counts the documents that it changes.

    Args:
      content: the file's text.
      eos: name of the token that ends a document.

    Raises:
      TokenizerError: ``eos`` is no token, or the decoder does not say how many bytes a token is.
    """

    kind = "json"
    filename = "tokenizer.json"

    def __init__(self, content: str, eos: str):
        self._content, self.eos = content, eos
        self._tokenizer = require("tokenizers", "train").Tokenizer.from_str(content)
        self._tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = self._tokenizer.token_to_id(eos)
        if eos_id is None:
            raise TokenizerError(f"the end-of-document token {eos!r} is not in the tokenizer.json")
        self.eos_id: int = eos_id
        pads = [self._tokenizer.token_to_id(name) for name in _PAD_NAMES]
        self.pad_id: int = next((i for i in pads if i is not None), eos_id)
        self.fingerprint = hashlib.sha256(f"json {eos} {content}".encode()).hexdigest()
        self.token_bytes = self._count_bytes()

    @classmethod
    def load(cls, path: Path) -> JsonTokenizer:
        """Reads a file; the end-of-document token is what ``tokenizer_config.json`` beside it
        says, or a usual name."""
        if not path.is_file():
            raise TokenizerError(f"tokenizer = {str(path)!r}: there is no such file")
        try:
            content = path.read_text(encoding="utf-8")
            names = {token["content"] for token in json.loads(content)["added_tokens"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TokenizerError(
                f"tokenizer = {str(path)!r} is no tokenizer.json: {error}"
            ) from error
        beside = path.with_name("tokenizer_config.json")
        stated = read_json(beside).get("eos_token") if beside.is_file() else None
        stated = stated.get("content") if isinstance(stated, dict) else stated
        eos = stated or next((name for name in _EOS_NAMES if name in names), None)
        if eos is None:
            raise TokenizerError(
                f"tokenizer = {str(path)!r} has no end-of-document token: no eos_token in"
                f" {beside.name} beside it, and none of {', '.join(_EOS_NAMES)} is an added token"
            )
        try:
            return cls(content, eos)
        except TokenizerError:
            raise
        except Exception as error:  # the library's own kind, without the file's name
            raise TokenizerError(
                f"tokenizer = {str(path)!r} is no tokenizer.json: {error}"
            ) from error

    def _count_bytes(self) -> np.ndarray:
        decoder = _decoder_types(json.loads(self._content).get("decoder"))
        if not decoder & {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}:
            raise TokenizerError(
                f"the tokenizer.json has decoder {sorted(decoder)}; accepted: ByteLevel, or"
                " Metaspace or ByteFallback, which say how many bytes of text a token stands for"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                sizes[index] = 0 if added[index].special else len(added[index].content.encode())
            elif "ByteLevel" in decoder:
                sizes[index] = len(piece)  # one character of the byte alphabet a byte
            elif _BYTE_PIECE.fullmatch(piece):
                sizes[index] = 1
            else:
                sizes[index] = len(piece.replace(_SPACE_MARK, " ").encode())
        return sizes

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def save(self, directory: Path) -> None:
        (directory / self.filename).write_text(self._content, encoding="utf-8")


def _decoder_types(decoder: Any) -> set[str]:
    if not decoder:
        return set()
    inner = [_decoder_types(part) for part in decoder.get("decoders", [])]
    return {decoder["type"]}.union(*inner)


# ---------------------------------------------------------------------------- in a cache


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a cache's manifest says of its tokenizer; the inverse is `load_saved`."""
    description = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    if isinstance(tokenizer, JsonTokenizer):
        description["eos"] = tokenizer.eos
    return description | {"fingerprint": tokenizer.fingerprint}


def load_saved(directory: Path, description: dict[str, Any]) -> Tokenizer:
    """The tokenizer saved in a cache.

    Raises:
      TokenizerError: its file is not the one that the manifest describes.
    """
    if description["kind"] == BytesTokenizer.kind:
        return BytesTokenizer()
    kinds = {cls.kind: cls for cls in (SentencePieceTokenizer, JsonTokenizer)}
    if description["kind"] not in kinds:
        raise TokenizerError(
            f"{directory}: tokenizer kind {description['kind']!r}; accepted:"
            f" {', '.join([BytesTokenizer.kind, *kinds])}"
        )
    path = directory / kinds[description["kind"]].filename
    try:
        if description["kind"] == SentencePieceTokenizer.kind:
            found = SentencePieceTokenizer.fingerprint_of(path.read_bytes())
            # The library only logs that it cannot load a model.
            if found != description["fingerprint"]:
                raise ValueError(f"fingerprint {found}, expected {description['fingerprint']}")
            tokenizer = SentencePieceTokenizer.load(directory)
        else:
            text = path.read_text(encoding="utf-8")
            tokenizer = JsonTokenizer(text, str(description.get("eos")))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # both libraries raise kinds of their own, without the file's name
        raise TokenizerError(f"{path} is damaged: {error}") from error
    if tokenizer.fingerprint != description["fingerprint"]:
        raise TokenizerError(
            f"{path} is damaged: fingerprint {tokenizer.fingerprint}, expected"
            f" {description['fingerprint']}"
        )
    return tokenizer
