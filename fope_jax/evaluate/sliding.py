"""Perplexity with a sliding window: every token of a stretch, with a bounded context before it.

Protocol ``sliding-window``: a window of ``context`` tokens moves over a stretch of text by
``stride`` tokens, and each window scores the targets that are new in it. From the second window on
a target is predicted from at least ``context - stride + 1`` tokens and at most ``context``. With
a stride of 1 all have the whole context; with a stride of ``context`` windows do not overlap. The
scored tokens are those of the stretch, the same at every context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import document_rows
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
    **settings: Any,
) -> tuple[list[Row], Windows]:
    """Scores every target of stretches as long as the longest context, with each context.

    Arguments that all protocols take are described in ``perplexity``.

    Args:
      contexts: tokens of the window.
      stride: tokens that it moves by, at most the shortest context.
      num_windows: stretches wanted over all documents; none overlap.

    Returns:
      Rows for each context and document with ``context, scored_per_window``, where ``windows``
      counts stretches; and the stretches.

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
            desc=f"sliding window, context {context}",
            **settings,
        )
        fields = {"context": int(context), "scored_per_window": int(stride)}
        rows += document_rows(fields, stretches.document, nats, hits, targets, cache)
    return rows, stretches


def slide(
    scorer: Scorer,
    read: Callable[[int, int, int], np.ndarray],
    count: int,
    *,
    length: int,
    context: int,
    stride: int,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Slides a window over ``count`` stretches.

    Args:
      scorer: the model.
      read: (stretch, start, stop) -> its tokens ``[start, stop)``, of ``length + 1``.
      count: number of stretches W.
      length: targets of a stretch N; its tokens ``[0, N)`` are inputs.
      context: tokens of the window, at most N.
      stride: tokens that it moves by.
      **settings: passed on to ``score_windows``.

    Returns:
      nats ``[W, N]`` float32 and hits ``[W, N]`` bool: entry ``i`` is of token ``i + 1``.
    """
    nats, hits = np.empty((count, length), np.float32), np.empty((count, length), bool)
    ends = window_ends(length, context, stride)
    # The first window scores all of its targets, later ones another number: two shapes.
    for group, scored in ((slice(0, 1), context), (slice(1, None), stride)):
        stops, starts = ends[group], [0, *ends[:-1]][group]
        if not stops:
            continue

        def read_window(i: int, stops=stops) -> np.ndarray:
            stretch, number = divmod(i, len(stops))
            return read(stretch, stops[number] - context, stops[number] + 1)

        scores = score_windows(
            scorer, read_window, count * len(stops), context=context, scored=scored, **settings
        )
        for whole, part in zip((nats, hits), scores, strict=True):
            part = part.reshape(count, len(stops), scored)
            for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                whole[:, start:stop] = part[:, number, scored - (stop - start) :]
    return nats, hits


def window_ends(length: int, context: int, stride: int) -> list[int]:
    """Where the windows of a stretch end; each scores what lies after the end before it.

    >>> window_ends(10, 4, 3)
    [4, 7, 10]
    >>> window_ends(9, 4, 3)
    [4, 7, 9]
    """
    return [*range(context, length, stride), length]
