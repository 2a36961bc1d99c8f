"""Batches of windows of a token cache: batch = f(seed, step), nothing else.

The stream of N tokens is cut into ``ceil(N / T)`` windows. Window ``i`` has tokens
``[i T, (i + 1) T)`` as inputs and the token after each as its target, so every token is an input in
exactly one window. The last window is padded: segment 0, weight 0. The last token has no target,
hence weight 0. Stages with shorter rows cut the same windows up.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.cache_reader import TokenCache
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
        # A window beyond the last is one of the next epoch.
        grain = require("grain", "train")
        self._order = grain.MapDataset.range(self.windows_per_epoch).shuffle(seed=spread)

    @property
    def summary(self) -> str:
        """Tokens and steps of an epoch, as a log line."""
        return f"{self._cache.num_tokens:,} tokens, an epoch is {self.steps_per_epoch:,} steps"

    def batch(self, step: int, whole: bool = False) -> Batch:
        """The batch of a step, counted from 0; ``whole`` reads the rows of all processes."""
        rows = np.arange(self.batch_size) if whole else self._own_rows
        found = self._read(self._pieces(step, rows), len(rows))
        if len(rows) == self.batch_size:
            return found
        batch = Batch(*(scatter_rows(leaf, rows, self.batch_size) for leaf in found))
        if self._packing == "windows":
            return batch._replace(positions=_row_positions((self.batch_size, self._length)))
        return batch

    def row_sources(self, step: int) -> list[dict[str, Any]]:
        """Of each row the ``window`` it begins in, and number and name of every document in it."""
        pieces = self._pieces(step, np.arange(self.batch_size))
        windows = {piece.row: piece.first // self._window for piece in reversed(pieces)}
        numbers: list[dict[int, None]] = [{} for _ in windows]
        for row, _, start, count in pieces:
            stop = min(start + count, self._cache.num_tokens)
            if start < stop:
                first, starts = self._cache.document_starts(start, stop)
                numbers[row] |= dict.fromkeys(range(first, first + len(starts)))
        name = self._cache.document_name
        return [
            {"window": windows[row], "documents": [{"number": n, "name": name(n)} for n in found]}
            for row, found in enumerate(numbers)
        ]

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Batches of ``num_steps`` steps from ``start_step``, prefetched; None means endless."""
        return iterate_batches(self.batch, start_step, num_steps)

    def windows(self, numbers: np.ndarray) -> Batch:
        """The windows numbered ``numbers [B]``, from 0 in the order of the stream."""
        firsts = (numbers.astype(np.int64) * self._window).tolist()
        pieces = [_Piece(row, 0, first, self._window) for row, first in enumerate(firsts)]
        return self._read(pieces, len(pieces), self._window)

    def _pieces(self, step: int, rows: np.ndarray) -> list[_Piece]:
        """What the inputs of ``rows`` of a step are, in order; neighbours in the stream as one."""
        begin = self._first_token + step * self.batch_size * self._length
        if begin < 0:
            raise IndexError(f"step {step} lies before the first token")
        pieces: list[_Piece] = []
        number = last = -1
        for index, row in enumerate(rows.tolist()):
            column = 0
            while column < self._length:
                window, inside = divmod(begin + row * self._length + column, self._window)
                if window != last:
                    number, last = int(self._order[window]), window
                first = number * self._window + inside
                count = min(self._window - inside, self._length - column)
                if column and pieces[-1].first + pieces[-1].count == first:
                    pieces[-1] = pieces[-1]._replace(count=pieces[-1].count + count)
                else:
                    pieces.append(_Piece(index, column, first, count))
                column += count
        return pieces

    def _read(self, pieces: Sequence[_Piece], rows: int, length: int | None = None) -> Batch:
        """The batch of these pieces of the stream; beyond its end is padding."""
        cache, size, by_document = self._cache, self._cache.num_tokens, self._packing == "documents"
        shape = (rows, length or self._length)
        tokens, targets = (np.full(shape, self._pad_id, np.int32) for _ in range(2))
        weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        steps = np.arange(shape[1], dtype=np.int32)
        positions = np.zeros(shape, np.int32) if by_document else _row_positions(shape)
        # One more token than inputs: the target of the last input.
        stops = [min(piece.first + piece.count + 1, size) for piece in pieces]
        streams = iter(
            cache.read_many(
                [(p.first, stop) for p, stop in zip(pieces, stops, strict=True) if p.first < size]
            )
        )
        segment = 0
        for (row, column, first, count), stop in zip(pieces, stops, strict=True):
            segment = 1 if column == 0 else segment + 1
            if first >= size:
                continue
            stream = next(streams)
            end, scored = column + min(count, len(stream)), column + len(stream) - 1
            tokens[row, column:end] = stream[:count]
            targets[row, column:scored] = stream[1:]
            weights[row, column:scored] = 1
            segments[row, column:end] = segment if by_document else 1
            if not by_document:
                continue
            positions[row, column:end] = steps[: end - column]
            for start in cache.document_starts(first, stop)[1].tolist()[1:]:
                begin = column + start - first
                # The last token of a document would predict the first of another.
                weights[row, begin - 1] = 0
                if begin < end:
                    segment += 1
                    segments[row, begin:end] = segment
                    positions[row, begin:end] = steps[: end - begin]
        if self._max_repeats is not None:
            read = np.where(segments > 0, tokens, -1)
            weights[has_repetition(read, self._repeat_tokens, self._max_repeats)] = 0
        return Batch(tokens, targets, positions, segments, weights)


class _Piece(NamedTuple):
    """Inputs of a row from a column on: the tokens of the stream from number ``first``."""

    row: int
    column: int
    first: int
    count: int


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
