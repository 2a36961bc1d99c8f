"""Tokenizers behind one interface: a trained SentencePiece BPE, bytes, and any tokenizer.json.

Encoding never adds a token or a character of its own, so that the tokens of two texts one after the
other are a text as well; the end-of-document token is added where documents are joined, and
`encode_documents` begins a document as its tokenizer does. A special token's name inside a text is
text, and encodes to ordinary tokens.

A token stands for a string of bytes, a special token for none, and decoding joins them. A text
that does not come back, because the tokenizer normalises it or lacks a character, is counted by
whoever cuts documents.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fope_jax.extras import require
from fope_jax.storage.content import detect_content, read_head
from fope_jax.storage.files import read_json


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
      prefix: text that stands before every document and is none of its text: a space with Llama 2's
        tokenizer, which writes a document's first word as it writes any other; mostly "".
      fingerprint: hex digest of everything that decides how a text is cut.
    """

    kind: str
    vocab_size: int
    eos_id: int
    pad_id: int
    token_bytes: np.ndarray
    prefix: str
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_id(self, name: str) -> int | None: ...

    def save(self, directory: Path) -> None: ...


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[list[np.ndarray], list[bool]]:
    """Tokens of whole documents, without the one that ends them.

    Args:
      tokenizer: any.
      texts: documents; one without text has no tokens.

    Returns:
      For each document its tokens ``[n]`` int32, which begin with those of ``tokenizer.prefix``;
      and whether the tokenizer changes it, that is, whether its tokens decode to another text.
    """
    whole = [tokenizer.prefix + text if text else "" for text in texts]
    tokens = tokenizer.encode_batch(whole)
    changed = [tokenizer.decode(ids) != text for ids, text in zip(tokens, whole, strict=True)]
    return tokens, changed


_TOKENS_AT_ONCE = 2**20  # what is needed for each is larger than the text of a long document


def _in_parts(ids: Iterable[int]) -> Iterator[np.ndarray]:
    ids = ids if isinstance(ids, np.ndarray) else np.array(list(ids), np.int64)
    return (ids[i : i + _TOKENS_AT_ONCE] for i in range(0, len(ids), _TOKENS_AT_ONCE))


class _TokenTexts:
    """The bytes that each token stands for, ``[V]``, and those of a text's tokens joined.

    >>> texts = _TokenTexts([b"", b"a ", b"b"])
    >>> texts.sizes.tolist(), texts.join([1, 0, 2, 7])
    ([0, 2, 1], b'a b')
    """

    def __init__(self, texts: Sequence[bytes]):
        self.sizes = np.array([len(text) for text in texts], np.int32)
        self._start = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; one beyond the vocabulary stands for none."""
        joined = []
        for part in _in_parts(ids):
            part = part[(part >= 0) & (part < len(self.sizes))]
            sizes = self.sizes[part]
            ends = np.cumsum(sizes, dtype=np.int64)
            # Of each byte its place among the tokens' bytes: a loop in Python takes five times as
            # long, and would hold up a build on many cores.
            place = np.repeat(self._start[part] - (ends - sizes), sizes)
            joined.append(self._bytes[place + np.arange(len(place))].tobytes())
        return b"".join(joined)


# ---------------------------------------------------------------------------- bytes


class BytesTokenizer:
    """UTF-8 bytes after three special tokens: token ``3 + b`` is byte ``b``. V is 259.

    >>> BytesTokenizer().encode("a\\n")
    [100, 13]
    """

    kind = "bytes"
    vocab_size = 259
    pad_id, eos_id = 0, 1
    prefix = ""
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
        parts = []
        for part in _in_parts(ids):
            ordinary = (part >= self._first) & (part < self.vocab_size)
            parts.append((part[ordinary] - self._first).astype(np.uint8).tobytes())
        return b"".join(parts).decode(errors="replace")

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
    prefix = ""
    filename = "tokenizer.model"

    def __init__(self, model: bytes):
        self._model = model
        self._processor = require("sentencepiece", "train").SentencePieceProcessor(
            model_proto=model
        )
        self.vocab_size = self._processor.vocab_size()
        self.fingerprint = self.fingerprint_of(model)
        self._texts = _TokenTexts([self._token_text(i) for i in range(self.vocab_size)])
        self.token_bytes = self._texts.sizes
        self._mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()]

    @property
    def writes_spaces(self) -> bool:
        """Whether a space has a piece of its own; models trained before this was asked may not."""
        return not self._processor.is_unknown(self._processor.piece_to_id(_SPACE_MARK))

    @classmethod
    def load(cls, directory: Path) -> SentencePieceTokenizer:
        return cls((directory / cls.filename).read_bytes())

    @staticmethod
    def fingerprint_of(model: bytes) -> str:
        """The fingerprint of a serialised model, found without loading it."""
        return hashlib.sha256(b"sentencepiece" + model).hexdigest()

    def _token_text(self, index: int) -> bytes:
        processor, piece = self._processor, self._processor.id_to_piece(index)
        if processor.is_control(index) or processor.is_unknown(index):
            return b""
        if processor.is_byte(index):
            return _byte_of(piece)
        return piece.replace(_SPACE_MARK, " ").encode()

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
        """Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        return self._texts.join(ids).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        index = self._processor.piece_to_id(name)
        return index if self._processor.id_to_piece(index) == name else None

    def save(self, directory: Path) -> None:
        (directory / self.filename).write_bytes(self._model)


def _byte_of(piece: str) -> bytes:
    """
    >>> _byte_of("<0xE2>")
    b'\\xe2'
    """
    return bytes([int(piece[3:5], 16)])


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
    lines = list(_training_lines(texts))
    if not lines:
        raise TokenizerError("the training text has no characters to train a tokenizer on")
    digits = "0123456789"
    model = _train(lines, vocab_size, digits)
    tokenizer = SentencePieceTokenizer(model)
    if not tokenizer.writes_spaces:
        # Spaces are rare in this text. Without a piece of its own a space would be the three bytes
        # of its mark. Text with spaces keeps the model that it always gave, to the byte.
        model = _train(lines, vocab_size, digits + _SPACE_MARK)
        tokenizer = SentencePieceTokenizer(model)
    return tokenizer


def _train(lines: Sequence[str], vocab_size: int, required_chars: str) -> bytes:
    model = io.BytesIO()
    try:
        require("sentencepiece", "train").SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\n\n"],
            byte_fallback=True,
            split_digits=True,
            required_chars=required_chars,
            max_sentence_length=8 * _TRAINING_CHARS,  # bytes; longer ones would be skipped
            num_threads=1,  # the model stores the number, and more threads do not train faster
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise TokenizerError(
            f"vocab_size = {vocab_size} does not fit the training text of"
            f" {sum(map(len, lines))} characters: {reason}"
        ) from error
    return model.getvalue()


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
_DECODERS = {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class JsonTokenizer:
    """A ``tokenizer.json``, such as the paper's GPT-NeoX one.

    Text is cut as the file says, but for this:

    * What the file puts before a text, or takes from its ends, is left out of `encode`: a piece of
      a text has neither. The space before a text is ``prefix``, with which documents begin.
    * No text becomes a control token, whatever the file calls special: the end of a document, and
      every token that the configuration beside the file names for a purpose, such as ``bos_token``.

    ``decode(encode(text)) == text`` as far as the file's own rules leave text unchanged; where
    they lower its case, normalise it, or have no token for a character, `encode_documents` says so.

    Args:
      content: the file's text.
      eos: name of the token that ends a document.
      control: names of other tokens that no text may become, beside those that the file calls
        special.

    Raises:
      TokenizerError: ``eos`` is no token, or the decoder does not say how many bytes a token is.
    """

    kind = "json"
    filename = "tokenizer.json"

    def __init__(self, content: str, eos: str, control: Sequence[str] = ()):
        self._content, self.eos, self.control = content, eos, tuple(control)
        rules = json.loads(content)
        self.prefix = _take_edges(rules)
        _make_special(rules, {eos, *control})
        unchanged = rules == json.loads(content)
        used = content if unchanged else json.dumps(rules, ensure_ascii=False)
        self._tokenizer = require("tokenizers", "train").Tokenizer.from_str(used)
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
        self.fingerprint = self.fingerprint_of(used, eos)
        self._find_token_texts(rules)

    @staticmethod
    def fingerprint_of(content: str, eos: str) -> str:
        """The fingerprint of a file whose rules are used as they stand."""
        return hashlib.sha256(f"json {eos} {content}".encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> JsonTokenizer:
        """Reads a file; the end-of-document token is what ``tokenizer_config.json`` beside it
        says, or a usual name."""
        if not path.is_file():
            what = "it is a directory" if path.is_dir() else "there is no such file"
            raise TokenizerError(f"tokenizer = {str(path)!r}: {what}")
        try:
            content = path.read_bytes().decode("utf-8-sig")
            names = {token["content"] for token in json.loads(content)["added_tokens"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            found = detect_content(read_head(path))
            reason = f"it is {found.kind}; {found.advice}" if found else error
            if isinstance(error, KeyError | TypeError):
                reason = "it has no list 'added_tokens' of tokens with a 'content'"
            raise TokenizerError(
                f"tokenizer = {str(path)!r} is no tokenizer.json: {reason}"
            ) from error
        stated, control = _stated_tokens(path)
        eos = stated or next((name for name in _EOS_NAMES if name in names), None)
        if eos is None:
            raise TokenizerError(
                f"tokenizer = {str(path)!r} has no end-of-document token: no eos_token in"
                f" {_CONFIGS[0]} beside it, and none of {', '.join(_EOS_NAMES)} is an added token"
            )
        try:
            special = {t["content"] for t in json.loads(content)["added_tokens"] if t["special"]}
            return cls(content, eos, sorted(control - special - {eos}))
        except TokenizerError:
            raise
        except Exception as error:  # the library's own kind, without the file's name
            raise TokenizerError(
                f"tokenizer = {str(path)!r} is no tokenizer.json: {error}"
            ) from error

    def _find_token_texts(self, rules: dict[str, Any]) -> None:
        """Which tokens are control tokens, and what every other token stands for."""
        decoders = _flat(rules.get("decoder"), "decoders")
        kinds = {decoder["type"] for decoder in decoders}
        if not kinds & _DECODERS:
            raise TokenizerError(
                f"the tokenizer.json has decoder {sorted(kinds)}; accepted: ByteLevel, or"
                " Metaspace or ByteFallback, which say how many bytes of text a token stands for"
            )
        model, added = rules["model"], self._tokenizer.get_added_tokens_decoder()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        own = {*self._tokenizer.get_vocab(with_added_tokens=False).values()}
        special = {index for index, token in added.items() if token.special}
        control = special | {vocab[name] for name in self.control if name in vocab}
        # A character of the model's own is text, also where it is named for padding, as "!" is.
        control -= {index for piece, index in vocab.items() if len(piece) == 1 and index in own}
        control |= {self.eos_id, self.pad_id}
        unknown = model.get("unk_id", vocab.get(model.get("unk_token")))
        bytes_are_pieces = bool(model.get("byte_fallback")) or "ByteFallback" in kinds
        texts = [b""] * self.vocab_size
        for piece, index in vocab.items():
            if index in control or index == unknown:
                continue
            if index in added and (
                "ByteLevel" in kinds or not (index in own or added[index].normalized)
            ):
                texts[index] = added[index].content.encode()  # found in the text as it stands
            elif "ByteLevel" in kinds:
                texts[index] = _of_byte_alphabet(piece)
            elif bytes_are_pieces and _BYTE_PIECE.fullmatch(piece):
                texts[index] = _byte_of(piece)
            else:
                texts[index] = _spell_out(piece, decoders).encode()
        self._texts = _TokenTexts(texts)
        self.token_bytes = self._texts.sizes
        # An unknown token is what some texts become; it is none that may be taken out of them.
        self._control = np.array(sorted(control - {unknown} | {self.eos_id, self.pad_id}))
        names = [name for name, index in vocab.items() if index in {*control, unknown} and name]
        spelled = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
        spelled += [_BYTE_PIECE.pattern] if bytes_are_pieces else []
        self._spelled = re.compile("|".join(spelled))
        marks = [vocab.get(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = marks if bytes_are_pieces and None not in marks else []

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = list(texts)
        return [
            self._without_control(text, ids)
            for text, ids in zip(texts, self._cut(texts), strict=True)
        ]

    def _cut(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def _without_control(self, text: str, ids: np.ndarray) -> np.ndarray:
        """``ids`` of ``text``, none of which is a control token.

        Models of the unigram kind look for their control tokens in a text like for any other, and
        for the names of their bytes. A text that has come to one is cut inside the name, and what
        is still a control token is taken out. A mark in a text is written in bytes, where there
        are tokens for them: as a piece it would be a space.
        """
        if self._texts.join(ids) == text.encode():
            return ids
        starts = [match.start() + 1 for match in self._spelled.finditer(text)]
        starts += [i for m in re.finditer(_SPACE_MARK, text) if self._mark_ids for i in m.span()]
        if starts:
            cuts = sorted({0, *starts, len(text)})
            parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
            own = self._cut(parts)
            if self._mark_ids:
                own = [
                    self._mark_ids if part == _SPACE_MARK else one
                    for part, one in zip(parts, own, strict=True)
                ]
            again = np.concatenate(own).astype(np.int32)
            lossless = self._texts.join(again) == text.encode()
            ids = again if lossless or np.isin(ids, self._control).any() else ids
        return ids[~np.isin(ids, self._control)]

    def decode(self, ids: Iterable[int]) -> str:
        """Control tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        return self._texts.join(ids).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def save(self, directory: Path) -> None:
        (directory / self.filename).write_text(self._content, encoding="utf-8")


def _stated_tokens(path: Path) -> tuple[str | None, set[str]]:
    """What the configuration beside a tokenizer.json says.

    Returns:
      The token that ends a document, if any is named; and all that are named for a purpose.
    """
    eos, names = None, set()
    for config in _CONFIGS:
        beside = path.with_name(config)
        stated = read_json(beside) if beside.is_file() else {}
        for key, value in stated.items():
            if key.endswith("_token"):
                names |= _names_of([value])
            elif key in ("additional_special_tokens", "extra_special_tokens"):
                names |= _names_of(value)
            elif key == "added_tokens_decoder" and isinstance(value, dict):
                tokens = (token for token in value.values() if isinstance(token, dict))
                names |= _names_of([token for token in tokens if token.get("special")])
        eos = eos or next(iter(_names_of([stated.get("eos_token")])), None)
    return eos, names


def _names_of(tokens: Any) -> set[str]:
    """Names of tokens, which a configuration writes as strings or as objects."""
    if isinstance(tokens, dict):
        tokens = tokens.values()
    elif not isinstance(tokens, list):
        return set()
    found = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return {name for name in found if isinstance(name, str) and name}


def _make_special(rules: dict[str, Any], names: Collection[str]) -> None:
    """Calls added tokens special, so that the library does not look for them in a text."""
    for token in rules.get("added_tokens") or []:
        token["special"] = token["special"] or token["content"] in names


_DROP_CHARACTERS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}


def _take_edges(rules: dict[str, Any]) -> str:
    """Takes out of the rules what is done to the ends of a text alone.

    Returns:
      What the rules put before a text.

    >>> rules = {"normalizer": {"type": "Prepend", "prepend": "\u2581"}, "pre_tokenizer": None}
    >>> _take_edges(rules), rules["normalizer"]
    (' ', None)
    """
    prefix = ""
    kept = []
    for rule in _flat(rules.get("normalizer"), "normalizers"):
        if rule["type"] == "Prepend":
            prefix = rule["prepend"].replace(_SPACE_MARK, " ")
        elif rule["type"] != "Strip":
            kept.append(rule)
    if len(kept) < len(_flat(rules.get("normalizer"), "normalizers")):
        rules["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    words = False
    for rule in _flat(rules.get("pre_tokenizer"), "pretokenizers"):
        words |= rule["type"] in _DROP_CHARACTERS or rule.get("behavior") == "Removed"
        scheme = "never" if rule.get("add_prefix_space") is False else "always"
        if rule["type"] == "Metaspace" and rule.get("prepend_scheme", scheme) != "never":
            prefix = " "
            if not words:  # after spaces have been dropped, this is what writes them
                rule.pop("add_prefix_space", None)
                rule["prepend_scheme"] = "never"
        elif rule["type"] == "ByteLevel" and rule.get("add_prefix_space", True):
            prefix = " "
            if not words:
                rule["add_prefix_space"] = False
    return prefix


def _flat(rule: dict[str, Any] | None, of_sequence: str) -> list[dict[str, Any]]:
    """A rule, or those of a sequence, in their order."""
    if not rule:
        return []
    if rule["type"] != "Sequence":
        return [rule]
    return [one for inner in rule[of_sequence] for one in _flat(inner, of_sequence)]


def _spell_out(piece: str, decoders: Sequence[dict[str, Any]]) -> str:
    """A piece as the decoders write it inside a text."""
    for rule in decoders:
        if rule["type"] == "Metaspace":
            piece = piece.replace(rule.get("replacement", _SPACE_MARK), " ")
        elif rule["type"] == "Replace" and "String" in rule["pattern"]:
            piece = piece.replace(rule["pattern"]["String"], rule["content"])
    return piece


_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTE_ALPHABET = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(_OTHERS)
}


def _of_byte_alphabet(piece: str) -> bytes:
    """The bytes of a piece in GPT-2's alphabet, which writes each as a character that shows.

    >>> _of_byte_alphabet("\u0120caf\u00c3\u00a9").decode()
    ' caf\u00e9'
    """
    if not all(character in _BYTE_ALPHABET for character in piece):
        return piece.encode()
    return bytes(_BYTE_ALPHABET[character] for character in piece)


# ---------------------------------------------------------------------------- in a cache


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a cache's manifest says of its tokenizer; the inverse is `load_saved`."""
    description = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    if isinstance(tokenizer, JsonTokenizer):
        description["eos"] = tokenizer.eos
        description |= {"control": list(tokenizer.control)} if tokenizer.control else {}
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
            text, eos = path.read_text(encoding="utf-8"), str(description.get("eos"))
            tokenizer = JsonTokenizer(text, eos, description.get("control", ()))
            if description["fingerprint"] == JsonTokenizer.fingerprint_of(text, eos):
                # A cache from before the rules at a text's ends were left out.
                tokenizer.fingerprint = description["fingerprint"]
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
