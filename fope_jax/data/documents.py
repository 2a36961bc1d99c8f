"""Documents as text and as tokens; needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.tokenizers import Tokenizer, encode_documents

DOCUMENTS_AT_ONCE = 64  # per tokenizer call, so that it can use every core
_CHARS_AT_ONCE = 4_000_000
NAME_FIELD = (
    "name that of the text: --config.data.text_field=NAME, of evaluate.texts "
    "--config.evaluate.text_field=NAME"
)


class CorpusError(ValueError):
    """Text that cannot be read; the message names the file and the offset or line."""


class Document(NamedTuple):
    """A text; ``name`` is a book, file, ``file:line`` or URL; ``bad`` says why it is unreadable."""

    name: str
    text: str
    bad: str = ""


class TokenizedDocuments(NamedTuple):
    """Documents of one corpus for the cache writer.

    Attributes:
      names: ``[D]``.
      tokens: ``[sum of lengths]``, those of each document end in EOS.
      lengths: ``[D]`` int64, tokens with EOS.
      bytes: ``[D]`` int64, sizes of the texts; 0 for one that is empty or bad.
      bad: ``[D]``, why a text is unreadable, or "".
      changed: ``[D]`` bool, whether the tokens decode to another text.
    """

    corpus: str
    names: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    bytes: np.ndarray
    bad: list[str]
    changed: np.ndarray


def group_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups of documents for one call of a tokenizer, with bounded text.

    >>> documents = [Document(f"d{i}", "x" * size) for i, size in enumerate((3_000_000, 10**6, 5))]
    >>> [[one.name for one in group] for group in group_documents(documents)]
    [['d0', 'd1'], ['d2']]
    """
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if len(group) == DOCUMENTS_AT_ONCE or size >= _CHARS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode_group(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Concatenated tokens of texts, each with EOS.

    Returns ``tokens [sum of n]`` int32, and of each text ``n [D]`` int64 tokens, ``bytes [D]``
    int64 and ``changed [D]`` bool, whether its tokens decode to another text.
    """
    ids, changed = encode_documents(tokenizer, texts)
    end = np.array([tokenizer.eos_id], np.int32)
    tokens = np.concatenate([part for one in ids for part in (one, end)])
    lengths = np.array([len(one) + 1 for one in ids], np.int64)
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    return tokens, lengths, sizes, np.array(changed, bool)


def interleave_by_tokens(
    sources: Sequence[Iterator[Mapping[str, Any]]], rates: Sequence[float], taken: Sequence[int]
) -> Iterator[Mapping[str, Any]]:
    """Mixes sources so that their shares of tokens follow ``rates``; nothing is random.

    The next example comes from the source with the fewest tokens (of ``targets``) for its rate; the
    mixture ends when that source does. ``taken`` has the tokens that each has yielded before.

    >>> pages = iter([{"targets": "aa"}] * 9)
    >>> books = iter([{"targets": "bbbb"}] * 2)
    >>> mixed = interleave_by_tokens([pages, books], [1, 1], [0, 0])
    >>> " ".join(x["targets"] for x in mixed)
    'aa bbbb aa aa bbbb aa aa'
    """
    tokens = list(taken)
    while True:
        turn = min(range(len(rates)), key=lambda i: tokens[i] / rates[i])
        example = next(sources[turn], None)
        if example is None:
            return
        # An empty document does not count: the writer leaves out its EOS.
        tokens[turn] += len(example["targets"]) if example.get("bytes", 1) else 0
        yield example
