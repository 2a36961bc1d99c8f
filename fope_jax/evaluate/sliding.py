"""Perplexity with a sliding window: every token of a stretch, with a bounded context.

A window of ``context`` tokens moves over the stretch by ``stride`` tokens and scores the targets
that are new in it. After the first window, a target has ``context - stride + 1`` to ``context``
tokens of context. The scored tokens are the same at every context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fope_jax.config import ConfigError
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import document_rows, score_in_cache
from fope_jax.evaluate.scoring import Scorer
from fope_jax.evaluate.windows import Windows, place_windows


def check_stride(stride: int, contexts: Sequence[int]) -> None:
    """Raises ConfigError where a stride would skip tokens between two windows."""
    if not 1 <= stride <= min(contexts):
        raise ConfigError(
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
    """Scores stretches as long as the longest context, with each context.

    Rows have ``context, scored_per_window`` for each context and document; ``windows`` are
    stretches.
    """
    check_stride(stride, contexts)
    longest = max(contexts)
    stretches = place_windows(cache.documents, longest=longest, scored=longest, total=num_windows)
    begin, rows = stretches.stop - longest - 1, []
    for context in sorted(contexts):
        desc = f"sliding window, context {context}"
        scores = slide(scorer, cache, begin, longest, context, stride, desc=desc, **settings)
        fields = {"context": int(context), "scored_per_window": int(stride)}
        rows += document_rows(fields, stretches.document, *scores, cache)
    return rows, stretches


def slide(
    scorer: Scorer,
    cache: Any,
    begin: np.ndarray,
    length: int,
    context: int,
    stride: int,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nats, hits and targets ``[W, length]`` of stretches that begin at ``begin [W]``.

    Entry ``i`` is of token ``i + 1`` of the stretch, which has ``length + 1`` tokens.
    """
    shape = (len(begin), length)
    whole = np.empty(shape, np.float32), np.empty(shape, bool), np.empty(shape, np.int32)
    ends = window_ends(length, context, stride)
    # The first window scores ``context`` targets and later ones ``stride``: two compiled shapes.
    for group, scored in ((slice(0, 1), context), (slice(1, None), stride)):
        stops, starts = np.array(ends[group], np.int64), [0, *ends[:-1]][group]
        if not len(stops):
            continue
        windows = (begin[:, None] + stops - context).ravel()
        scores = score_in_cache(scorer, cache, windows, context, scored, **settings)
        for array, part in zip(whole, scores, strict=True):
            part = part.reshape(len(begin), len(stops), scored)
            for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                array[:, start:stop] = part[:, number, scored - (stop - start) :]
    return whole


def window_ends(length: int, context: int, stride: int) -> list[int]:
    """Where the windows of a stretch end; each scores the targets after the previous end.

    >>> window_ends(10, 4, 3)
    [4, 7, 10]
    >>> window_ends(9, 4, 3)
    [4, 7, 9]
    """
    return [*range(context, length, stride), length]
