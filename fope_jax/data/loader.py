"""Windows of a token cache as batches: batch = f(seed, step), nothing else.

The stream of N tokens is cut into ``ceil(N / T)`` windows; window ``i`` has tokens
``[i T, (i + 1) T)`` as inputs, and the token after each as its target. Every token of the cache is
an input in exactly one window. The last window is filled up with the pad token, in segment 0 and
with weight 0. The last token of the stream has no target, hence weight 0.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np

from fope_jax.data.cache import TokenCache
from fope_jax.data.config import Packing
from fope_jax.extras import require
from fope_jax.typing import Batch

READING = {"num_threads": 1, "prefetch_buffer_size": 8}  # grain's thread that reads ahead
_MOST_WINDOWS = 2**53  # whole numbers are exact in a float up to it; no run sees as many


class Loader:
    """Batches ``[B, T]`` of shuffled windows.

    Each epoch is another permutation of all windows. Steps run on through epochs: a batch may end
    one and begin the next, so no window is dropped.

    Args:
      cache: one split of a token cache.
      length: tokens of a window T.
      batch_size: windows of a batch B.
      seed: decides the permutations, together with the epoch.
      packing: "documents": each document in a window is a segment with positions from 0, and an
        EOS has weight 0, since what follows belongs to another document. "windows": a window is
        one segment, whatever it holds, and its positions are 0 to T - 1, in padding as well: all
        rows of all batches have the same.

    Attributes:
      windows_per_epoch: ``ceil(N / T)``.
      steps_per_epoch: the steps that show every window at least once.
    """

    def __init__(
        self, cache: TokenCache, *, length: int, batch_size: int, seed: int,
        packing: Packing = "documents",
    ):  # fmt: skip
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
        self._pad_id = cache.tokenizer.pad_id
        documents = cache.documents
        self._starts = np.ascontiguousarray(documents["start"])
        self.windows_per_epoch = math.ceil(cache.num_tokens / length)
        self.steps_per_epoch = math.ceil(self.windows_per_epoch / batch_size)
        self._grain = require("grain", "train")
        # Grain adds the epoch to the seed it is given: spread, or seed 1 would repeat seed 0.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        windows = self._grain.MapDataset.range(self.windows_per_epoch).shuffle(seed=spread)
        # Without an end grain counts sys.maxsize windows, which batches of one row overflow.
        epochs = windows.repeat(_MOST_WINDOWS // self.windows_per_epoch)
        self._numbers = epochs.batch(batch_size)
        self._batches = self._numbers.map(self.windows)

    @property
    def about(self) -> str:
        """For people: how much text there is."""
        return f"{self._cache.num_tokens:,} tokens, an epoch is {self.steps_per_epoch:,} steps"

    def batch(self, step: int) -> Batch:
        """The batch of one step, counted from 0."""
        return self._batches[step]

    def documents(self, step: int) -> list[dict[str, Any]]:
        """Where the rows of one step's batch come from.

        Returns:
          For each row ``window``, its number, and ``documents``: ``number`` in the order of the
          stream and ``name`` of every document that has tokens in it.
        """
        rows, names = [], self._cache.documents["name"]
        for window in map(int, self._numbers[step]):
            ends = np.array([window * self._length, (window + 1) * self._length - 1])
            first, last = np.searchsorted(self._starts, ends, side="right") - 1
            found = [{"number": n, "name": str(names[n])} for n in range(int(first), int(last) + 1)]
            rows.append({"window": window, "documents": found})
        return rows

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Batches of ``num_steps`` steps from ``start_step`` on, read ahead in a thread.

        ``num_steps`` None goes on for ever.
        """
        stop = None if num_steps is None else start_step + num_steps
        options = self._grain.ReadOptions(**READING)
        return iter(self._batches[start_step:stop].to_iter_dataset(options))

    def windows(self, numbers: np.ndarray) -> Batch:
        """The windows with these numbers ``[B]``, counted from 0 in the order of the stream."""
        length, size = self._length, self._cache.num_tokens
        first = numbers.astype(np.int64) * length
        text = np.full((len(first), length + 1), self._pad_id, np.int32)
        for row, start in zip(text, first, strict=True):
            found = self._cache.tokens(start, min(start + length + 1, size))
            row[: len(found)] = found
        stream = first[:, None] + np.arange(length)  # [B, T] place of each input in the cache
        if self._packing == "windows":
            segments = np.ones_like(stream)
            positions = stream - first[:, None]  # also beyond the end: segments say what is padding
            scored = stream + 1 < size
        else:
            document = np.searchsorted(self._starts, stream, side="right") - 1
            segments = document - document[:, :1] + 1
            begin = np.maximum(self._starts[document], first[:, None])
            positions = np.where(stream < size, stream - begin, 0)
            end = np.append(self._starts[1:], size)[document]
            scored = stream + 1 < end
        inside = stream < size
        return Batch(
            tokens=text[:, :-1],
            targets=text[:, 1:],
            positions=positions.astype(np.int32),
            segments=np.where(inside, segments, 0).astype(np.int32),
            weights=(inside & scored).astype(np.float32),
        )
