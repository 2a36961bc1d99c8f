"""Batches of windows of a token cache: batch = f(seed, step), nothing else.

The stream of N tokens is cut into ``ceil(N / T)`` windows. Window ``i`` has tokens
``[i T, (i + 1) T)`` as inputs and the token after each as its target, so every token is an input in
exactly one window. The last window is padded: segment 0, weight 0. The last token has no target,
hence weight 0. Stages with shorter rows cut the same windows up.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fope_jax.data.cache import TokenCache
from fope_jax.data.config import Packing
from fope_jax.extras import require
from fope_jax.typing import Batch

_MOST_WINDOWS = 2**53  # integers are exact in a float up to here


def iterate_batches(
    batch: Callable[[int], Batch], start_step: int, num_steps: int | None
) -> Iterator[Batch]:
    """``batch(step)`` for the steps from ``start_step``, prefetched by grain in a thread."""
    grain = require("grain", "train")
    stop = None if num_steps is None else start_step + num_steps
    steps = grain.MapDataset.range(_MOST_WINDOWS).map(batch)[start_step:stop]
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


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
      first_token: of batch 0, in the shuffled order; negative if the first batches are never read.

    Attributes:
      windows_per_epoch: ``ceil(N / window)``.
      steps_per_epoch: the steps that show every window at least once.
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
        first_token: int = 0,
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
        self._batch_size, self._first_token = batch_size, first_token
        self._window = length if window is None else window
        self._pad_id = cache.tokenizer.pad_id
        documents = cache.documents
        self._starts = np.ascontiguousarray(documents["start"])
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

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self._rows(self._offsets(step))

    def row_sources(self, step: int) -> list[dict[str, Any]]:
        """Of each row the ``window`` it begins in, and number and name of every document in it."""
        rows, names = [], self._cache.documents["name"]
        for offsets in self._offsets(step):
            inside = offsets[offsets < self._cache.num_tokens]
            numbers = np.unique(np.searchsorted(self._starts, inside, side="right") - 1)
            documents = [{"number": int(n), "name": str(names[n])} for n in numbers]
            rows.append({"window": int(offsets[0] // self._window), "documents": documents})
        return rows

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Batches of ``num_steps`` steps from ``start_step``, prefetched; None means endless."""
        return iterate_batches(self.batch, start_step, num_steps)

    def windows(self, numbers: np.ndarray) -> Batch:
        """The windows numbered ``numbers [B]``, from 0 in the order of the stream."""
        first = numbers.astype(np.int64)[:, None] * self._window
        return self._rows(first + np.arange(self._window))

    def _offsets(self, step: int) -> np.ndarray:
        """``[B, T]`` int64, the offset in the stream of each input."""
        count = self._batch_size * self._length
        begin = self._first_token + step * count
        if begin < 0:
            raise IndexError(f"step {step} lies before the first token")
        first, last = begin // self._window, -(-(begin + count) // self._window)
        numbers = np.array([self._order[index] for index in range(first, last)], np.int64)
        offsets = (numbers[:, None] * self._window + np.arange(self._window)).ravel()
        skipped = begin - first * self._window
        return offsets[skipped : skipped + count].reshape(self._batch_size, self._length)

    def _rows(self, offsets: np.ndarray) -> Batch:
        """The batch whose inputs are the tokens at ``offsets [B, T]``."""
        size = self._cache.num_tokens
        joins = np.diff(offsets, axis=1, prepend=offsets[:, :1] - 1) != 1  # a window begins
        joins[:, 0] = True
        tokens = np.full(offsets.shape, self._pad_id, np.int32)
        targets = np.full(offsets.shape, self._pad_id, np.int32)
        for row, row_offsets in enumerate(offsets):
            begins = np.flatnonzero(joins[row])
            for begin, end in zip(begins, [*begins[1:], len(row_offsets)], strict=True):
                first = row_offsets[begin]
                if first >= size:  # rows that are all padding
                    continue
                # One more token than inputs: the target of the last input.
                stream = self._cache.tokens(first, min(first + end - begin + 1, size))
                known = min(len(stream), end - begin)
                tokens[row, begin : begin + known] = stream[:known]
                targets[row, begin : begin + len(stream) - 1] = stream[1:]
        if self._packing == "windows":
            segments = np.ones_like(offsets)
            # Padding has positions too; its segment 0 marks it.
            positions = np.broadcast_to(np.arange(offsets.shape[1]), offsets.shape)
            scored = offsets + 1 < size
        else:
            document = np.searchsorted(self._starts, offsets, side="right") - 1
            changes = np.diff(document, axis=1, prepend=document[:, :1])
            segments = np.cumsum(np.where(joins, 1, changes), axis=1)
            begin = np.maximum.accumulate(np.where(joins, np.arange(offsets.shape[1]), 0), axis=1)
            begin = np.maximum(self._starts[document], np.take_along_axis(offsets, begin, axis=1))
            positions = np.where(offsets < size, offsets - begin, 0)
            end = np.append(self._starts[1:], size)[document]
            scored = offsets + 1 < end
        inside = offsets < size
        return Batch(
            tokens=tokens,
            targets=targets,
            positions=positions.astype(np.int32),
            segments=np.where(inside, segments, 0).astype(np.int32),
            weights=(inside & scored).astype(np.float32),
        )
