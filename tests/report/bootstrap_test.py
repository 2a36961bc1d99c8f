"""Intervals over documents: against closed forms and SciPy's bootstrap, whole documents, paired."""

import math

import numpy as np
import pytest
from scipy import stats

from fope_jax.report import bootstrap
from fope_jax.report.bootstrap import LEAST_DOCUMENTS, draws, intervals, percentiles


def ratio(pooled):
    return {key: sums[:, 0] / sums[:, 1] for key, sums in pooled.items()}


def documents(count, seed=0):
    """``[count, 2]`` nats and tokens of documents of very different sizes."""
    random = np.random.default_rng(seed)
    tokens = random.integers(10, 4000, count).astype(float)
    return np.stack([tokens * random.normal(4.0, 0.5, count), tokens], axis=1)


def test_draws_are_with_replacement_and_the_same_each_time():
    drawn = draws(7)
    assert drawn.shape == (1000, 7)
    assert (drawn.sum(axis=1) == 7).all()
    assert drawn.max() > 2
    np.testing.assert_array_equal(drawn, draws(7))


def test_two_documents_would_give_the_range_between_them(monkeypatch):
    """Of four equally likely draws one is the first alone and one the second alone."""
    monkeypatch.setattr(bootstrap, "LEAST_DOCUMENTS", 2)
    own = np.array([[300.0, 100.0], [50.0, 10.0]])
    assert intervals({"x": own}, ratio) == {"x": (3.0, 5.0)}


def test_the_mean_of_many_documents_is_normal():
    random = np.random.default_rng(1)
    nats = 1000 * random.normal(4, 1, 400)
    found = intervals({0: np.stack([nats, np.full(400, 1000.0)], axis=1)}, ratio)[0]
    half = 1.96 * nats.std() / 1000 / math.sqrt(400)
    middle = nats.mean() / 1000
    assert found == pytest.approx((middle - half, middle + half), abs=0.12 * half)


def test_a_ratio_of_sums_agrees_with_scipy():
    own = documents(30)
    low, high = intervals({0: own}, ratio)[0]
    theirs = stats.bootstrap(
        tuple(own.T),
        lambda nats, tokens, axis: nats.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.07 * (high - low))
    pooled = own[:, 0].sum() / own[:, 1].sum()
    assert low < pooled < high
    assert abs(pooled - (own[:, 0] / own[:, 1]).mean()) > 0.01  # it is no mean of ratios


def test_numbers_of_the_same_documents_are_paired():
    own = documents(12)
    both = {"short": own, "long": own * [1.25, 1.0]}
    found = intervals(both, lambda p: {"ratio": ratio(p)["long"] / ratio(p)["short"]} | ratio(p))
    assert found["ratio"] == pytest.approx((1.25, 1.25))
    assert found["long"].high - found["long"].low > 0.1


def test_what_no_drawn_document_has_is_left_out(monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_DOCUMENTS", 3)
    own = np.array([[2.0, 1.0], [0.0, 0.0], [9.0, 3.0]])
    assert intervals({0: own}, ratio) == {0: (2.0, 3.0)}


def coverage(count, experiments=300):
    """How often the interval holds the truth, for ``count`` documents of equal size."""
    random, held = np.random.default_rng(3), 0
    for _ in range(experiments):
        nats = np.stack([random.normal(4.0, 1.0, count), np.ones(count)], axis=1)
        low, high = percentiles(draws(count, 500) @ nats[:, 0] / count)
        held += low <= 4.0 <= high
    return held / experiments


def test_few_documents_have_no_interval_because_it_would_hold_too_seldom():
    for count in (0, 1, 3, LEAST_DOCUMENTS - 1):
        assert intervals({0: documents(30)[:count]}, ratio) == {}
    assert intervals({}, ratio) == {}
    assert intervals({0: documents(LEAST_DOCUMENTS)}, ratio)
    assert 0.68 < coverage(3) < 0.8  # the note says 75%
    assert coverage(LEAST_DOCUMENTS) > 0.87


def test_ends_are_values_that_were_drawn():
    assert percentiles([1.0] * 960 + [math.inf] * 40) == (1.0, math.inf)
