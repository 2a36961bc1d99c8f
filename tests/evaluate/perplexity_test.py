"""Exactness of the protocols inside documents, against models whose nats are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from fope_jax.evaluate.perplexity import (
    document_rows,
    score_from_start,
    score_positions,
    score_same_tokens,
    token_sums,
)
from fope_jax.evaluate.scoring import score_windows
from tests.evaluate.text_cache import TOKEN_BYTES, VOCAB, Reader, TextCache, sums_of

LENGTHS = (700, 90, 1300, 402)
CONTEXTS = (25, 100, 400)


class Cache:
    """A token cache in memory that records what was read."""

    def __init__(self, seed=0):
        self.stream = np.random.default_rng(seed).integers(0, VOCAB, sum(LENGTHS)).astype(np.int32)
        self.documents = np.zeros(
            len(LENGTHS), [("name", "U20"), ("start", "i8"), ("length", "i8"), ("bytes", "i8")]
        )
        self.documents["name"] = ["one", "too short", "three", "four"]
        self.documents["start"] = np.cumsum(LENGTHS) - LENGTHS
        self.documents["length"] = LENGTHS
        self.tokenizer = SimpleNamespace(token_bytes=TOKEN_BYTES)

    def tokens(self, start, stop):
        assert 0 <= start < stop <= len(self.stream)
        return self.stream[start:stop]


class Bigram:
    """Nats from the last token alone, as a model with no use for context would have them."""

    table = np.random.default_rng(2).random((VOCAB, VOCAB)).astype(np.float32)

    def __init__(self):
        self.shapes = set()

    def __call__(self, tokens, targets):
        self.shapes.add((tokens.shape, targets.shape))
        previous = tokens[:, -targets.shape[1] :]
        return self.table[previous, targets], targets > previous


def same_tokens(scorer, **changes):
    arguments = dict(contexts=CONTEXTS, scored=20, num_windows=17, batch_tokens=800) | changes
    return score_same_tokens(scorer, Cache(), **arguments)


def test_the_same_targets_are_scored_at_every_context():
    seen = {}

    def scorer(tokens, targets):
        # Every row continues the tokens it is given, so targets and inputs must agree.
        np.testing.assert_array_equal(tokens[:, 1 - targets.shape[1] :], targets[:, :-1])
        seen.setdefault(tokens.shape[1], []).append(targets)
        return np.zeros(targets.shape, np.float32), np.zeros(targets.shape, bool)

    same_tokens(scorer, num_windows=16, batch_tokens=400)
    scored = {context: np.concatenate(targets)[:16] for context, targets in seen.items()}
    assert set(scored) == set(CONTEXTS)
    for context in CONTEXTS:
        np.testing.assert_array_equal(scored[context], scored[400])


def test_longer_contexts_extend_the_shorter_ones_inside_one_document():
    windows = {}

    def scorer(tokens, targets):
        windows.setdefault(tokens.shape[1], []).extend(tokens)
        return np.zeros(targets.shape, np.float32), np.zeros(targets.shape, bool)

    same_tokens(scorer, batch_tokens=1)
    for short, long in zip(windows[25], windows[400], strict=True):
        np.testing.assert_array_equal(short, long[-25:])
    books = [
        Cache().tokens(row["start"], row["start"] + row["length"]) for row in Cache().documents
    ]
    for window in windows[400]:
        assert any(window.tobytes() in book.tobytes() for book in books)


def test_sums_equal_a_direct_computation_on_the_chosen_subset():
    cache, model = Cache(), Bigram()
    rows, windows = same_tokens(model)
    for row in rows:
        index = cache.documents["name"].tolist().index(row["document"])
        own = windows.stop[windows.document == index]
        positions = np.concatenate([np.arange(stop - 20, stop) for stop in own])
        targets, previous = cache.stream[positions], cache.stream[positions - 1]
        assert row["windows"] == len(own)
        assert row["tokens"] == len(targets) == 20 * len(own)
        assert row["bytes"] == TOKEN_BYTES[targets].sum()
        assert row["correct"] == (targets > previous).sum()
        nats = Bigram.table[previous, targets].sum(dtype=np.float64)
        assert row["nats"] == pytest.approx(nats, rel=1e-12)


def test_a_bigram_model_is_constant_in_context():
    rows, _ = same_tokens(Bigram())
    for document in ("one", "three", "four"):
        sums = {
            (row["nats"], row["tokens"], row["bytes"], row["correct"])
            for row in rows
            if row["document"] == document
        }
        assert len(sums) == 1
    assert len(rows) == 3 * len(CONTEXTS)


def test_a_model_that_reads_further_back_is_not_constant():
    """The protocol can tell: a model that gains one nat a token beyond 50 tokens of context."""

    def scorer(tokens, targets):
        gain = 1.0 if tokens.shape[1] > 50 else 0.0
        return np.full(targets.shape, 3.0 - gain, np.float32), np.zeros(targets.shape, bool)

    rows, _ = same_tokens(scorer)
    losses = {row["context"]: row["nats"] / row["tokens"] for row in rows}
    assert losses == {25: 3.0, 100: 2.0, 400: 2.0}


def test_documents_too_short_are_named():
    rows, windows = same_tokens(Bigram())
    assert windows.too_short == ("too short",)
    assert "too short" not in {row["document"] for row in rows}


def test_one_shape_a_context_whatever_the_remainder():
    model = Bigram()
    same_tokens(model, num_windows=17, batch_tokens=800)
    assert model.shapes == {((17, 25), (17, 20)), ((8, 100), (8, 20)), ((2, 400), (2, 20))}


def test_batching_does_not_change_the_sums():
    assert same_tokens(Bigram(), batch_tokens=1)[0] == same_tokens(Bigram(), batch_tokens=10**6)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scored=26), "scored_tokens is 26, more than the shortest context of 25 tokens"),
        (dict(contexts=(25, 1300)), "takes 1301, and the longest of 4 documents has 1300"),
    ],
)
def test_bad_contexts_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        same_tokens(Bigram(), **changes)


def test_positions_sum_what_falls_into_each_bucket():
    def scorer(tokens, targets):
        position = np.broadcast_to(np.arange(tokens.shape[1]), targets.shape)
        return position.astype(np.float32), position % 2 == 0

    cache = Cache()
    rows, windows = score_positions(
        scorer, cache, context=300, training_length=64, num_windows=9, batch_tokens=900
    )
    assert len(windows.stop) == 2 + 4 + 1
    assert rows[0]["bucket"][0] == 0
    assert rows[-1]["bucket"][1] == 300
    for start, stop in {tuple(row["bucket"]) for row in rows}:
        positions = np.arange(start, stop)
        targets = np.stack([cache.stream[stop - 300 + positions] for stop in windows.stop])
        found = sums_of(rows, bucket=[start, stop])
        assert found[0] == 7 * positions.sum()
        assert found[1] == 7 * len(positions)
        assert found[2] == TOKEN_BYTES[targets].sum()
        assert found[3] == 7 * (positions % 2 == 0).sum()
    shares = {name: sums_of(rows, document=name)[1] for name in ("one", "three", "four")}
    assert shares == {"one": 2 * 300, "three": 4 * 300, "four": 300}
    assert 64 in {row["bucket"][0] for row in rows}


# ---------------------------------------------------------------------------- from the start


def from_start(scorer, cache, **changes):
    settings = dict(context=64, training_length=16, num_documents=99, batch_tokens=150) | changes
    return score_from_start(scorer, cache, **settings)


def test_distances_are_from_the_start_of_the_document():
    def scorer(tokens, targets):  # each target's nats are its distance from the start
        distance = 1 + np.arange(tokens.shape[1])
        return np.broadcast_to(distance, targets.shape).astype(np.float32), targets > 25

    cache = TextCache((30, 1, 100, 65, 2))
    rows, windows = from_start(scorer, cache)
    assert windows.too_short == ("document 1",)
    for index, scored in ((0, 29), (2, 64), (3, 64), (4, 1)):
        start = cache.documents["start"][index]
        targets = cache.stream[start + 1 : start + 1 + scored]
        sums = sums_of(rows, document=f"document {index}")
        assert sums == [
            scored * (scored + 1) / 2,
            scored,
            TOKEN_BYTES[targets].sum(),
            (targets > 25).sum(),
        ]
    for start, stop in {tuple(row["bucket"]) for row in rows}:
        reached = [min(stop, n) - start for n in (29, 64, 64, 1) if n > start]
        assert sums_of(rows, bucket=[start, stop])[1] == sum(reached)
        assert len([row for row in rows if row["bucket"] == [start, stop]]) == len(reached)
    assert 16 in {row["bucket"][0] for row in rows}


def test_the_first_scored_token_without_bos_is_the_second_and_holds_no_prefix():
    """The tokenizer's space before a document is in its first token, which is only read."""
    cache = TextCache((30, 100))
    cache.tokenizer.prefix = " "
    rows, _ = from_start(Reader(), cache)
    for index, scored in ((0, 29), (1, 64)):
        first = cache.documents["start"][index] + 1
        expected = TOKEN_BYTES[cache.stream[first : first + scored]].sum()
        assert sums_of(rows, document=f"document {index}")[2] == expected


def test_what_fills_a_short_document_up_changes_nothing():
    cache = TextCache((30, 100))
    rows, _ = from_start(Reader(), cache)
    alone, _ = Reader()(cache.stream[None, :29], cache.stream[None, 1:30])
    expected = alone.sum(dtype=np.float64)
    assert sums_of(rows, document="document 0")[0] == pytest.approx(expected, rel=1e-12)
    assert from_start(Reader(), cache, batch_tokens=1)[0] == rows


def test_fewer_documents_are_evenly_spaced():
    _, windows = from_start(Bigram(), TextCache((20,) * 9), num_documents=3)
    assert windows.document.tolist() == [1, 4, 7]


def test_documents_of_one_token_cannot_be_scored():
    with pytest.raises(ValueError, match="none of 3 documents has 2 tokens"):
        from_start(Bigram(), TextCache((1, 1, 1)))


# ---------------------------------------------------------------------------- sums


def test_rows_of_documents_add_up_to_what_is_scored():
    random = np.random.default_rng(0)
    cache = TextCache((5,) * 6)
    document = random.integers(-1, 6, (40, 30))
    nats, hits = random.random((40, 30)).astype(np.float32), random.random((40, 30)) < 0.3
    targets = random.integers(0, VOCAB, (40, 30))
    rows = document_rows({"context": 30}, document, nats, hits, targets, cache)
    assert [row["document"] for row in rows] == [f"document {i}" for i in range(6)]
    for index, row in enumerate(rows):
        own = document == index
        expected = token_sums(nats[own], hits[own], targets[own], TOKEN_BYTES)
        assert row == {
            "context": 30,
            "windows": own.any(axis=1).sum(),
            **expected,
            "document": f"document {index}",
        }
    assert sum(row["tokens"] for row in rows) == (document >= 0).sum()


# ---------------------------------------------------------------------------- batches


def test_a_reader_that_gives_another_length_is_named():
    with pytest.raises(ValueError, match="gave 7 tokens; expected 9"):
        score_windows(Bigram(), lambda i: np.zeros(7, int), 3, context=8, scored=4, batch_tokens=64)


def test_progress_sees_every_batch():
    seen = []

    def progress(batches, desc):
        for batch in batches:
            seen.append(desc)
            yield batch

    same_tokens(Bigram(), progress=progress, num_windows=4, batch_tokens=400)
    assert (
        seen
        == ["same tokens, context 25"]
        + ["same tokens, context 100"]
        + ["same tokens, context 400"] * 4
    )
