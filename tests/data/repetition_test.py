"""Rows that repeat themselves: against the definition, and against sequences made by hand."""

import numpy as np
import pytest

from fope_jax.data.loader import Loader
from fope_jax.data.repetition import has_repetition
from tests.data.loader_test import LENGTHS, Stream


def by_definition(row, max_period, count):
    """Some ``period * count`` tokens are one sequence of ``period``, ``count`` times."""
    for period in range(1, max_period + 1):
        for start in range(len(row) - period * count + 1):
            part = row[start : start + period * count]
            if (part >= 0).all() and (part.reshape(count, period) == part[:period]).all():
                return True
    return False


@pytest.mark.parametrize(("max_period", "count"), [(1, 3), (2, 3), (3, 4), (13, 3)])
def test_it_is_what_the_definition_says(max_period, count):
    """Few different tokens, so that about half of the rows repeat something; some padding."""
    rng = np.random.default_rng(count)
    rows = rng.integers(0, 3 if max_period < 13 else 9, (200, 30))
    rows[::2, 22:] = -1
    expected = [by_definition(row, max_period, count) for row in rows]
    assert 10 < sum(expected) < 190
    np.testing.assert_array_equal(has_repetition(rows, max_period, count), expected)


@pytest.mark.parametrize("start", [0, 5, 512 - 13 * 32])
def test_the_filter_of_olmo_at_its_edges(start):
    """13 tokens 32 times, wherever they begin; one token less, or 14 tokens, are let through."""
    row = np.arange(1000, 1512)
    row[start : start + 13 * 32] = np.tile(np.arange(13), 32)
    shorter, longer = row.copy(), np.arange(1000, 1512)
    shorter[start + 13 * 32 - 1] = 99
    longer[: 14 * 32] = np.tile(np.arange(14), 32)
    assert has_repetition(np.stack([row, shorter, longer]), 13, 32).tolist() == [True, False, False]


def test_such_rows_have_weight_0_and_nothing_else_changes():
    class Repeating(Stream):
        def tokens(self, start, stop):
            tokens = super().tokens(start, stop)
            return np.where(np.arange(start, stop) // 24 % 3 == 1, 7, tokens)  # every third window

    fields = dict(length=24, batch_size=6, seed=1, packing="windows")
    plain = Loader(Repeating(LENGTHS), **fields)
    filtered = Loader(Repeating(LENGTHS), **fields, max_repeats=12, repeat_tokens=3)
    left_out = 0
    for step in range(4):
        one, other = plain.batch(step), filtered.batch(step)
        rows = (one.tokens == 7).all(axis=1)
        left_out += rows.sum()
        assert not other.weights[rows].any()
        np.testing.assert_array_equal(other.weights[~rows], one.weights[~rows])
        for leaf, same in zip(one[:4], other[:4], strict=True):
            np.testing.assert_array_equal(leaf, same)
    assert left_out > 3
