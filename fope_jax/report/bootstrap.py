"""How much a number would move with other documents: percentile bootstrap of pooled sums.

Tokens of one document are not independent, so documents are drawn with replacement, whole, and
every ratio is taken of the sums over what was drawn:

    ratio*_r = sum_d c_rd nats_d / sum_d c_rd tokens_d,    c_r ~ Multinomial(D, 1/D)

The interval goes from the 2.5th to the 97.5th percentile of ``ratio*``. The draws depend on the
number of documents alone, so numbers that are taken of several contexts, or of several seeds on the
same documents, are paired.

Reference: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", Chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    sums: Mapping[Any, np.ndarray], statistic: Callable[[dict[Any, Any]], Mapping[Any, float]]
) -> dict[Any, Interval]:
    """An interval for each key of what ``statistic`` gives.

    Args:
      sums: key -> ``[D, ...]`` sums of each document, all of the same D documents; a document with
        none has zeros.
      statistic: pooled sums ``[...]`` by key, as lists -> numbers by key. A key that it leaves out
        of a resample, as where that has no token, is not counted there.

    Returns:
      ``{key: Interval}``; empty where there are fewer than two documents.
    """
    count = len(next(iter(sums.values()), ()))
    if count < 2:
        return {}
    chosen = draws(count).astype(np.float64)
    pooled = {key: np.tensordot(chosen, own, axes=1).tolist() for key, own in sums.items()}
    found: dict[Any, list[float]] = {}
    for index in range(len(chosen)):
        for key, value in statistic({key: own[index] for key, own in pooled.items()}).items():
            found.setdefault(key, []).append(value)
    return {key: percentiles(values) for key, values in found.items()}


def percentiles(values: Sequence[float]) -> Interval:
    """The middle ``COVERAGE`` of ``values``, from one of them to another.

    >>> percentiles(range(1, 1001))
    Interval(low=25.0, high=975.0)
    """
    # Order statistics, not interpolated: between an infinite value and another there is no number.
    low, high = np.quantile(np.asarray(values, float), TAILS, method="inverted_cdf")
    return Interval(float(low), float(high))
