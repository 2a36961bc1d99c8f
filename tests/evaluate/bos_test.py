"""A BOS token in every protocol: what windows begin with, and that nothing else changes."""

import numpy as np
import pytest

from fope_jax.data.retrieval import TASKS
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate.packed import score_chunks, score_resets
from fope_jax.evaluate.perplexity import (
    score_from_start,
    score_positions,
    score_same_tokens,
    token_sums,
)
from fope_jax.evaluate.retrieval import TrialGrid, check_trials
from fope_jax.evaluate.sliding import score_sliding
from tests.evaluate.text_cache import TOKEN_BYTES, VOCAB, Reader, TextCache, sums_of

BOS = VOCAB - 1  # which no text has
LENGTHS = (70, 5, 1, 90, 31, 140)
CONTEXTS = (8, 32)
MANY = dict(contexts=CONTEXTS, batch_tokens=100)


@pytest.fixture(scope="module")
def cache():
    return TextCache(LENGTHS, vocab=BOS)


def added_up(windows):
    """Sums over ``(inputs, targets)``; all targets at the end of a window are scored."""
    total = np.zeros(4)
    for inputs, targets in windows:
        nats, hits = Reader()(np.array([inputs]), np.array([targets]))
        total += list(token_sums(nats, hits, np.array([targets]), TOKEN_BYTES).values())
    return total


def assert_sums(rows, windows, **fields):
    np.testing.assert_allclose(sums_of(rows, **fields), added_up(windows), rtol=1e-6)


def test_same_tokens(cache):
    settings = MANY | dict(scored=4, num_windows=12)
    rows, windows = score_same_tokens(Reader(), cache, bos=BOS, **settings)
    for n in CONTEXTS:
        expected = [
            ([BOS, *cache.stream[stop - n : stop - 1]], cache.stream[stop - 4 : stop])
            for stop in windows.stop
        ]
        assert_sums(rows, expected, context=n)
    without, _ = score_same_tokens(Reader(), cache, **settings)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in without]


def test_every_target_of_a_window_follows_bos(cache):
    """With as many targets as tokens the first one is read off BOS alone."""
    rows, windows = score_same_tokens(
        Reader(), cache, bos=BOS, scored=8, num_windows=5, contexts=(8,), batch_tokens=100
    )
    stops = windows.stop
    assert_sums(
        rows, [([BOS, *cache.stream[s - 8 : s - 1]], cache.stream[s - 8 : s]) for s in stops]
    )


def test_long_window(cache):
    rows, windows = score_positions(
        Reader(), cache, context=32, training_length=8, num_windows=4, batch_tokens=100, bos=BOS
    )
    stops = windows.stop
    assert_sums(
        rows, [([BOS, *cache.stream[s - 32 : s - 1]], cache.stream[s - 32 : s]) for s in stops]
    )


def test_from_start_scores_the_first_token_too(cache):
    settings = dict(context=64, training_length=8, num_documents=99, batch_tokens=200)
    rows, windows = score_from_start(Reader(), cache, bos=BOS, **settings)
    assert windows.too_short == ()
    for i, length in enumerate(LENGTHS):
        start, size = cache.documents["start"][i], min(length, 64)
        text = cache.stream[start : start + size]
        assert_sums(rows, [([BOS, *text[:-1]], text)], document=f"document {i}")
        assert windows.stop[i] == start + size
    (first,) = (r for r in rows if r["document"] == "document 2")
    assert first["bucket"][0] == 0 and first["tokens"] == 1


def test_from_start_leaves_a_prefix_before_documents_out_of_their_bytes():
    """The token that a document begins with stands for the tokenizer's own space, too."""
    settings = dict(context=64, training_length=8, num_documents=99, batch_tokens=200, bos=BOS)
    cache = TextCache(LENGTHS, vocab=BOS)
    plain, _ = score_from_start(Reader(), cache, **settings)
    cache.tokenizer.prefix = " "
    rows, _ = score_from_start(Reader(), cache, **settings)
    for row, before in zip(rows, plain, strict=True):
        assert row["bytes"] == before["bytes"] - (row["bucket"][0] == 0)
        assert row["nats"] == before["nats"] and row["tokens"] == before["tokens"]


def test_sliding_window(cache):
    rows, stretches = score_sliding(Reader(), cache, stride=3, num_windows=5, bos=BOS, **MANY)
    for n in CONTEXTS:
        expected = []
        for begin in stretches.stop - 33:
            text, done = cache.stream[begin : begin + 33], 0
            for end in [*range(n, 32, 3), 32]:
                expected.append(([BOS, *text[end - n + 1 : end]], text[done + 1 : end + 1]))
                done = end
        assert_sums(rows, expected, context=n)


def test_chunks(cache):
    rows, _ = score_chunks(Reader(), cache, num_blocks=99, bos=BOS, **MANY)
    for n in CONTEXTS:
        parts = [cache.stream[start : start + n] for start in range(0, 320, n)]
        assert_sums(rows, [([BOS, *part[1:-1]], part[1:]) for part in parts], context=n)


def test_no_resets_begin_with_bos_once(cache):
    settings = dict(contexts=(160,), num_blocks=99, batch_tokens=200)
    rows, _ = score_resets(Reader(), cache, reset=False, bos=BOS, **settings)
    inputs, targets = [BOS, *cache.stream[1:160]], cache.stream[1:161]
    nats, _ = Reader()(np.array([inputs]), np.array([targets]))
    at = cache.documents["start"][1]
    expected = nats[0, at : at + 4].sum(dtype=np.float64)  # all but the document's first token
    assert sums_of(rows, document="document 1")[:2] == [pytest.approx(expected), 4]


def test_documents_begin_with_bos_in_place_of_the_eos_before_them(cache):
    settings = dict(contexts=(160,), num_blocks=99, batch_tokens=200)
    rows, _ = score_resets(Reader(), cache, reset=True, bos=BOS, **settings)
    start = cache.documents["start"][1]
    text = cache.stream[start : start + 5]
    assert_sums(rows, [([BOS, *text[:-1]], text[1:])], document="document 1")
    first = cache.stream[:70]  # at the beginning of a chunk BOS takes the place of its first token
    assert_sums(rows, [([BOS, *first[1:-1]], first[1:])], document="document 0")
    without, _ = score_resets(Reader(), cache, reset=True, **settings)
    counts = [[(row["document"], row["tokens"]) for row in own] for own in (rows, without)]
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------------- retrieval

BYTES = BytesTokenizer()


@pytest.mark.parametrize("name", TASKS)
def test_prompts_begin_with_bos_and_are_as_long(name):
    task, contexts = make_task(name, BYTES), (1000, 2001)
    series = TrialGrid(contexts, (0.0, 0.7), 2, 3, bos=2)
    plain = series._replace(bos=None)
    for number in range(series.count):
        for context in contexts:
            trial, other = series.draw(task, number, context), plain.draw(task, number, context - 1)
            assert trial.tokens.dtype == np.int32 and len(trial.tokens) == context
            assert trial.tokens.tolist() == [2, *other.tokens]
            assert trial.answer_length == other.answer_length


def test_a_context_must_hold_bos_as_well():
    task = make_task("recall", BYTES)
    check_trials(task, TrialGrid((4,), (0.5,), 1, 0))
    with pytest.raises(ValueError, match="context of 4 tokens, too short for 'recall', .* least 5"):
        check_trials(task, TrialGrid((4,), (0.5,), 1, 0, bos=2))
