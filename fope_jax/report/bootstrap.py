"""Percentile bootstrap over documents: how far a pooled ratio varies with the documents drawn.

Tokens of one document are correlated, so whole documents are drawn with replacement:

    ratio*_r = sum_d c_rd nats_d / sum_d c_rd tokens_d,    c_r ~ Multinomial(D, 1/D)

The interval is the 2.5th to 97.5th percentile of ``ratio*``. The draws depend on D alone, which
pairs contexts and seeds of the same documents; `scipy.stats.bootstrap` draws anew for each number.
Of few documents there is no interval: over 3, a bootstrap that says 95% covers about 75%.

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
LEAST_DOCUMENTS = 10


class Interval(NamedTuple):
    """The middle ``COVERAGE`` of the resampled numbers."""

    low: float
    high: float


def draws(documents: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each document is drawn: ``[resamples, documents]`` ints."""
    chances = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, chances, size=resamples)


def intervals(
    sums: Mapping[Any, np.ndarray],
    statistic: Callable[[dict[Any, np.ndarray]], Mapping[Any, np.ndarray]],
) -> dict[Any, Interval]:
    """A bootstrap interval for each number of ``statistic``; empty below `LEAST_DOCUMENTS`.

    Args:
      sums: key -> ``[D, ...]`` sums of each of the same D documents; zeros where one has no tokens.
      statistic: resampled sums by key, ``[R, ...]`` -> numbers by key, ``[R]``; NaN is ignored.
    """
    count = len(next(iter(sums.values()), ()))
    if count < LEAST_DOCUMENTS:
        return {}
    drawn = draws(count).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        numbers = statistic({key: np.tensordot(drawn, x, axes=1) for key, x in sums.items()})
    known = {key: values[~np.isnan(values)] for key, values in numbers.items()}
    return {key: percentiles(values) for key, values in known.items() if len(values)}


def percentiles(values: Any) -> Interval:
    """The middle ``COVERAGE`` of ``values``; both ends are values themselves.

    >>> percentiles(range(1, 1001))
    Interval(low=25.0, high=975.0)
    """
    # No interpolation: it gives NaN next to an infinite value.
    low, high = np.quantile(np.asarray(values, float), TAILS, method="inverted_cdf")
    return Interval(float(low), float(high))
