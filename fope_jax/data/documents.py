"""Documents as text and as tokens; needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.tokenizers import Tokenizer, encode_documents

DOCUMENTS_AT_ONCE = 64  # per tokenizer call, so that it can use every core


class CorpusError(ValueError):
    """Text that cannot be read; the message names the file and the offset or line."""


class Document(NamedTuple):
    """A text; ``name`` is a book, file, ``file:line`` or URL; ``bad`` says why it is unreadable."""

    name: str
    text: str
    bad: str = ""


class TokenizedDocument(NamedTuple):
    """A document for the cache writer: ``tokens`` end in EOS; ``bytes`` is the size of the text.

    ``bad`` says why the text is unreadable. ``changed``: the tokens decode to another text.
    """

    corpus: str
    name: str
    tokens: np.ndarray
    bytes: int
    bad: str = ""
    changed: bool = False


def encode_group(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Concatenated tokens of texts, each with EOS.

    Returns ``tokens [sum of n]`` int32, and of each text ``n [D]`` int64 tokens, ``bytes [D]``
    int64 and ``changed [D]`` bool, whether its tokens decode to another text.
    """
    ids, changed = encode_documents(tokenizer, texts)
    tokens = np.concatenate([part for one in ids for part in (one, [tokenizer.eos_id])])
    lengths = np.array([len(one) + 1 for one in ids], np.int64)
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    return tokens.astype(np.int32), lengths, sizes, np.array(changed, bool)


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
