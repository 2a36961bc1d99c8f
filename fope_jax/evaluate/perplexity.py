"""Loss by context length and by position, within held-out documents.

- ``same-tokens`` scores the same targets at every context length. Only the text before them grows,
  so a difference is the effect of the context.
- ``long-window`` scores every target of a long window, by position. Buckets of positions hold
  different tokens: compare variants within a bucket.
- ``from-start`` reads documents from their first token, so a position is the distance since the
  document's start. Far buckets hold only the longer documents.

The first token of a window is not scored. ``bos`` replaces it, so the same tokens are scored; in
``from-start`` it precedes the text, and all of that is scored. The end-of-document token is 0
bytes.

All text protocols (``sliding`` and ``packed`` too) take lengths in tokens, the largest number of
windows, blocks or documents (evenly spaced), and as ``settings`` the ``batch_tokens``, ``progress``
and ``bos`` of ``score_windows``. They return the windows, and rows of sums for each document:
``windows, nats, tokens, bytes, correct, document`` and the fields that each names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fope_jax.config import ConfigError
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.scoring import Scorer, score_windows
from fope_jax.evaluate.windows import Windows, place_windows, position_buckets, share_evenly


def token_sums(
    nats: np.ndarray, hits: np.ndarray, targets: np.ndarray, token_bytes: np.ndarray
) -> dict[str, float | int]:
    """Sums over any set of scored targets, in float64.

    >>> token_sums(np.ones(2), np.array([True, False]), np.array([3, 0]), np.array([1, 1, 1, 4]))
    {'nats': 2.0, 'tokens': 2, 'bytes': 5, 'correct': 1}
    """
    return {
        "nats": float(nats.sum(dtype=np.float64)),
        "tokens": int(targets.size),
        "bytes": int(token_bytes[targets].sum(dtype=np.int64)),
        "correct": int(hits.sum()),
    }


def document_rows(
    fields: dict[str, Any],
    document: np.ndarray,
    nats: np.ndarray,
    hits: np.ndarray,
    targets: np.ndarray,
    cache: Any,
    first: np.ndarray | None = None,
) -> list[Row]:
    """One row for each document with the sums over its targets, in the order of the cache.

    Args:
      fields: fields of every row.
      document: ``[W]`` or ``[W, S]`` int, document of each window or target; -1 is not scored.
      nats, hits, targets: ``[W, S]``.
      first: ``[W, S]`` bool, targets that are the first token of their document. Bytes of the
        tokenizer's prefix, which that token includes, are subtracted.

    Returns:
      Rows ``**fields, windows, nats, tokens, bytes, correct, document``. ``windows`` counts windows
      with a scored target of the document.
    """
    owners = np.broadcast_to(document.reshape(len(nats), -1), nats.shape).ravel()
    order = np.argsort(owners, kind="stable")
    indices, begin = np.unique(owners[order], return_index=True)
    rows = []
    for index, chosen in zip(indices, np.split(order, begin[1:]), strict=True):
        if index < 0:
            continue
        scored = nats.ravel()[chosen], hits.ravel()[chosen], targets.ravel()[chosen]
        sums = token_sums(*scored, cache.tokenizer.token_bytes)
        if first is not None and first.ravel()[chosen].any():
            sums["bytes"] -= len(getattr(cache.tokenizer, "prefix", "").encode())
        windows = len(np.unique(chosen // nats.shape[1]))
        name = str(cache.documents["name"][index])
        rows.append({**fields, "windows": windows, **sums, "document": name})
    return rows


def bucket_rows(
    context: int,
    training_length: int,
    document: np.ndarray,
    nats: np.ndarray,
    hits: np.ndarray,
    targets: np.ndarray,
    cache: Any,
    first: np.ndarray | None = None,
) -> list[Row]:
    """``document_rows`` for each bucket of positions, with fields ``context`` and ``bucket``."""
    rows = []
    document = np.broadcast_to(document.reshape(len(nats), -1), nats.shape)
    for start, stop in position_buckets(context, training_length):
        fields, part = {"context": int(context), "bucket": [start, stop]}, np.s_[:, start:stop]
        scored = document[part], nats[part], hits[part], targets[part]
        rows += document_rows(fields, *scored, cache, None if first is None else first[part])
    return rows


def score_in_cache(
    scorer: Scorer, cache: Any, begin: np.ndarray, context: int, scored: int, **settings: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nats, hits and targets of windows that begin at ``begin [W]`` in the cache."""

    def read(i: int) -> np.ndarray:
        return cache.tokens(begin[i], begin[i] + context + 1)

    count = len(begin)
    nats, hits = score_windows(scorer, read, count, context=context, scored=scored, **settings)
    return nats, hits, np.stack([read(i)[-scored:] for i in range(count)])


def check_scored(scored: int, contexts: Sequence[int]) -> None:
    """Raises ConfigError where a window would have fewer tokens than are scored."""
    if scored > min(contexts):
        raise ConfigError(
            f"scored_tokens is {scored}, more than the shortest context of {min(contexts)} "
            "tokens; all scored tokens must fit into every window"
        )


def score_same_tokens(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    scored: int,
    num_windows: int,
    **settings: Any,
) -> tuple[list[Row], Windows]:
    """Scores the ``scored`` last targets of windows, the same ones at every context.

    Returns:
      Rows for each context and document with ``context, scored_per_window``.

    Raises:
      ValueError: no document holds the longest window, or ``scored`` exceeds the shortest.
    """
    check_scored(scored, contexts)
    longest = max(contexts)
    windows = place_windows(cache.documents, longest=longest, scored=scored, total=num_windows)
    rows = []
    for context in sorted(contexts):
        begin, desc = windows.stop - context - 1, f"same tokens, context {context}"
        scores = score_in_cache(scorer, cache, begin, context, scored, desc=desc, **settings)
        fields = {"context": int(context), "scored_per_window": int(scored)}
        rows += document_rows(fields, windows.document, *scores, cache)
    return rows, windows


def score_positions(
    scorer: Scorer,
    cache: Any,
    *,
    context: int,
    training_length: int,
    num_windows: int,
    **settings: Any,
) -> tuple[list[Row], Windows]:
    """Scores every target of long windows, by the position of the token that predicts it.

    Returns:
      Rows for each bucket and document with ``context, bucket``. A bucket is ``[start, stop)``;
      ``training_length`` is an edge between two.
    """
    windows = place_windows(cache.documents, longest=context, scored=context, total=num_windows)
    begin, desc = windows.stop - context - 1, f"by position, window {context}"
    scores = score_in_cache(scorer, cache, begin, context, context, desc=desc, **settings)
    return bucket_rows(context, training_length, windows.document, *scores, cache), windows


def score_from_start(
    scorer: Scorer,
    cache: Any,
    *,
    context: int,
    training_length: int,
    num_documents: int,
    bos: int | None = None,
    **settings: Any,
) -> tuple[list[Row], Windows]:
    """Scores documents from their first token. Returns rows as of ``score_positions``.

    Raises:
      ValueError: no document has two tokens.
    """
    documents = cache.documents
    before = [] if bos is None else [bos]
    lengths = np.asarray(documents["length"], np.int64) + len(before)
    lengths = np.minimum(lengths, context + 1)
    chosen = np.flatnonzero(share_evenly(lengths >= 2, num_documents))
    if not len(chosen):
        raise ValueError(
            f"none of {len(documents)} documents has 2 tokens, one to read and one to score"
        )
    start, length = np.asarray(documents["start"], np.int64)[chosen], lengths[chosen]
    texts = np.zeros((len(chosen), context + 1), np.int32)  # padding is not scored
    for row, begin, size in zip(texts, start, length, strict=True):
        row[:size] = [*before, *cache.tokens(begin, begin + size - len(before))]
    sizes, desc = {"context": context, "scored": context}, f"from the start, window {context}"
    nats, hits = score_windows(
        scorer, lambda i: texts[i], len(texts), **sizes, desc=desc, **settings
    )
    document = np.where(np.arange(1, context + 1) < length[:, None], chosen[:, None], -1)
    first = np.zeros(document.shape, bool)
    first[:, 0] = bos is not None  # BOS then predicts the first token of the document
    scores = nats, hits, texts[:, 1:]
    rows = bucket_rows(context, training_length, document, *scores, cache, first)
    too_short = tuple(str(name) for name in documents["name"][lengths < 2])
    return rows, Windows(start + length - len(before), chosen, too_short)
