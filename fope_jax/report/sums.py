"""Sums and counts of rows, the ratios that are shown of them, and their spread over seeds.

Files hold sums and counts; every ratio of the report is taken here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from fope_jax.report.rows import Row


class Sums(NamedTuple):
    """Sums over rows; ratios are properties and never clipped."""

    nats: float = 0.0
    tokens: float = 0
    bytes: float = 0
    correct: float = 0
    total: float = 0
    found: float = 0
    asked: float = 0
    rank_sum: float = 0

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(nats / tokens)``; infinite where that is beyond a float.

        >>> round(Sums(nats=20.794415, tokens=10).perplexity, 3)
        8.0
        """
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits a UTF-8 byte of the text; NaN where no byte was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def accuracy(self) -> float:
        """Share of trials that were right."""
        return self.correct / self.total

    @property
    def mean_rank(self) -> float:
        """Rank of the right answer among the candidates; NaN where none was taken."""
        return self.rank_sum / self.total if self.rank_sum else math.nan

    @property
    def token_accuracy(self) -> float:
        """Share of tokens that the model holds most likely."""
        return self.correct / self.tokens


def add_up(rows: Iterable[Row]) -> Sums:
    """Pools rows: sums of every field of ``Sums`` that they have."""
    rows = list(rows)
    return Sums(*(sum(row.get(name, 0) for row in rows) for name in Sums._fields))


def group(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """Rows by key, keys in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(sorted(groups.items()))


class Spread(NamedTuple):
    """A number over seeds: mean, sample standard deviation (NaN of one seed) and count."""

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
    squares = sum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(squares / (len(values) - 1)), len(values))
