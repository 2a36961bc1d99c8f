"""The sliding window: between chunks and the whole context, and never a token twice."""

from types import SimpleNamespace

import numpy as np
import pytest

from fope_jax.evaluate.sliding import score_sliding, slide, window_ends
from tests.evaluate.text_cache import TOKEN_BYTES, Reader, TextCache, sums_of

LENGTHS = (130, 40, 200)
SETTINGS = dict(contexts=(16, 32, 96), stride=10, num_windows=3, batch_tokens=200)


def slid(stream, context, stride, scorer=None):
    """Nats and hits of one stretch that is the whole stream."""
    cache = SimpleNamespace(tokens=lambda start, stop: stream[start:stop])
    begin, length = np.array([0]), len(stream) - 1
    nats, hits, targets = slide(
        scorer or Reader(), cache, begin, length, context, stride, batch_tokens=300
    )
    np.testing.assert_array_equal(targets[0], stream[1:])
    return nats[0], hits[0]


@pytest.fixture
def stream():
    return TextCache((49,)).stream


def test_a_stride_of_the_context_is_chunks(stream):
    nats, hits = slid(stream, context=12, stride=12)
    for start in range(0, 48, 12):
        alone, right = Reader()(stream[None, start : start + 12], stream[None, start + 1 :][:, :12])
        np.testing.assert_array_equal(nats[start : start + 12], alone[0])
        np.testing.assert_array_equal(hits[start : start + 12], right[0])


def test_a_stride_of_one_gives_every_token_the_whole_context(stream):
    nats, _ = slid(stream, context=12, stride=1)
    for end in range(12, 49):  # the target at ``end`` has the 12 tokens before it
        alone, _ = Reader()(stream[None, end - 12 : end], stream[None, end : end + 1])
        assert nats[end - 1] == alone[0, 0]
    whole, _ = Reader()(stream[None, :12], stream[None, 1:13])
    np.testing.assert_array_equal(nats[:12], whole[0])


def test_a_window_as_long_as_the_stretch_is_the_full_context(stream):
    whole, _ = Reader()(stream[None, :-1], stream[None, 1:])
    for stride in (1, 7, 48):
        np.testing.assert_array_equal(slid(stream, context=48, stride=stride)[0], whole[0])


@pytest.mark.parametrize(("context", "stride"), [(12, 5), (13, 13), (20, 19), (30, 4), (47, 3)])
def test_a_token_has_the_context_that_is_promised(stream, context, stride):
    def count(tokens, targets):  # the number of tokens before each target, as its nats
        before = 1 + np.arange(tokens.shape[1])[-targets.shape[1] :]
        return np.broadcast_to(before, targets.shape).astype(np.float32), targets > 0

    seen, _ = slid(stream, context, stride, count)
    np.testing.assert_array_equal(seen[:context], 1 + np.arange(context))
    later = seen[context:]
    assert later.max() == context
    assert later.min() >= context - stride + 1


def test_every_end_follows_within_a_stride():
    for length, context, stride in ((48, 12, 5), (48, 48, 7), (48, 12, 12), (13, 12, 12)):
        ends = window_ends(length, context, stride)
        assert (ends[0], ends[-1]) == (context, length)
        assert all(0 < step <= stride for step in np.diff(ends))


def test_the_same_tokens_are_scored_at_every_context():
    cache = TextCache(LENGTHS)
    rows, stretches = score_sliding(Reader(), cache, **SETTINGS)
    assert stretches.too_short == ("document 1",)
    assert len(stretches.stop) == 3
    targets = np.concatenate([cache.stream[stop - 96 : stop] for stop in stretches.stop])
    for context in SETTINGS["contexts"]:
        assert sums_of(rows, context=context)[1:3] == [3 * 96, TOKEN_BYTES[targets].sum()]
    assert len({sums_of(rows, context=context)[0] for context in SETTINGS["contexts"]}) == 3
    assert {row["scored_per_window"] for row in rows} == {10}
    assert [row["windows"] for row in rows if row["context"] == 16] == [1, 2]


def test_sums_do_not_depend_on_the_batches():
    first, _ = score_sliding(Reader(), TextCache(LENGTHS), **SETTINGS)
    for batch_tokens in (1, 96, 10**6):
        settings = SETTINGS | {"batch_tokens": batch_tokens}
        assert score_sliding(Reader(), TextCache(LENGTHS), **settings)[0] == first


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_beyond_the_context_is_refused(stride):
    told = f"stride is {stride}, accepted: 1 to the shortest context of 16 tokens"
    with pytest.raises(ValueError, match=told):
        score_sliding(Reader(), TextCache(LENGTHS), **SETTINGS | {"stride": stride})
