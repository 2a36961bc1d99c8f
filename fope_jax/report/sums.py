"""Sums and counts of rows, and their ratios: files hold sums alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.report.rows import Row


class Sums(NamedTuple):
    """Sums over rows, scalars or arrays. Its methods are ratios, never clipped."""

    nats: Any = 0.0
    tokens: Any = 0
    bytes: Any = 0
    correct: Any = 0
    total: Any = 0
    found: Any = 0
    asked: Any = 0
    rank_sum: Any = 0

    def loss(self) -> Any:
        """Nats per token."""
        return self.nats / self.tokens

    def perplexity(self) -> Any:
        """``exp(nats / tokens)``; infinite on overflow.

        >>> f"{Sums(nats=20.794415, tokens=10).perplexity():.3f}"
        '8.000'
        """
        with np.errstate(over="ignore"):
            return np.exp(self.loss())

    def bits_per_byte(self) -> Any:
        """Bits per UTF-8 byte of the text; NaN without bytes."""
        return self.nats / math.log(2) / np.where(self.bytes, self.bytes, math.nan)

    def accuracy(self) -> Any:
        """Percent of trials that are right."""
        return 100 * (self.correct / self.total)

    def error_rate(self) -> Any:
        """Percent of trials that are wrong."""
        return 100 * (1 - self.correct / self.total)

    def mean_rank(self) -> Any:
        """Mean rank of the right answer among the candidates; NaN where not measured."""
        return self.rank_sum / self.total if self.rank_sum else math.nan

    def token_accuracy(self) -> Any:
        """Percent of tokens that are the model's most likely one."""
        return 100 * (self.correct / self.tokens)


Metric = Callable[[Sums], Any]


def add_up(rows: Iterable[Row]) -> Sums:
    rows = list(rows)
    return Sums(*(sum(row.get(name, 0) for row in rows) for name in Sums._fields))


def group(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """Rows by key; keys are sorted."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(sorted(groups.items()))


class Spread(NamedTuple):
    """Mean, sample standard deviation (NaN for one seed) and count."""

    mean: float
    deviation: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951, count=2)
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, math.nan, len(values))
    if not math.isfinite(mean):
        return Spread(mean, math.nan, len(values))
    squares = sum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(squares / (len(values) - 1)), len(values))
