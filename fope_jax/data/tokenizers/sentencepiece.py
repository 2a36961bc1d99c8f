"""A SentencePiece BPE trained on the corpus: lossless and deterministic."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fope_jax.data.tokenizers.base import (
    SPACE_MARK,
    Tokenizer,
    TokenizerError,
    TokenTexts,
    byte_of_piece,
)
from fope_jax.extras import require

_LINE_END = re.compile(r"\n(?!\n)")
_PIECE_CHARS = 2048
_TRAINING_CHARS = 1000
TRAINING_TEXT_CHARS = 16_000_000
_DIGITS = "0123456789"


class SentencePieceTokenizer(Tokenizer):
    """A model of `train_sentencepiece`: lossless, pad 0, eos 1, unk 2.

    Runs of newlines are separate tokens, so a text cut after one keeps its tokens. Encoding thus
    takes linear time and uses every core.
    """

    kind = "sentencepiece"
    pad_id, eos_id = 0, 1
    filename = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = require("sentencepiece", "train").SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        self.fingerprint = self.fingerprint_of(model)
        self.token_texts = TokenTexts([self._token_text(i) for i in range(self.vocab_size)])
        self._mark_ids = [self.processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]

    @property
    def writes_spaces(self) -> bool:
        """Whether the space has a piece; older models may lack it."""
        return not self.processor.is_unknown(self.processor.piece_to_id(SPACE_MARK))

    @staticmethod
    def fingerprint_of(model: bytes) -> str:
        """The fingerprint of a serialised model, without loading it."""
        return hashlib.sha256(b"sentencepiece" + model).hexdigest()

    def _token_text(self, index: int) -> bytes:
        processor, piece = self.processor, self.processor.id_to_piece(index)
        if processor.is_control(index) or processor.is_unknown(index):
            return b""
        if processor.is_byte(index):
            return byte_of_piece(piece)
        return piece.replace(SPACE_MARK, " ").encode()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [
            [
                piece
                for part in re.split(f"({SPACE_MARK})", text)
                for piece in split_after_newlines(part, _PIECE_CHARS)
            ]
            for text in texts
        ]
        flat = [piece for of_text in pieces for piece in of_text]
        if len(flat) == 1:  # to start threads takes longer than to encode a sentence
            encoded = iter([self.processor.encode(flat[0])])
        else:
            encoded = iter(self.processor.encode(flat, num_threads=self.num_threads))
        return [
            _join(
                self._mark_ids if piece == SPACE_MARK else ids
                # Pieces first: after the last one zip must not take from ``encoded``.
                for piece, ids in zip(of_text, encoded, strict=False)
            )
            for of_text in pieces
        ]

    def token_id(self, name: str) -> int | None:
        index = self.processor.piece_to_id(name)
        return index if self.processor.id_to_piece(index) == name else None

    def save(self, directory: Path) -> None:
        (directory / self.filename).write_bytes(self.model)


def _join(ids: Iterable[list[int]]) -> np.ndarray:
    return np.array([index for part in ids for index in part], np.int32)


def split_after_newlines(text: str, chars: int) -> Iterator[str]:
    """Cuts after the first run of newlines that ends ``chars`` or more characters later.

    >>> list(split_after_newlines("one\\ntwo\\n\\nthree\\n", 4))
    ['one\\ntwo\\n\\n', 'three\\n']
    """
    start = 0
    while start < len(text):
        end = _LINE_END.search(text, start + chars)
        stop = end.end() if end else len(text)
        yield text[start:stop]
        start = stop


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a lossless BPE with single digits and byte fallback; deterministic.

    Of ``texts``, the first 16 million characters count. ``vocab_size`` includes pad, eos, unk, 256
    bytes and two newline symbols. TokenizerError: no text, or a size too large or small for it.
    """
    lines = list(_training_lines(texts))
    if not lines:
        raise TokenizerError("the training text has no characters to train a tokenizer on")
    tokenizer = SentencePieceTokenizer(_train(lines, vocab_size, _DIGITS))
    if not tokenizer.writes_spaces:
        # Spaces are rare in this text: without a piece each would be the three bytes of its mark.
        # Only then, because models of other text must stay the same to the byte.
        tokenizer = SentencePieceTokenizer(_train(lines, vocab_size, _DIGITS + SPACE_MARK))
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
            max_sentence_length=8 * _TRAINING_CHARS,  # bytes; longer lines would be skipped
            num_threads=1,  # stored in the model; more threads are not faster
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        # An option of its own program, which is not one of ours.
        reason = reason.partition(" or decrease character_coverage")[0]
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
        for line in re.split(rf"[\n\t\0{SPACE_MARK}]", text):
            yield from re.findall(
                rf".{{1,{_TRAINING_CHARS}}}(?= |$)|.{{1,{_TRAINING_CHARS}}}", line
            )
        if budget <= 0:
            return
