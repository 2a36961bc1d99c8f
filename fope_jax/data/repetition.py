"""Rows that repeat one sequence of tokens over and over, which OLMo's training leaves out."""

from __future__ import annotations

import numpy as np


def has_repetition(tokens: np.ndarray, max_period: int, count: int) -> np.ndarray:
    """Whether rows hold some sequence of 1 to ``max_period`` tokens ``count`` times in a row.

    Args:
      tokens: ``[R, T]``; negative numbers stand for padding, which repeats nothing.
      count: 2 or more.

    Returns:
      ``[R]`` bool.

    >>> rows = np.array([[5, 1, 2, 1, 2, 1, 2, 7], [5, 1, 2, 1, 2, 1, 3, 2]])
    >>> has_repetition(rows, max_period=2, count=3).tolist()
    [True, False]

    Reference: the instance filter of OLMo (Groeneveld et al. 2024), ``find_periodic_sequences``.
    """
    rows, length = tokens.shape
    found = np.zeros(rows, bool)
    for period in range(1, min(max_period, length // count) + 1):
        # A run of (count - 1) * period equal pairs begins after one period of its own.
        equal = (tokens[:, period:] == tokens[:, :-period]) & (tokens[:, period:] >= 0)
        run = (count - 1) * period
        sums = np.cumsum(np.pad(equal, ((0, 0), (1, 0))), axis=1, dtype=np.int32)
        found |= (sums[:, run:] - sums[:, :-run] == run).any(axis=1)
    return found
