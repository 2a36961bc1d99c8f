"""tokenizer.json for the tokenizers that have none: bytes, and SentencePiece models."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from typing import Any

from fope_jax.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from fope_jax.data.tokenizers.base import SPACE_MARK
from fope_jax.data.tokenizers.tokenizer_json import BYTE_ALPHABET
from fope_jax.extras import require
from fope_jax.interop.bpe_rules import bpe_rules

SPECIAL_TOKENS = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
_NUM_RANDOM_LINES = 160


def to_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer.json whose tokens are those of ``tokenizer``.

    Names of special tokens in a text are text: a reader must set ``split_special_tokens``, as
    tokenizer_config.json can.

    Raises ValueError, with the first text that shows it, if the tokens of `sample_lines` differ.
    """
    if isinstance(tokenizer, BytesTokenizer):
        rules = _bytes_rules(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        rules = _sentencepiece_rules(tokenizer)
    else:
        raise ValueError(f"a tokenizer of kind {tokenizer.kind!r} needs no conversion")
    content = json.dumps(rules, ensure_ascii=False, indent=1)
    if difference := first_difference(tokenizer, content):
        raise ValueError(difference)
    return content


def first_difference(tokenizer: Tokenizer, content: str) -> str | None:
    """Where a tokenizer.json gives other tokens than ``tokenizer``, on `sample_lines`; or None."""
    converted = require("tokenizers", "train").Tokenizer.from_str(content)
    converted.encode_special_tokens = True
    lines = sample_lines(tokenizer)
    for line, expected in zip(lines, tokenizer.encode_batch(lines), strict=True):
        ids = converted.encode(line, add_special_tokens=False).ids
        if ids != expected.tolist():
            return f"{line!r:.80} would be tokens {ids[:12]}, not {expected[:12].tolist()}"
    return None


# ---------------------------------------------------------------------------- rules


def _bytes_rules(tokenizer: BytesTokenizer) -> dict[str, Any]:
    vocab = {name: index for index, name in enumerate(SPECIAL_TOKENS.values())}
    by_byte = sorted(BYTE_ALPHABET.items(), key=lambda item: item[1])
    vocab |= {character: len(SPECIAL_TOKENS) + byte for character, byte in by_byte}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return bpe_rules(
        vocab,
        merges=[],
        added=_added(vocab),
        unk_token=SPECIAL_TOKENS["unk"],
        pre_tokenizer=byte_level | {"use_regex": False},
        decoder=byte_level | {"use_regex": False},
    )


def _sentencepiece_rules(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Pieces with plain spaces, so that the space mark in a text stays what it is, three bytes."""
    processor = tokenizer.processor
    vocab = {
        processor.id_to_piece(index).replace(SPACE_MARK, " "): index
        for index in range(tokenizer.vocab_size)
    }
    if len(vocab) < tokenizer.vocab_size:
        raise ValueError("two of its pieces are one where the space mark is a space")
    is_apart = [
        processor.is_byte(i)
        or processor.is_control(i)
        or processor.is_unknown(i)
        or "\n" in processor.id_to_piece(i)  # matched before any merge
        for i in range(tokenizer.vocab_size)
    ]
    pieces = {piece: index for piece, index in vocab.items() if not is_apart[index]}
    ranked = sorted(pieces, key=lambda piece: (-processor.get_score(pieces[piece]), pieces[piece]))
    newlines = [(index, piece, False) for piece, index in vocab.items() if "\n" in piece]
    return bpe_rules(
        vocab,
        merges=[list(pair) for piece in ranked for pair in _pairs(piece, pieces)],
        added=[*_added(vocab), *newlines],
        unk_token=SPECIAL_TOKENS["unk"],
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        byte_fallback=True,
    )


def _added(vocab: dict[str, int]) -> list[tuple[int, str, bool]]:
    return [(vocab[name], name, True) for name in SPECIAL_TOKENS.values()]


def _pairs(piece: str, pieces: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that join to ``piece``, the one with the longest beginning first."""
    for cut in range(len(piece) - 1, 0, -1):
        if piece[:cut] in pieces and piece[cut:] in pieces:
            yield piece[:cut], piece[cut:]


# ---------------------------------------------------------------------------- lines to compare


def sample_lines(tokenizer: Tokenizer) -> list[str]:
    """200 texts: scripts, spaces, newlines, names of tokens, and pieces in random order."""
    rng = random.Random(0)
    names = [*SPECIAL_TOKENS.values(), "<s>", "<0x41>", "<|endoftext|>", SPACE_MARK]
    lines = [
        "",
        "The quick brown fox jumps over the lazy dog, 1234567890 times; it's 3.14% of £5.",
        "def f(x):\n\treturn {'a': [x ** 2]}  # spaces, tabs\r\n",
        *(" " * count + "a" + " " * count for count in (1, 2, 3, 5, 9, 33)),
        *("\n" * count for count in (1, 2, 3, 4, 7)),
        *(f"a{name}b {name} {name}{name}" for name in names),
        "Ünïcödé, Ελληνικά, Русский, עברית, العربية, हिन्दी, 日本語 한국어 中文",
        "👩‍👩‍👧‍👦 🇪🇺 e\u0301 \u00e9 \u200b\ufeff \u0000\u0007 \U0010ffff",
        "a" * 300 + "\n" + "b " * 300,
    ]
    texts = [text for i in range(tokenizer.vocab_size) if (text := tokenizer.decode([i]))]
    scripts = [chr(code) for code in range(0x20, 0x2FFF) if unicodedata.category(chr(code)) != "Cn"]
    for source in (texts, scripts, [*texts, *scripts, " ", "\n", *names]):
        for _ in range(_NUM_RANDOM_LINES // 3):
            lines.append("".join(rng.choices(source, k=rng.randint(2, 60))))
    while len(lines) < 200:
        lines.append("".join(rng.choices("ab  \n\n019", k=rng.randint(2, 80))))
    return lines
