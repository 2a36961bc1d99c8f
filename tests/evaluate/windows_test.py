"""Placement of windows: theorems over random document lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.evaluate.windows import (
    TooShortError,
    place_blocks,
    place_windows,
    position_buckets,
    share_evenly,
)


def documents(lengths):
    lengths = np.asarray(lengths, np.int64)
    table = np.zeros(len(lengths), [("name", "U20"), ("start", "i8"), ("length", "i8")])
    table["name"] = [f"book {i}" for i in range(len(lengths))]
    table["start"] = np.cumsum(lengths) - lengths
    table["length"] = lengths
    return table


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    longest=st.integers(1, 120),
    scored=st.integers(1, 120),
    total=st.integers(1, 40),
)
def test_windows_fit_their_document_and_never_score_a_target_twice(lengths, longest, scored, total):
    scored = min(scored, longest)
    table = documents([*lengths, longest + 1])
    windows = place_windows(table, longest=longest, scored=scored, total=total)
    starts = table["start"][windows.document]
    ends = starts + table["length"][windows.document]
    assert (windows.stop - longest - 1 >= starts).all()
    assert (windows.stop <= ends).all()
    assert (np.diff(windows.stop) >= scored).all()
    capacity = np.maximum(0, (table["length"] - longest - 1) // scored + 1)
    assert len(windows.stop) == min(total, capacity.sum())
    assert set(windows.too_short) == set(table["name"][table["length"] < longest + 1])


@settings(max_examples=200, deadline=None)
@given(capacity=st.lists(st.integers(0, 50), min_size=1, max_size=10), total=st.integers(0, 300))
def test_shares_differ_by_at_most_one_where_there_is_room(capacity, total):
    shares = share_evenly(np.array(capacity), total)
    assert shares.sum() == min(total, sum(capacity))
    assert (shares <= capacity).all()
    with_room = shares[shares < capacity]
    if len(with_room):
        assert shares.max() <= with_room.min() + 1


def test_windows_reach_both_ends_of_a_document():
    windows = place_windows(documents([10_001]), longest=100, scored=100, total=100)
    assert windows.stop[0] == 101
    assert windows.stop[-1] == 10_001
    few = place_windows(documents([10_001]), longest=100, scored=100, total=2)
    assert few.stop.tolist() == [2_601, 7_601]  # the middles of both halves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(longest=99, scored=100, total=1), "scored_tokens is 100; accepted: 1 to .* 99"),
        (dict(longest=99, scored=9, total=0), "number of windows is 0; accepted: 1"),
        (dict(longest=300, scored=9, total=1), "takes 301, and the longest of 2 documents has 300"),
    ],
)
def test_bad_windows_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        place_windows(documents([200, 300]), **arguments)


def test_a_run_without_text_is_told_of_texts():
    nothing = np.zeros(0, [("start", "i8"), ("length", "i8"), ("name", object)])
    with pytest.raises(TooShortError, match="no documents, as in a run of tasks.*evaluate.texts"):
        place_blocks(nothing, length=8, total=1)
    with pytest.raises(TooShortError, match="no documents, as in a run of tasks.*evaluate.texts"):
        place_windows(documents([]), longest=8, scored=4, total=2)


@pytest.mark.parametrize(("context", "training_length"), [(2048, 128), (512, 512), (100, 128)])
def test_buckets_cover_the_window_once_with_the_training_length_as_an_edge(
    context, training_length
):
    buckets = position_buckets(context, training_length)
    covered = [position for start, stop in buckets for position in range(start, stop)]
    assert covered == list(range(context))
    if training_length < context:
        assert training_length in {start for start, _ in buckets}


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    length=st.integers(1, 60),
    total=st.integers(1, 20),
    require_boundary=st.booleans(),
)
def test_blocks_lie_inside_the_stream_and_hold_what_is_asked_for(
    lengths, length, total, require_boundary
):
    table = documents([*lengths, 1, 2 * length])
    size = table["length"].sum()
    inner = [s for s in table["start"] if s % length and s // length < (size - 1) // length]
    if require_boundary and not inner:
        with pytest.raises(ValueError, match="no two documents meet inside a block"):
            place_blocks(table, length=length, total=total, require_boundary=True)
        return
    blocks = place_blocks(table, length=length, total=total, require_boundary=require_boundary)
    there = len({s // length for s in inner}) if require_boundary else (size - 1) // length
    assert len(blocks) == min(total, there)
    assert (blocks % length == 0).all()
    assert (np.diff(blocks) >= length).all()
    assert blocks[-1] + length + 1 <= size
    if require_boundary:
        assert all(any(b < s < b + length for s in table["start"]) for b in blocks)
