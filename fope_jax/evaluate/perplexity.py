"""Loss against context length, and loss by position: sums of nats over held-out documents.

Protocol ``same-tokens``: the same targets are scored at every context length, and only the text
before them grows. A difference between two lengths is then the effect of the context alone.

Protocol ``long-window``: every target of a long window is scored once, sorted by its position.
Buckets of positions hold different tokens, so only variants are comparable at a bucket, and
buckets of one variant only as far as the text is alike throughout a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fope_jax.evaluate.scoring import Scorer, score_windows
from fope_jax.evaluate.windows import Windows, place_windows, position_buckets

Progress = Callable[..., Iterable[int]]


def plain(batches: Iterable[int], **_: Any) -> Iterable[int]:
    """The progress bar that shows nothing."""
    return batches


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


def score_same_tokens(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    scored: int,
    num_windows: int,
    batch_tokens: int,
    progress: Progress = plain,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores the same targets with each number of tokens before them.

    Args:
      scorer: the model.
      cache: a token cache: ``documents``, ``tokens(start, stop)`` and ``tokenizer.token_bytes``.
      contexts: window lengths in tokens. Targets are chosen so that the longest fits into their
        document.
      scored: targets scored at the end of each window, at most the shortest context.
      num_windows: windows wanted over all documents.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``, e.g. ``tqdm``.

    Returns:
      One row for each context and document: ``context, scored_per_window, windows, nats, tokens,
      bytes, correct, document``; and the windows, which name the documents too short.

    Raises:
      ValueError: no document holds the longest window, or ``scored`` exceeds the shortest.
    """
    if scored > min(contexts):
        raise ValueError(
            f"scored_tokens is {scored}, more than the shortest context of {min(contexts)} "
            "tokens; all scored tokens must fit into every window"
        )
    documents = cache.documents
    windows = place_windows(documents, longest=max(contexts), scored=scored, total=num_windows)
    targets = np.stack([cache.tokens(stop - scored, stop) for stop in windows.stop])
    rows = []
    for context in sorted(contexts):
        nats, hits = score_windows(
            scorer,
            lambda i, context=context: cache.tokens(windows.stop[i] - context - 1, windows.stop[i]),
            len(windows.stop),
            context=context,
            scored=scored,
            batch_tokens=batch_tokens,
            progress=lambda batches, context=context: progress(
                batches, desc=f"same tokens, context {context}"
            ),
        )
        for document in np.unique(windows.document):
            own = windows.document == document
            rows.append(
                {
                    "context": int(context),
                    "scored_per_window": int(scored),
                    "windows": int(own.sum()),
                    **token_sums(nats[own], hits[own], targets[own], cache.tokenizer.token_bytes),
                    "document": str(documents["name"][document]),
                }
            )
    return rows, windows


def score_positions(
    scorer: Scorer,
    cache: Any,
    *,
    context: int,
    training_length: int,
    num_windows: int,
    batch_tokens: int,
    progress: Progress = plain,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores every target of long windows, and sums by position of the token that predicts it.

    Args:
      scorer: the model.
      cache: a token cache, as in ``score_same_tokens``.
      context: tokens of a window.
      training_length: tokens the model was trained on; an edge between two buckets.
      num_windows: windows wanted over all documents; none overlap.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.

    Returns:
      One row for each bucket of positions ``[start, stop)``: ``context, bucket, windows, nats,
      tokens, bytes, correct``; and the windows, which name the documents too short.
    """
    windows = place_windows(cache.documents, longest=context, scored=context, total=num_windows)
    nats, hits = score_windows(
        scorer,
        lambda i: cache.tokens(windows.stop[i] - context - 1, windows.stop[i]),
        len(windows.stop),
        context=context,
        scored=context,
        batch_tokens=batch_tokens,
        progress=lambda batches: progress(batches, desc=f"by position, window {context}"),
    )
    targets = np.stack([cache.tokens(stop - context, stop) for stop in windows.stop])
    rows = []
    for start, stop in position_buckets(context, training_length):
        part = np.s_[:, start:stop]
        rows.append(
            {
                "context": int(context),
                "bucket": [start, stop],
                "windows": len(windows.stop),
                **token_sums(nats[part], hits[part], targets[part], cache.tokenizer.token_bytes),
            }
        )
    return rows, windows
