"""Tokenizers with one interface: a trained SentencePiece BPE, bytes, and any tokenizer.json.

Encoding adds no tokens, so the tokens of two texts can be joined; `encode_documents` adds the
tokenizer's prefix, and EOS is added where documents are joined. A special token's name in a text
encodes to ordinary tokens. Decoding joins the bytes of tokens; special tokens have none.
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
    """A tokenizer's entry in the manifest of a cache; the inverse is `load_tokenizer`."""
    description: dict[str, Any] = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    if isinstance(tokenizer, JsonTokenizer):
        description["eos"] = tokenizer.eos
        description |= {"control": list(tokenizer.control)} if tokenizer.control else {}
    return description | {"fingerprint": tokenizer.fingerprint}


def load_tokenizer(directory: Path, description: dict[str, Any]) -> Tokenizer:
    """The tokenizer saved in a cache; TokenizerError if its file does not match the manifest."""
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
            # Compared before loading: of a damaged model the library only logs an error.
            tokenizer = SentencePieceTokenizer(model) if stored == fingerprint else None
        else:
            text, eos = path.read_bytes().decode(), str(description.get("eos"))
            tokenizer = JsonTokenizer(text, eos, description.get("control", ()))
            stored = tokenizer.fingerprint
            if fingerprint == JsonTokenizer.fingerprint_of(text, eos):
                # An older cache, whose fingerprint covers the unchanged rules.
                tokenizer.fingerprint = stored = fingerprint
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the libraries' exceptions do not name the file
        raise TokenizerError(f"{path} is damaged: {error}") from error
    if tokenizer is None or stored != fingerprint:
        raise TokenizerError(f"{path} is damaged: fingerprint {stored}, expected {fingerprint}")
    return tokenizer
