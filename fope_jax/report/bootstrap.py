"""How much a number would move with other documents: percentile bootstrap of pooled sums.

Tokens of one document are not independent, so whole documents are drawn with replacement, and
every ratio is taken of the sums over what was drawn:

    ratio*_r = sum_d c_rd nats_d / sum_d c_rd tokens_d,    c_r ~ Multinomial(D, 1/D)

The interval goes from the 2.5th to the 97.5th percentile of ``ratio*``. The draws depend on the
number of documents alone: numbers of several contexts, or of several seeds, of the same documents
are paired. (`scipy.stats.bootstrap` draws anew for each number.)

Reference: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", Chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 1_000
SEED = 0
TAILS = (0.025, 0.975)
COVERAGE = 0.95


class Interval(NamedTuple):
    """Where the middle ``COVERAGE`` of the resampled numbers lies."""

    low: float
    high: float


def draws(documents: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each document is drawn: ``[resamples, documents]`` ints, rows sum to documents."""
    chances = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, chances, size=resamples)


def intervals(
    sums: Mapping[Any, np.ndarray],
    statistic: Callable[[dict[Any, np.ndarray]], Mapping[Any, np.ndarray]],
) -> dict[Any, Interval]:
    """An interval for each key of what ``statistic`` gives.

    Args:
      sums: key -> ``[D, ...]`` sums of each document, all of the same D documents; a document with
        none has zeros.
      statistic: pooled sums by key, ``[R, ...]``, the first axis over R resamples -> numbers by
        key, ``[R]``. NaN, as of a resample without a token, is not counted.

    Returns:
      ``{key: Interval}``; empty where there are fewer than two documents.
    """
    count = len(next(iter(sums.values()), ()))
    if count < 2:
        return {}
    drawn = draws(count).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        numbers = statistic({key: np.tensordot(drawn, x, axes=1) for key, x in sums.items()})
    known = {key: values[~np.isnan(values)] for key, values in numbers.items()}
    return {key: percentiles(values) for key, values in known.items() if len(values)}


def percentiles(values: Any) -> Interval:
    """The middle ``COVERAGE`` of ``values``, from one of them to another.

    >>> percentiles(range(1, 1001))
    Interval(low=25.0, high=975.0)
    """
    # Order statistics, not interpolated: between an infinite value and another there is no number.
    low, high = np.quantile(np.asarray(values, float), TAILS, method="inverted_cdf")
    return Interval(float(low), float(high))
