"""Batches of windows of a token cache: batch = f(seed, step), nothing else.

The stream of N tokens is cut into ``ceil(N / T)`` windows. Window ``i`` has tokens
``[i T, (i + 1) T)`` as inputs and the token after each as its target, so every token is an input in
exactly one window. The last window is padded: segment 0, weight 0. The last token has no target,
hence weight 0. Stages with shorter rows cut the same windows up.
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fope_jax.data.cache import TokenCache
from fope_jax.data.config import Packing
from fope_jax.data.repetition import has_repetition
from fope_jax.extras import require
from fope_jax.typing import Batch

_MOST_WINDOWS = 2**53  # integers are exact in a float up to here
_READING_THREADS = 4
_BATCHES_AHEAD = 8


def iterate_batches(
    batch: Callable[[int], Batch], start_step: int, num_steps: int | None
) -> Iterator[Batch]:
    """``batch(step)`` for the steps from ``start_step``, prefetched by grain in some threads."""
    grain = require("grain", "train")
    stop = None if num_steps is None else start_step + num_steps
    steps = grain.MapDataset.range(_MOST_WINDOWS).map(batch)[start_step:stop]
    return iter(steps.to_iter_dataset(grain.ReadOptions(_READING_THREADS, _BATCHES_AHEAD)))


class Loader:
    """Batches ``[B, T]`` of shuffled windows.

    Each epoch is another permutation of all windows. A batch may span two epochs, so no window is
    dropped.

    Args:
      cache: one split of a token cache.
      length: tokens of a row T.
      batch_size: rows of a batch B.
      seed: with the epoch, decides the permutation.
      packing: "documents": each document in a row is a segment with positions from 0, and EOS has
        weight 0, as the next token belongs to another document. "windows": a row is one segment
        with positions 0 to T - 1, in padding too.
      window: tokens of the windows that are shuffled and then cut into rows; None means T. If T
        does not divide it, a row may span two windows, which "documents" separates like documents.
      max_repeats, repeat_tokens: rows with such repetitions have weight 0, see `DataConfig`.
      first_token: of batch 0, in the shuffled order; negative if the first batches are never read.
      rows: numbers of the rows ``[R]`` that this process needs, ascending; the others are not read
        and stay zero, but for their positions where all rows have the same. None means all.

    Attributes:
      windows_per_epoch: ``ceil(N / window)``.
      steps_per_epoch: the steps that show every window at least once.
      batch_size: rows of a batch B, of all processes.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        length: int,
        batch_size: int,
        seed: int,
        packing: Packing = "documents",
        window: int | None = None,
        max_repeats: int | None = None,
        repeat_tokens: int = 13,
        first_token: int = 0,
        rows: np.ndarray | None = None,
    ):
        for name, value in (("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}; accepted: an integer of 1 or more")
        if packing not in typing.get_args(Packing):
            raise ValueError(f"packing = {packing!r}; accepted: {typing.get_args(Packing)}")
        if seed < 0:
            raise ValueError(f"seed = {seed}; accepted: an integer of 0 or more")
        if not cache.num_tokens:
            raise ValueError(
                "the token cache holds no text: corpus = 'none' trains on generated tasks alone"
            )
        self._cache, self._length, self._packing = cache, length, packing
        self.batch_size, self._first_token = batch_size, first_token
        self._max_repeats, self._repeat_tokens = max_repeats, repeat_tokens
        self._window = length if window is None else window
        self._pad_id = cache.tokenizer.pad_id
        self._own_rows = np.arange(batch_size) if rows is None else rows
        self.windows_per_epoch = math.ceil(cache.num_tokens / self._window)
        self.steps_per_epoch = math.ceil(
            self.windows_per_epoch * self._window / (length * batch_size)
        )
        # Grain adds the epoch to the seed: unhashed, seed 1 in epoch 0 would be seed 0 in epoch 1.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        windows = (
            require("grain", "train").MapDataset.range(self.windows_per_epoch).shuffle(seed=spread)
        )
        # Bounded: endless repeats make grain count sys.maxsize windows, which overflows.
        self._order = windows.repeat(_MOST_WINDOWS // self.windows_per_epoch)

    @property
    def summary(self) -> str:
        """Tokens and steps of an epoch, as a log line."""
        return f"{self._cache.num_tokens:,} tokens, an epoch is {self.steps_per_epoch:,} steps"

    def batch(self, step: int, whole: bool = False) -> Batch:
        """The batch of a step, counted from 0; ``whole`` reads the rows of all processes."""
        rows = np.arange(self.batch_size) if whole else self._own_rows
        found = self._rows(self._offsets(step, rows))
        if len(rows) == self.batch_size:
            return found
        batch = Batch(*(scatter_rows(leaf, rows, self.batch_size) for leaf in found))
        if self._packing == "windows":
            return batch._replace(positions=_row_positions((self.batch_size, self._length)))
        return batch

    def row_sources(self, step: int) -> list[dict[str, Any]]:
        """Of each row the ``window`` it begins in, and number and name of every document in it."""
        sources = []
        for row in self._offsets(step, np.arange(self.batch_size)):
            numbers: dict[int, None] = {}
            for _, start, count in self._pieces(row):
                stop = min(start + count, self._cache.num_tokens)
                first, starts = self._cache.document_starts(start, stop)
                numbers |= dict.fromkeys(range(first, first + len(starts)))
            documents = [{"number": n, "name": self._cache.document_name(n)} for n in numbers]
            sources.append({"window": int(row[0] // self._window), "documents": documents})
        return sources

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Batches of ``num_steps`` steps from ``start_step``, prefetched; None means endless."""
        return iterate_batches(self.batch, start_step, num_steps)

    def windows(self, numbers: np.ndarray) -> Batch:
        """The windows numbered ``numbers [B]``, from 0 in the order of the stream."""
        first = numbers.astype(np.int64)[:, None] * self._window
        return self._rows(first + np.arange(self._window))

    def _offsets(self, step: int, rows: np.ndarray) -> np.ndarray:
        """``[R, T]`` int64, the offset in the stream of each input of ``rows``."""
        begin = self._first_token + step * self.batch_size * self._length
        if begin < 0:
            raise IndexError(f"step {step} lies before the first token")
        indices = begin + rows[:, None] * self._length + np.arange(self._length)
        windows, inside = np.divmod(indices.ravel(), self._window)
        is_new = np.diff(windows, prepend=-1) != 0
        numbers = np.array([self._order[index] for index in windows[is_new].tolist()], np.int64)
        return (numbers[np.cumsum(is_new) - 1] * self._window + inside).reshape(indices.shape)

    def _pieces(self, offsets: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(column, first token, number of tokens) of the parts of a row that lie in one window."""
        begins = [0, len(offsets)]
        if offsets[-1] - offsets[0] != len(offsets) - 1:
            begins = [0, *(np.flatnonzero(np.diff(offsets) != 1) + 1).tolist(), len(offsets)]
        for begin, end in itertools.pairwise(begins):
            if offsets[begin] < self._cache.num_tokens:  # else it is all padding
                yield begin, int(offsets[begin]), end - begin

    def _rows(self, offsets: np.ndarray) -> Batch:
        """The batch whose inputs are the tokens at ``offsets [R, T]``."""
        cache, size, by_document = self._cache, self._cache.num_tokens, self._packing == "documents"
        tokens = np.full(offsets.shape, self._pad_id, np.int32)
        targets = np.full(offsets.shape, self._pad_id, np.int32)
        weights = np.zeros(offsets.shape, np.float32)
        columns = np.arange(offsets.shape[1])
        joins = np.diff(offsets, axis=1, prepend=offsets[:, :1] - 2) != 1  # a window begins
        begins = np.maximum.accumulate(np.where(joins, columns, 0), axis=1)
        # The offset of the first token of each token's segment.
        segment_starts = np.take_along_axis(offsets, begins, axis=1)
        # One more token than inputs: the target of the last input.
        pieces = [
            (row, column, first, count, min(first + count + 1, size))
            for row, row_offsets in enumerate(offsets)
            for column, first, count in self._pieces(row_offsets)
        ]
        streams = cache.read_many([(first, stop) for _, _, first, _, stop in pieces])
        for (row, column, first, count, stop), stream in zip(pieces, streams, strict=True):
            inputs = slice(column, column + min(count, len(stream)))
            scored = slice(column, column + len(stream) - 1)
            tokens[row, inputs] = stream[:count]
            targets[row, scored] = stream[1:]
            weights[row, scored] = 1
            if not by_document:
                continue
            starts = cache.document_starts(first, stop)[1].tolist()[1:]
            for start, end in itertools.pairwise([*starts, first + count]):
                begin = column + start - first
                # The last token of a document would predict the first of another.
                weights[row, begin - 1] = 0
                segment_starts[row, begin : column + end - first] = start
        inside = offsets < size
        if self._max_repeats is not None:
            read = np.where(inside, tokens, -1)
            weights[has_repetition(read, self._repeat_tokens, self._max_repeats)] = 0
        if by_document:
            segments = np.cumsum(segment_starts == offsets, axis=1)
            positions = np.where(inside, offsets - segment_starts, 0)
        else:
            segments, positions = np.ones_like(offsets), _row_positions(offsets.shape)
        return Batch(
            tokens=tokens,
            targets=targets,
            positions=positions.astype(np.int32),
            segments=np.where(inside, segments, 0).astype(np.int32),
            weights=weights,
        )


def _row_positions(shape: tuple[int, ...]) -> np.ndarray:
    """Positions of rows of one segment; padding has positions too, its segment 0 marks it."""
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)


def scatter_rows(rows: np.ndarray, numbers: np.ndarray, batch_size: int) -> np.ndarray:
    """``[B, T]`` with ``rows [R, T]`` at ``numbers [R]`` and zeros elsewhere.

    The memory of rows of zeros is not touched, so that it takes none.
    """
    batch = np.zeros((batch_size, *rows.shape[1:]), rows.dtype)
    batch[numbers] = rows
    return batch
