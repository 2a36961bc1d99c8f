"""Perplexity with a sliding window: every token of a stretch, with a bounded context before it.

Protocol ``sliding-window``: a window of ``context`` tokens moves over a stretch of text by
``stride`` tokens, and each window scores the targets that are new in it. From the second window on
a target is predicted from at least ``context - stride + 1`` tokens and at most ``context``. With
a stride of 1 all have the whole context; with a stride of ``context`` windows do not overlap. The
scored tokens are those of the stretch, the same at every context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fope_jax.evaluate.perplexity import Progress, document_rows, no_progress
from fope_jax.evaluate.scoring import Scorer, score_windows
from fope_jax.evaluate.windows import Windows, place_windows


def check_stride(stride: int, contexts: Sequence[int]) -> None:
    """Raises ValueError where tokens between two windows would be left out."""
    if not 1 <= stride <= min(contexts):
        raise ValueError(
            f"stride is {stride}, accepted: 1 to the shortest context of {min(contexts)} tokens; "
            "with a longer stride tokens between two windows would not be scored"
        )


def score_sliding(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    stride: int,
    num_windows: int,
    batch_tokens: int,
    progress: Progress = no_progress,
    bos: int | None = None,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores every target of stretches as long as the longest context, with each context.

    Args:
      scorer: the model.
      cache: a token cache, as in ``score_same_tokens``.
      contexts: tokens of the window.
      stride: tokens that it moves by, at most the shortest context.
      num_windows: stretches wanted over all documents; none overlap.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.
      bos: what each window begins with, in place of its first token; None changes nothing.

    Returns:
      One row for each context and document: ``context, scored_per_window, windows, nats, tokens,
      bytes, correct, document``, where ``windows`` counts stretches; and the stretches, which
      name the documents too short.

    Raises:
      ValueError: no document holds a stretch, or the stride is out of range.
    """
    check_stride(stride, contexts)
    longest = max(contexts)
    stretches = place_windows(cache.documents, longest=longest, scored=longest, total=num_windows)
    begin = stretches.stop - longest - 1
    targets = np.stack([cache.tokens(stop - longest, stop) for stop in stretches.stop])
    rows = []
    for context in sorted(contexts):
        nats, hits = slide(
            scorer,
            lambda i, start, stop: cache.tokens(begin[i] + start, begin[i] + stop),
            len(begin),
            length=longest,
            context=context,
            stride=stride,
            batch_tokens=batch_tokens,
            progress=lambda batches, context=context: progress(
                batches, desc=f"sliding window, context {context}"
            ),
            bos=bos,
        )
        shared = {"context": int(context), "scored_per_window": int(stride)}
        rows += document_rows(shared, stretches.document, nats, hits, targets, cache)
    return rows, stretches


def slide(
    scorer: Scorer,
    read: Callable[[int, int, int], np.ndarray],
    count: int,
    *,
    length: int,
    context: int,
    stride: int,
    batch_tokens: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    bos: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Slides a window over ``count`` stretches.

    Args:
      scorer: the model.
      read: (stretch, start, stop) -> its tokens ``[start, stop)``, of ``length + 1``.
      count: number of stretches W.
      length: targets of a stretch N; its tokens ``[0, N)`` are inputs.
      context: tokens of the window, at most N.
      stride: tokens that it moves by.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: wraps the iterable of batches.
      bos: as of ``score_sliding``.

    Returns:
      nats ``[W, N]`` float32 and hits ``[W, N]`` bool: entry ``i`` is of token ``i + 1``.
    """
    nats, hits = np.empty((count, length), np.float32), np.empty((count, length), bool)

    def score(ends: np.ndarray, scored: int) -> list[np.ndarray]:
        found = score_windows(
            scorer,
            lambda i: read(i // len(ends), ends[i % len(ends)] - context, ends[i % len(ends)] + 1),
            count * len(ends),
            context=context,
            scored=scored,
            batch_tokens=batch_tokens,
            progress=progress,
            bos=bos,
        )
        return [x.reshape(count, len(ends), scored) for x in found]

    first, *later = window_ends(length, context, stride)
    for whole, part in zip((nats, hits), score(np.array([first]), context), strict=True):
        whole[:, :first] = part[:, 0]
    if later:
        parts = score(np.array(later), stride)
        for index, (before, end) in enumerate(zip([first, *later], later, strict=False)):
            for whole, part in zip((nats, hits), parts, strict=True):
                whole[:, before:end] = part[:, index, stride - (end - before) :]
    return nats, hits


def window_ends(length: int, context: int, stride: int) -> list[int]:
    """Where the windows of a stretch end; each scores what lies after the end before it.

    >>> window_ends(10, 4, 3)
    [4, 7, 10]
    >>> window_ends(9, 4, 3)
    [4, 7, 9]
    """
    return [*range(context, length, stride), length]
