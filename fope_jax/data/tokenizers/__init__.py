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

from pathlib import Path
from typing import Any

from fope_jax.data.tokenizers.base import BytesTokenizer as BytesTokenizer
from fope_jax.data.tokenizers.base import Tokenizer as Tokenizer
from fope_jax.data.tokenizers.base import TokenizerError as TokenizerError
from fope_jax.data.tokenizers.base import encode_documents as encode_documents
from fope_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer as SentencePieceTokenizer
from fope_jax.data.tokenizers.sentencepiece import train_sentencepiece as train_sentencepiece
from fope_jax.data.tokenizers.tokenizer_json import JsonTokenizer as JsonTokenizer


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a cache's manifest says of its tokenizer; the inverse is `load_tokenizer`."""
    description: dict[str, Any] = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    if isinstance(tokenizer, JsonTokenizer):
        description["eos"] = tokenizer.eos
        description |= {"control": list(tokenizer.control)} if tokenizer.control else {}
    return description | {"fingerprint": tokenizer.fingerprint}


def load_tokenizer(directory: Path, description: dict[str, Any]) -> Tokenizer:
    """The tokenizer saved in a cache.

    Raises:
      TokenizerError: its file is not the one that the manifest describes.
    """
    kind, fingerprint = description["kind"], description["fingerprint"]
    if kind == BytesTokenizer.kind:
        return BytesTokenizer()
    files = {cls.kind: cls.filename for cls in (SentencePieceTokenizer, JsonTokenizer)}
    if kind not in files:
        accepted = ", ".join([BytesTokenizer.kind, *files])
        raise TokenizerError(f"{directory}: tokenizer kind {kind!r}; accepted: {accepted}")
    path = directory / files[kind]
    try:
        if kind == SentencePieceTokenizer.kind:
            model = path.read_bytes()
            stored = SentencePieceTokenizer.fingerprint_of(model)
            # Compared before it is loaded: the library only logs that it cannot load a model.
            tokenizer = SentencePieceTokenizer(model) if stored == fingerprint else None
        else:
            text, eos = path.read_text(encoding="utf-8"), str(description.get("eos"))
            tokenizer = JsonTokenizer(text, eos, description.get("control", ()))
            stored = tokenizer.fingerprint
            if fingerprint == JsonTokenizer.fingerprint_of(text, eos):
                # A cache from before the rules at a text's ends were left out.
                tokenizer.fingerprint = stored = fingerprint
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # both libraries raise kinds of their own, without the file's name
        raise TokenizerError(f"{path} is damaged: {error}") from error
    if tokenizer is None or stored != fingerprint:
        raise TokenizerError(f"{path} is damaged: fingerprint {stored}, expected {fingerprint}")
    return tokenizer
