"""Random positions: ordered, without repetition, uniform over subsets, one draw a document."""

import collections
import itertools

import numpy as np
import pytest

from fope_jax.config import TrainConfig
from fope_jax.data.random_positions import PositionDraw, RandomPositions, ordered_subset
from fope_jax.typing import Batch

SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 3, [1] * 14])  # two documents and padding, or one


def batch_of(segments=SEGMENTS, step=0):
    ids = np.full(segments.shape, step, np.int32)
    positions = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)
    return Batch(ids, ids, positions, segments, np.ones(segments.shape, np.float32))


@pytest.mark.parametrize("count", [2, 4])
def test_every_ordered_subset_is_as_likely(count):
    """Chi-square of 20,000 draws from 6, by the values themselves and by those left out."""
    bits = np.random.Philox(7)
    drawn = collections.Counter(tuple(ordered_subset(bits, 6, count)) for _ in range(20_000))
    subsets = list(itertools.combinations(range(6), count))
    expected = 20_000 / len(subsets)
    assert set(drawn) <= set(subsets)  # so they rise and do not repeat
    statistic = sum((drawn[subset] - expected) ** 2 / expected for subset in subsets)
    assert statistic < 36.1  # 14 degrees of freedom: one seed in a thousand is above


@pytest.mark.parametrize("draw", ["subset", "float"])
def test_documents_are_drawn_apart_and_rise(draw):
    make = PositionDraw(64, draw, seed=3)
    drawn = make(batch_of(), 5)
    positions = drawn.positions
    assert positions.dtype == (np.float32 if draw == "float" else np.int32)
    for row, start, stop in ((0, 0, 5), (0, 5, 11), (1, 0, 14)):
        one = positions[row, start:stop]
        assert (np.diff(one) >= make.step).all() and one[0] >= 0 and one[-1] <= 64 - make.step
        np.testing.assert_array_equal(one / make.step, np.round(one / make.step))
    np.testing.assert_array_equal(positions[0, 11:], [11, 12, 13])  # padding keeps what it had
    # A row's neighbours do not decide its draw's size: each document spans its own range.
    many = np.stack([make(batch_of(), step).positions for step in range(400)])
    starts = many[:, 0, 5].astype(np.float64)
    assert abs(np.corrcoef(many[:, 0, 4], starts)[0, 1]) < 0.15
    np.testing.assert_allclose(starts.mean(), (64 - 6) / 7, rtol=0.15)  # the least of 6 of 64


def test_fractions_fill_a_token():
    positions = PositionDraw(100, "float", seed=0).positions(np.ones((50, 90), int), [0])
    fractions = np.histogram(positions % 1, bins=8, range=(0, 1))[0]
    assert ((fractions - 562.5) ** 2 / 562.5).sum() < 24.3  # 7 degrees of freedom, 1 in 1,000
    # Whole tokens and fractions, and all differences, are exact in float32.
    np.testing.assert_array_equal(
        positions.astype(np.float64)[:, None] - positions.astype(np.float64)[:, :, None],
        positions[:, None] - positions[:, :, None],
    )


def test_a_range_of_the_length_is_the_usual_training():
    batch = batch_of(np.ones((3, 14), int))
    drawn = PositionDraw(14, "subset", seed=0)(batch, 9)
    np.testing.assert_array_equal(drawn.positions, batch.positions)
    assert drawn.positions.dtype == batch.positions.dtype


class Numbered:
    """A loader of `batch_of`."""

    summary = "numbers"

    def batch(self, step, whole=False):
        return batch_of(step=step)

    def row_sources(self, step):
        return [{"window": step}]


def test_a_batch_is_a_function_of_seed_and_step():
    loader, again, other = (
        RandomPositions(Numbered(), PositionDraw(2048, "subset", seed)) for seed in (1, 1, 2)
    )
    stream = list(loader.iterate(3, 2))
    for step, batch in enumerate(stream, start=3):
        np.testing.assert_array_equal(batch.positions, again.batch(step).positions)
        np.testing.assert_array_equal(batch.tokens, step)
        assert (batch.positions != other.batch(step).positions).any()
    assert (stream[0].positions != stream[1].positions).any()
    # Recorded: a run that resumes under another NumPy must draw the same.
    assert stream[0].positions[1, :5].tolist() == RECORDED
    assert loader.row_sources(4) == [{"window": 4}] and "0 to 2,048" in loader.summary


def test_a_process_draws_for_its_own_rows_what_one_process_draws_for_all():
    """Rows that are not read have segment 0, so nothing is drawn for them."""
    segments = np.repeat(SEGMENTS, 3, axis=0)
    draw = PositionDraw(2048, "float", seed=4)
    whole = draw(batch_of(segments), 7).positions
    assert len({tuple(row) for row in whole}) == 6  # rows of the same documents are drawn apart
    for rows in ([0, 3, 4], [5]):
        own = np.zeros_like(segments)
        own[rows] = segments[rows]
        positions = draw(batch_of(own), 7).positions
        np.testing.assert_array_equal(positions[rows], whole[rows])


RECORDED = [32, 179, 806, 1091, 1130]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_range": 15}, "position_range = 15; accepted: length = 16 or more, or None"),
        ({"position_draw": "float"}, "position_draw = 'float'; accepted: 'subset', or with it a"),
        (
            {"position_draw": "float", "position_range": 2**20 + 1},
            "position_range = 1048577; accepted: at most 1048576 .* no fractions of 0.0625",
        ),
        ({"position_draw": "normal"}, r"position_draw = 'normal'; accepted: one of \('subset', 'f"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, batch_size=1, length=16, **changes)


def test_a_segment_longer_than_the_range_is_refused():
    with pytest.raises(ValueError, match="14 different positions of 12: there are not so many"):
        PositionDraw(12, "subset", seed=0)(batch_of(), 0)
