"""What every retrieval task is: trials for tests, lessons for training, and a wall between them."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, NamedTuple

import numpy as np

RIVALS = 9  # wrong answers that the right one is ranked among

# What makes an item - a key, a dictionary, the beginning of a text to copy - has a checksum, and
# its last bit says whether the item is drawn in training or in tests. Both halves are drawn alike,
# so there is nothing to learn from the rule, and no list of used items has to be kept.
HALVES = ("training", "test")


def half_of(item: bytes) -> str:
    """The half that an item belongs to, of ``HALVES``.

    >>> half_of(b"12347"), half_of(b"12348")
    ('training', 'test')
    """
    return HALVES[zlib.crc32(item) & 1]


class Trial(NamedTuple):
    """One window with the answer as its end.

    Attributes:
      tokens: ``[C]`` int32, prompt and answer.
      answer: how many of the last tokens are the answer.
      rivals: wrong answers in tokens, ``RIVALS`` of them, that the right one is ranked among.
      parts: texts that the answer is made of, where it is a text of several.
    """

    tokens: np.ndarray
    answer: int
    rivals: tuple[np.ndarray, ...]
    parts: tuple[str, ...] = ()


class Task:
    """A kind of trial. Everything is drawn from the generator that is passed in.

    Class attributes:
      by_depth: whether what is asked for stands at one place, the depth: a share of the window's
        free tokens, 0 its beginning and 1 its end.
    """

    by_depth: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What rows and reports call it."""
        raise NotImplementedError

    def shortest(self, rng: np.random.Generator, half: str) -> int:
        """Tokens of the shortest window that holds the trial which ``rng`` would draw."""
        raise NotImplementedError

    def trial(self, rng: np.random.Generator, context: int, depth: float, half: str) -> Trial:
        """A window of exactly ``context`` tokens.

        Args:
          rng: draws what is asked for first, so that one seed asks the same at every length.
          context: tokens, answer included.
          depth: 0 to 1; without meaning where not ``by_depth``.
          half: of ``HALVES``.

        Raises:
          ValueError: the trial does not fit, or the depth is none.
        """
        raise NotImplementedError

    def lesson(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A window to train on: ``tokens [length]`` int32 and which of them are answers, bool."""
        trial = self.trial(rng, length, rng.random(), "training")
        return trial.tokens, np.arange(length) >= length - trial.answer

    def describe(self) -> dict[str, Any]:
        """Everything that its windows depend on besides seed, length and depth, as JSON values."""
        raise NotImplementedError


def check_place(name: str, context: int, shortest: int, depth: float) -> None:
    """Raises ValueError where a trial does not fit into ``context``, or ``depth`` is none."""
    if not 0 <= depth <= 1:
        raise ValueError(f"{name} depth is {depth}; accepted: 0 to 1")
    if context < shortest:
        raise ValueError(
            f"a {name} trial does not fit into a context of {context} tokens; the shortest that "
            f"holds it has {shortest}"
        )
