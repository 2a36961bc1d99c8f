"""batch = f(seed, step); every token of a cache is an input once an epoch."""

import hashlib
import math

import numpy as np
import pytest

from fope_jax.data.loader import Loader
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.typing import Batch
from tests.data.streams import TableOfDocuments


class Stream(TableOfDocuments):
    """A cache in memory: documents of the lengths given; token ``i`` is ``3 i + 3``."""

    tokenizer = BytesTokenizer()

    def __init__(self, lengths):
        ends = np.cumsum(lengths)
        self.num_tokens = int(ends[-1])
        fields = [("name", "U8"), ("start", np.int64)]
        self.documents = np.zeros(len(lengths), fields)
        self.documents["start"] = ends - lengths
        self._tokens = np.arange(self.num_tokens, dtype=np.int32) * 3 + 3

    def tokens(self, start, stop):
        return self._tokens[start:stop]


LENGTHS = np.array([7, 100, 1, 1, 3, 50, 16, 16, 23])  # 217 tokens
PACKINGS = ["documents", "windows"]
WINDOWS = ((8, 5, 20), (16, 4, 50), (30, 2, 20), (7, 3, 100), (5, 4, 7), (16, 4, 48))


def all_windows(loader, epoch=0):
    """The windows of one epoch, in the order of the cache; batch_size must be 1."""
    steps = range(epoch * loader.windows_per_epoch, (epoch + 1) * loader.windows_per_epoch)
    batches = sorted((loader.batch(step) for step in steps), key=lambda b: b.tokens[0, 0])
    return Batch(*(np.concatenate(leaves) for leaves in zip(*batches, strict=True)))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("length", [1, 7, 16, 217, 1000])
def test_every_token_is_an_input_once_an_epoch(length, packing):
    cache = Stream(LENGTHS)
    loader = Loader(cache, length=length, batch_size=1, seed=3, packing=packing)
    assert loader.windows_per_epoch == math.ceil(217 / length)
    for epoch in (0, 2):
        batch = all_windows(loader, epoch)
        assert batch.tokens.shape == (loader.windows_per_epoch, length)
        np.testing.assert_array_equal(batch.tokens[batch.segments > 0], cache.tokens(0, 217))
        assert (batch.tokens[batch.segments == 0] == cache.tokenizer.pad_id).all()
        assert (batch.weights[batch.segments == 0] == 0).all()
        scored = 216 if packing == "windows" else 217 - len(LENGTHS)
        assert batch.weights.sum() == scored
        np.testing.assert_array_equal(
            batch.targets[batch.weights > 0], batch.tokens[batch.weights > 0] + 3
        )


def test_the_last_window_is_filled_up_with_padding():
    batch = all_windows(Loader(Stream([5, 8]), length=5, batch_size=1, seed=0))
    last = Batch(*(leaf[-1].tolist() for leaf in batch))
    assert last.tokens == [33, 36, 39, 0, 0]
    assert last.targets == [36, 39, 0, 0, 0]
    assert last.segments == [1, 1, 1, 0, 0]
    assert last.positions == [0, 1, 2, 0, 0]
    assert last.weights == [1, 1, 0, 0, 0]  # the last token of the stream has no target


def test_segments_and_positions_by_document():
    batch = all_windows(Loader(Stream([3, 2, 9]), length=7, batch_size=1, seed=0))
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3, 3], [1] * 7]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], list(range(7))]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 0, 1, 1], [1] * 6 + [0]]


def test_segments_against_a_plain_loop():
    cache = Stream(LENGTHS)
    batch = all_windows(Loader(cache, length=16, batch_size=1, seed=0))
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for row in range(len(batch.tokens)):
        own = document[row * 16 : (row + 1) * 16]
        positions = [int((own[:t] == d).sum()) for t, d in enumerate(own)]
        assert batch.positions[row, : len(own)].tolist() == positions
        assert batch.segments[row, : len(own)].tolist() == [
            len(set(own[: t + 1].tolist())) for t in range(len(own))
        ]


def test_one_segment_a_window_as_the_paper():
    batch = all_windows(
        Loader(Stream([3, 2, 9]), length=7, batch_size=1, seed=0, packing="windows")
    )
    assert batch.segments.tolist() == [[1] * 7] * 2
    assert batch.positions.tolist() == [list(range(7))] * 2
    assert batch.weights.tolist() == [[1] * 7, [1] * 6 + [0]]


def test_positions_of_windows_are_the_same_in_every_row_padding_too():
    loader = Loader(Stream([5, 8]), length=5, batch_size=3, seed=0, packing="windows")
    for step in range(3):
        batch = loader.batch(step)
        assert batch.positions.tolist() == [list(range(5))] * 3
        padding = np.arange(5) >= 3
        last = batch.tokens[:, 0] == 33
        np.testing.assert_array_equal(batch.segments == 0, last[:, None] & padding)
        assert last.sum() == 1


def test_types_and_shapes():
    batch = Loader(Stream(LENGTHS), length=16, batch_size=4, seed=0).batch(0)
    assert isinstance(batch, Batch)
    assert {leaf.shape for leaf in batch} == {(4, 16)}
    assert [leaf.dtype for leaf in batch] == [np.int32] * 4 + [np.float32]


# ---------------------------------------------------------------------------- order


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("start", [0, 3, 11])
def test_any_step_alone_is_that_step_of_a_pass(start):
    def make():
        return Loader(Stream(LENGTHS), length=16, batch_size=4, seed=5)

    passed = list(make().iterate(0, 20))
    assert len(passed) == 20
    for step, batch in enumerate(make().iterate(start, 20 - start), start):
        assert equal(batch, passed[step])
    for step in (19, 0, 7):
        assert equal(make().batch(step), passed[step])


def test_going_on_for_ever():
    loader = Loader(Stream(LENGTHS), length=16, batch_size=4, seed=5)
    batches = loader.iterate(1000)
    assert equal(next(batches), loader.batch(1000)) and equal(next(batches), loader.batch(1001))


def orders(seed, epochs=3):
    loader = Loader(Stream(np.array([640])), length=10, batch_size=1, seed=seed)
    first = [int(loader.batch(step).tokens[0, 0]) for step in range(64 * epochs)]
    return [tuple(first[i : i + 64]) for i in range(0, len(first), 64)]


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    found = [order for seed in range(4) for order in orders(seed)]
    assert len(set(found)) == len(found)  # seed 1 does not begin where seed 0 goes on
    assert len({tuple(sorted(order)) for order in found}) == 1  # of the same windows
    assert tuple(sorted(found[0])) not in found


def test_batches_run_over_the_end_of_an_epoch():
    """9 windows in batches of 4: after 9 steps, each window has been seen 4 times."""
    loader = Loader(Stream(np.array([90])), length=10, batch_size=4, seed=0)
    assert (loader.windows_per_epoch, loader.steps_per_epoch) == (9, 3)
    seen = np.concatenate([batch.tokens[:, 0] for batch in loader.iterate(0, 9)])
    assert sorted(np.unique(seen, return_counts=True)[1].tolist()) == [4] * 9


def test_a_single_window():
    loader = Loader(Stream([5]), length=8, batch_size=2, seed=0)
    batch = loader.batch(7)
    assert batch.tokens[0].tolist() == batch.tokens[1].tolist() == [3, 6, 9, 12, 15, 0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "length = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"packing": "none"}, "packing = 'none'.*documents"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Loader(Stream([5]), **({"length": 8, "batch_size": 2, "seed": 0} | fields))


@pytest.mark.parametrize(
    ("packing", "digest"), [("documents", "320c36bf7f478296"), ("windows", "83032a89aae1d8e1")]
)
def test_the_order_is_what_it_was_in_earlier_versions(packing, digest):
    """A run that is resumed, or made again, sees the batches it saw then."""
    found = hashlib.sha256()
    for length, size in ((16, 4), (7, 3), (217, 2), (1000, 1), (1, 5)):
        loader = Loader(Stream(LENGTHS), length=length, batch_size=size, seed=5, packing=packing)
        for batch in loader.iterate(3, 20):
            for leaf in batch:
                found.update(str((leaf.dtype, leaf.shape)).encode())
                found.update(np.ascontiguousarray(leaf).tobytes())
        found.update(str(loader.steps_per_epoch).encode())
    assert found.hexdigest()[:16] == digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "digest"), [("documents", "72945857820df6c6"), ("windows", "7c8b337529fc324e")]
)
def test_rows_cut_from_windows_are_what_they_were_in_earlier_versions(packing, digest):
    """Padding inside of rows too, where a length does not divide the window."""
    found = hashlib.sha256()
    for length, size, window in WINDOWS:
        fields = {"length": length, "batch_size": size, "packing": packing, "window": window}
        loader = Loader(Stream(LENGTHS), seed=5, **fields)
        for step in range(25):
            for leaf in loader.batch(step):
                found.update(str((leaf.dtype, leaf.shape)).encode())
                found.update(np.ascontiguousarray(leaf).tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_cut_from_longer_windows(packing):
    """Row by row against a plain loop over the window's own batch."""
    whole = Loader(Stream(LENGTHS), length=48, batch_size=2, seed=3, packing=packing)
    cut = Loader(Stream(LENGTHS), length=16, batch_size=6, seed=3, packing=packing, window=48)
    assert cut.steps_per_epoch == whole.steps_per_epoch
    for step in range(4):
        long, short = whole.batch(step), cut.batch(step)
        for name in ("tokens", "targets", "weights"):
            wanted = getattr(long, name).reshape(6, 16)
            np.testing.assert_array_equal(getattr(short, name), wanted, err_msg=name)
        inside = short.segments > 0
        np.testing.assert_array_equal(inside, long.segments.reshape(6, 16) > 0)
        for row in range(6):
            segments = long.segments.reshape(6, 16)[row]
            for t in np.flatnonzero(inside[row]):
                if packing == "windows":
                    assert (short.segments[row, t], short.positions[row, t]) == (1, t)
                else:
                    same = segments[: t + 1] == segments[t]
                    assert short.positions[row, t] == same.sum() - 1
                    assert short.segments[row, t] == len(set(segments[: t + 1]))
        for facts, tokens in zip(cut.row_sources(step), short.tokens, strict=True):
            ends = np.cumsum(LENGTHS)
            numbers = {int(np.searchsorted(ends, (x - 3) // 3, "right")) for x in tokens if x}
            assert {one["number"] for one in facts["documents"]} == numbers


def test_a_length_that_does_not_divide_the_window_tells_windows_apart():
    loader = Loader(Stream([90]), length=8, batch_size=5, seed=1, window=20)
    batch = loader.batch(0)  # two windows of 20: the third row has 4 tokens of each
    first, second = batch.tokens[2, 0], batch.tokens[2, 4]
    assert batch.tokens[2].tolist() == [
        *range(first, first + 12, 3),
        *range(second, second + 12, 3),
    ]
    assert batch.segments[2].tolist() == [1] * 4 + [2] * 4
    assert batch.positions[2].tolist() == [0, 1, 2, 3] * 2
    np.testing.assert_array_equal(batch.targets, batch.tokens + 3)
    assert (batch.weights == 1).all()


# ---------------------------------------------------------------------------- processes


class Counting(Stream):
    """Counts the tokens that are read."""

    read = 0

    def tokens(self, start, stop):
        self.read += stop - start
        return super().tokens(start, stop)


@pytest.mark.fast("2-20-documents", "4-24-windows", "16-None-documents", "16-None-windows")
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("processes", "window"), [(2, None), (2, 24), (2, 20), (4, 24), (4, None), (16, None)]
)
def test_processes_read_their_own_rows_of_the_same_batch(processes, window, packing):
    """Contiguous rows, and rows dealt out one by one, from whole windows and from cut ones."""
    fields = dict(length=12, batch_size=16, seed=2, packing=packing, window=window)
    deal, steps = (_dealt if window == 24 else np.split), (0, 40)
    expected = [Loader(Stream(LENGTHS), **fields).batch(step) for step in steps]
    summed = [[np.zeros_like(leaf) for leaf in batch] for batch in expected]
    for rows in deal(np.arange(16), processes):
        cache = Counting(LENGTHS)
        one = Loader(cache, **fields, rows=rows)
        for batch, wanted, sums in zip(map(one.batch, steps), expected, summed, strict=True):
            for name, leaf, own, total in zip(Batch._fields, batch, wanted, sums, strict=True):
                np.testing.assert_array_equal(leaf[rows], own[rows])
                if name != "positions":
                    assert not np.delete(leaf, rows, axis=0).any()
                total += leaf
            if packing == "windows":  # every row's, as one is taken for all
                np.testing.assert_array_equal(batch.positions, wanted.positions)
        assert cache.read <= 2 * len(rows) * (12 + 2)
    assert equal(one.batch(0, whole=True), expected[0])
    for name, *leaves in zip(Batch._fields, expected[1], summed[1], strict=True):
        if (name, packing) != ("positions", "windows"):
            np.testing.assert_array_equal(*leaves)


def _dealt(rows, processes):
    return [rows[i::processes] for i in range(processes)]
