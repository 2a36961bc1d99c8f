"""Any ``tokenizer.json``, read with Hugging Face tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data.tokenizers.base import (
    SPACE_MARK,
    Tokenizer,
    TokenizerError,
    TokenTexts,
    byte_of_piece,
)
from fope_jax.extras import require
from fope_jax.storage.content import detect_content, read_head
from fope_jax.storage.files import read_json_or_empty

_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "[SEP]")
PAD_NAMES = ("<|padding|>", "<pad>", "[PAD]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_DECODERS = {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, such as the paper's GPT-NeoX one.

    Two rules differ from the file. `encode` leaves out what is added or stripped at the ends of a
    text; the space before a document is ``prefix``. No text becomes a control token: ``eos``, the
    file's special tokens, or those in ``control``. Decoding gives the text back unless the file
    lower-cases, normalises or lacks characters; `encode_documents` reports it.

    Raises:
      TokenizerError: ``eos`` is unknown, or the decoder does not define the bytes of a token.
    """

    kind = "json"
    filename = "tokenizer.json"

    def __init__(self, content: str, eos: str, control: Sequence[str] = ()):
        self._content, self.eos, self.control = content, eos, tuple(control)
        rules = json.loads(content)
        self.prefix = _remove_edge_rules(rules)
        # Special tokens are not matched in a text.
        for token in rules.get("added_tokens") or []:
            token["special"] = token["special"] or token["content"] in {eos, *control}
        unchanged = rules == json.loads(content)
        used = content if unchanged else json.dumps(rules, ensure_ascii=False)
        self._tokenizer = require("tokenizers", "train").Tokenizer.from_str(used)
        self._tokenizer.encode_special_tokens = True  # its name in a text is text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = self._tokenizer.token_to_id(eos)
        if eos_id is None:
            raise TokenizerError(f"the end-of-document token {eos!r} is not in the tokenizer.json")
        self.eos_id: int = eos_id
        pads = [self._tokenizer.token_to_id(name) for name in PAD_NAMES]
        self.pad_id: int = next((i for i in pads if i is not None), eos_id)
        self.fingerprint = self.fingerprint_of(used, eos)
        self._find_token_texts(rules)

    @staticmethod
    def fingerprint_of(content: str, eos: str) -> str:
        """The fingerprint of rules as they are used."""
        return hashlib.sha256(f"json {eos} {content}".encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> JsonTokenizer:
        """Reads a file; EOS is that of ``tokenizer_config.json`` beside it, or a usual name."""
        if not path.is_file():
            here = "" if path.is_absolute() else f" (working directory {Path.cwd()})"
            what = "it is a directory" if path.is_dir() else f"there is no such file{here}"
            raise TokenizerError(f"tokenizer = {str(path)!r}: {what}")
        try:
            content = path.read_bytes().decode("utf-8-sig")
            added = json.loads(content)["added_tokens"]
            names = {token["content"] for token in added}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            found = detect_content(read_head(path))
            reason = f"it is {found.kind}; {found.advice}" if found else error
            if isinstance(error, KeyError | TypeError):
                reason = "it has no list 'added_tokens' of tokens with a 'content'"
            raise _not_a_tokenizer(path, reason) from error
        stated_eos, control = _stated_tokens(path)
        eos = stated_eos or next((name for name in _EOS_NAMES if name in names), None)
        if eos is None:
            raise TokenizerError(
                f"tokenizer = {str(path)!r} has no end-of-document token: no eos_token in"
                f" {TOKENIZER_CONFIGS[0]} beside it, and none of {', '.join(_EOS_NAMES)} is an"
                " added token"
            )
        try:
            special = {token["content"] for token in added if token["special"]}
            return cls(content, eos, sorted(control - special - {eos}))
        except TokenizerError:
            raise
        except Exception as error:  # the library's exception does not name the file
            raise _not_a_tokenizer(path, error) from error

    def _find_token_texts(self, rules: dict[str, Any]) -> None:
        decoders = _flatten(rules.get("decoder"), "decoders")
        kinds = {decoder["type"] for decoder in decoders}
        if not kinds & _DECODERS:
            raise TokenizerError(
                f"the tokenizer.json has decoder {sorted(kinds)}; accepted: ByteLevel, or"
                " Metaspace or ByteFallback, which say how many bytes of text a token stands for"
            )
        model, added = rules["model"], self._tokenizer.get_added_tokens_decoder()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        model_ids = {*self._tokenizer.get_vocab(with_added_tokens=False).values()}
        control = {index for index, token in added.items() if token.special}
        control |= {vocab[name] for name in self.control if name in vocab}
        # A character of the model's vocabulary is text, even if it is the pad token, as "!" can be.
        control -= {i for piece, i in vocab.items() if len(piece) == 1 and i in model_ids}
        control |= {self.eos_id, self.pad_id}
        unknown = model.get("unk_id", vocab.get(model.get("unk_token")))
        has_byte_pieces = bool(model.get("byte_fallback")) or "ByteFallback" in kinds
        is_byte_level = "ByteLevel" in kinds
        texts = [b""] * self.vocab_size
        for piece, index in vocab.items():
            if index in control or index == unknown:
                continue
            is_literal = index not in model_ids and not (index in added and added[index].normalized)
            if index in added and (is_byte_level or is_literal):
                texts[index] = added[index].content.encode()  # matched verbatim
            elif is_byte_level:
                texts[index] = _byte_level_bytes(piece)
            elif has_byte_pieces and _BYTE_PIECE.fullmatch(piece):
                texts[index] = byte_of_piece(piece)
            else:
                texts[index] = _decode_piece(piece, decoders).encode()
        self.token_texts = TokenTexts(texts)
        # The unknown token may come from text, so it is not removed.
        self._control = np.array(sorted(control - {unknown} | {self.eos_id, self.pad_id}))
        names = [name for name, index in vocab.items() if index in {*control, unknown} and name]
        patterns = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
        patterns += [_BYTE_PIECE.pattern] if has_byte_pieces else []
        self._control_names = re.compile("|".join(patterns))
        mark_ids = [vocab.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark_ids if has_byte_pieces and None not in mark_ids else []

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.encode_and_compare(texts)[0]

    def encode_and_compare(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        encoded = zip(texts, self._encode_raw(texts), strict=True)
        pairs = [self._without_control(text, ids) for text, ids in encoded]
        return [ids for ids, _ in pairs], [is_changed for _, is_changed in pairs]

    def _encode_raw(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def _without_control(self, text: str, ids: np.ndarray) -> tuple[np.ndarray, bool]:
        """``ids`` of ``text`` without control tokens, and whether they decode to another text.

        Unigram models match names of control tokens and bytes in a text: it is cut inside the names
        and encoded again. The space mark is written in bytes if possible: its piece means a space.
        """
        if self.token_texts.join(ids) == text.encode():
            return ids, False
        cuts = {match.start() + 1 for match in self._control_names.finditer(text)}
        if self._mark_ids:
            cuts |= {i for mark in re.finditer(SPACE_MARK, text) for i in mark.span()}
        if cuts:
            edges = sorted({0, *cuts, len(text)})
            parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
            pieces = [
                self._mark_ids if part == SPACE_MARK and self._mark_ids else part_ids
                for part, part_ids in zip(parts, self._encode_raw(parts), strict=True)
            ]
            again = np.concatenate(pieces).astype(np.int32)
            lossless = self.token_texts.join(again) == text.encode()
            ids = again if lossless or np.isin(ids, self._control).any() else ids
        ids = ids[~np.isin(ids, self._control)]
        return ids, self.decode(ids) != text

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def save(self, directory: Path) -> None:
        (directory / self.filename).write_bytes(self._content.encode())


def _not_a_tokenizer(path: Path, reason: object) -> TokenizerError:
    return TokenizerError(f"tokenizer = {str(path)!r} is no tokenizer.json: {reason}")


def _stated_tokens(path: Path) -> tuple[str | None, set[str]]:
    """The EOS token, or None, and all tokens that the configuration files name."""
    eos, names = None, set()
    for config in TOKENIZER_CONFIGS:
        beside = path.with_name(config)
        stated = read_json_or_empty(beside)
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
    if isinstance(tokens, dict):
        tokens = tokens.values()
    elif not isinstance(tokens, list):
        return set()
    names = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return {name for name in names if isinstance(name, str) and name}


_DROP_CHARACTERS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}


def _remove_edge_rules(rules: dict[str, Any]) -> str:
    """Removes rules for the ends of a text; returns what they put before it.

    >>> rules = {"normalizer": {"type": "Prepend", "prepend": "\u2581"}, "pre_tokenizer": None}
    >>> _remove_edge_rules(rules), rules["normalizer"]
    (' ', None)
    """
    prefix, normalizers = "", _flatten(rules.get("normalizer"), "normalizers")
    for rule in normalizers:
        if rule["type"] == "Prepend":
            prefix = rule["prepend"].replace(SPACE_MARK, " ")
    kept = [rule for rule in normalizers if rule["type"] not in ("Prepend", "Strip")]
    if len(kept) < len(normalizers):
        rules["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    drops_spaces = False
    for rule in _flatten(rules.get("pre_tokenizer"), "pretokenizers"):
        drops_spaces |= rule["type"] in _DROP_CHARACTERS or rule.get("behavior") == "Removed"
        scheme = "never" if rule.get("add_prefix_space") is False else "always"
        if rule["type"] == "Metaspace" and rule.get("prepend_scheme", scheme) != "never":
            prefix = " "
            if not drops_spaces:  # else this rule writes the dropped spaces
                rule.pop("add_prefix_space", None)
                rule["prepend_scheme"] = "never"
        elif rule["type"] == "ByteLevel" and rule.get("add_prefix_space", True):
            prefix = " "
            if not drops_spaces:
                rule["add_prefix_space"] = False
    return prefix


def _flatten(rule: dict[str, Any] | None, of_sequence: str) -> list[dict[str, Any]]:
    if not rule:
        return []
    if rule["type"] != "Sequence":
        return [rule]
    return [one for inner in rule[of_sequence] for one in _flatten(inner, of_sequence)]


def _decode_piece(piece: str, decoders: Sequence[dict[str, Any]]) -> str:
    for rule in decoders:
        if rule["type"] == "Metaspace":
            piece = piece.replace(rule.get("replacement", SPACE_MARK), " ")
        elif rule["type"] == "Replace" and "String" in rule["pattern"]:
            piece = piece.replace(rule["pattern"]["String"], rule["content"])
    return piece


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(_OTHERS)
}


def _byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece in GPT-2's byte alphabet of printable characters.

    >>> _byte_level_bytes("\u0120caf\u00c3\u00a9").decode()
    ' caf\u00e9'
    """
    if not all(character in BYTE_ALPHABET for character in piece):
        return piece.encode()
    return bytes(BYTE_ALPHABET[character] for character in piece)
