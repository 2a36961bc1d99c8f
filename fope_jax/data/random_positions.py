"""Random positions: an ordered draw from a longer range for each document of a row.

A model that has met distances of thousands of tokens in rows of hundreds is not surprised by them
in a longer text. Draws depend on seed, step and row alone, through NumPy's Philox generator, whose
bits are the same in every release; so they survive a resume and do not depend on mesh or processes,
and a process draws only for the rows that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fope_jax.data.loader import iterate_batches
from fope_jax.data.task_mixture import BatchLoader
from fope_jax.typing import Batch

DRAWS = ("subset", "float")
_FLOAT_BITS = 24  # float32 holds positions and their differences exactly in so many bits
_FRACTION_BITS = 4  # at least, of a token
_SALT = 0x706F73  # no other draw of a run has the same entropy


def check_draw(position_range: int | None, draw: str) -> None:
    """Raises ValueError if positions cannot be drawn so; checks nothing for ``subset``."""
    if draw != "float":
        return
    if position_range is None:
        raise ValueError(
            "position_draw = 'float'; accepted: 'subset', or with it a position_range, the tokens "
            "to draw from"
        )
    longest = 2 ** (_FLOAT_BITS - _FRACTION_BITS)
    if position_range > longest:
        raise ValueError(
            f"position_range = {position_range}; accepted: at most {longest} with position_draw = "
            f"'float': float32 has no fractions of {2**-_FRACTION_BITS:g} of a token beyond"
        )


@dataclass(frozen=True)
class PositionDraw:
    """How positions are drawn.

    Attributes:
      position_range: R, tokens.
      draw: ``subset``: whole positions from 0 to R - 1; ``float``: multiples of ``step`` from 0 to
        R - ``step``.
      seed: 0 or more.
    """

    position_range: int
    draw: str
    seed: int

    @property
    def step(self) -> float:
        """Tokens between neighbouring positions that can be drawn.

        >>> PositionDraw(2048, "float", seed=0).step == 2**-13
        True
        """
        if self.draw == "subset":
            return 1.0
        return 2.0 ** ((self.position_range - 1).bit_length() - _FLOAT_BITS)

    def positions(self, segments: np.ndarray, key: Sequence[int], padding: np.ndarray | int = 0):
        """Positions ``[B, T]``, int32 or float32, that rise along each segment of ``segments``.

        Segments are stretches of one number; those of 0 are padding and get its position. ``key``
        are integers of 0 or more; a row has the same positions for the same key, number and
        segments, whatever is in the other rows. Raises ValueError for a segment of more tokens than
        the range has positions.
        """
        words = np.random.SeedSequence([_SALT, self.seed, *key]).generate_state(2, np.uint64)
        cells = round(self.position_range / self.step)
        chosen = np.zeros(segments.shape, np.int64)
        for number in np.flatnonzero(np.any(segments, axis=1)).tolist():
            row, row_segments = chosen[number], segments[number]
            # Counters so far apart never meet: 2**192 draws lie between two rows.
            bits = np.random.Philox(key=words, counter=[0, 0, 0, number])
            edges = np.flatnonzero(np.diff(row_segments, prepend=-1, append=-1))
            for start, stop in zip(edges[:-1], edges[1:], strict=True):
                if row_segments[start]:
                    row[start:stop] = ordered_subset(bits, cells, stop - start)
        dtype = np.float32 if self.draw == "float" else np.int32
        drawn = (chosen * self.step).astype(dtype)
        return np.where(segments == 0, np.asarray(padding).astype(dtype), drawn)

    def __call__(self, batch: Batch, step: int) -> Batch:
        """``batch`` of a step with positions drawn for each row and segment."""
        segments = np.broadcast_to(batch.segments, batch.tokens.shape)
        return batch._replace(positions=self.positions(segments, [step], batch.positions))


def ordered_subset(bits: np.random.BitGenerator, size: int, count: int) -> np.ndarray:
    """``count`` different numbers below ``size``, rising; every subset is equally likely.

    The first different ones of independent draws, or all but those, whichever are fewer. 64 bits
    modulo ``size`` favour a number by at most ``size / 2**64``.

    >>> ordered_subset(np.random.Philox(0), 4, 4).tolist()
    [0, 1, 2, 3]
    """
    if count > size:
        raise ValueError(f"{count} different positions of {size}: there are not so many")
    few, chosen = min(count, size - count), np.empty(0, np.int64)
    while len(chosen) < few:
        more = bits.random_raw(2 * (few - len(chosen))) % np.uint64(size)
        chosen = np.concatenate([chosen, more.astype(np.int64)])
        chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])][:few]
    return np.sort(chosen) if few == count else np.setdiff1d(np.arange(size), chosen)


class RandomPositions:
    """A loader whose batches are at drawn positions: batch = f(seed, step) still."""

    def __init__(self, loader: BatchLoader, draw: PositionDraw):
        self._loader, self._draw = loader, draw
        unit = "whole" if draw.draw == "subset" else f"multiples of {draw.step:g}"
        self.summary = (
            f"{loader.summary}; positions: {unit}, ordered, drawn from 0 to "
            f"{draw.position_range:,} for each document"
        )

    def batch(self, step: int, whole: bool = False) -> Batch:
        """The batch of a step, see `Loader.batch`."""
        return self._draw(self._loader.batch(step, whole), step)

    def iterate(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Batches of ``num_steps`` steps from ``start_step``, see `Loader.iterate`."""
        return iterate_batches(self.batch, start_step, num_steps)

    def row_sources(self, step: int) -> list[dict[str, Any]]:
        """The source of each row, see `Loader.row_sources`."""
        return self._loader.row_sources(step)
