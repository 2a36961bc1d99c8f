"""The interface of retrieval tasks, and the split of their items into training and test."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, NamedTuple

import numpy as np

NUM_DISTRACTORS = 9  # the right answer is ranked among these

# The checksum of an item (a key, a dictionary, the first tokens of a source to copy) decides its
# split. Both splits have the same distribution, so a model cannot learn the rule, and no list of
# used items is needed.
ITEM_SPLITS = ("training", "test")


def split_of(item: bytes) -> str:
    """The split of an item.

    >>> split_of(b"12347"), split_of(b"12348")
    ('training', 'test')
    """
    return ITEM_SPLITS[zlib.crc32(item) & 1]


class TrialTooLong(ValueError):
    """The trial drawn does not fit into the window; one of another seed may."""


class Trial(NamedTuple):
    """A window that ends in the answer.

    Attributes:
      tokens: ``[C]`` int32, prompt and answer.
      distractors: ``NUM_DISTRACTORS`` wrong answers, as tokens.
      answer_texts: the texts in the answer, if it is several.
      question_length: tokens before the answer that trials of one window do not share.
    """

    tokens: np.ndarray
    answer_length: int
    distractors: tuple[np.ndarray, ...]
    answer_texts: tuple[str, ...] = ()
    question_length: int = 0


class TrialLengths(NamedTuple):
    """Tokens of a trial.

    Attributes:
      window: of the shortest window that fits it.
      answer: of its answer.
      longest: of its longest answer, right or wrong.
    """

    window: int
    answer: int
    longest: int


class Task:
    """A retrieval task; all randomness comes from the generator passed in.

    ``has_depth``: whether the needle has a depth, its share of the window's free tokens, 0 to 1.
    ``depths``: those that one window is asked for in turn: with equal generators its trials differ
    in question and answer alone. None where a window has one question, at any depth.
    """

    name: Any
    has_depth: ClassVar[bool] = True
    depths: ClassVar[tuple[float, ...] | None] = None

    def lengths(self, rng: np.random.Generator, split: str) -> TrialLengths:
        """Tokens of the trial that ``rng`` would draw; the same ones in every context."""
        raise NotImplementedError

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        """Tokens of the shortest window that fits the trial ``rng`` would draw."""
        return self.lengths(rng, split).window

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        """A window of ``context`` tokens, answer included; TrialTooLong if the trial does not fit.

        ``rng`` draws the question first, so that one seed asks the same at every length. ``depth``
        is 0 to 1 and ignored without ``has_depth``. ``split`` is one of ``ITEM_SPLITS``.
        """
        raise NotImplementedError

    def draw_training_window(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A training window: ``tokens [length]`` int32, and ``[length]`` bool, true for answers."""
        trial = self.draw_trial(rng, length, rng.random(), "training")
        return trial.tokens, np.arange(length) >= length - trial.answer_length

    def describe(self) -> dict[str, Any]:
        """JSON values that decide the windows, besides seed, length and depth."""
        raise NotImplementedError


def check_trial_fits(name: str, context: int, min_length: int, depth: float) -> None:
    """Raises TrialTooLong for a short ``context``, ValueError for ``depth`` outside of 0 to 1."""
    if not 0 <= depth <= 1:
        raise ValueError(f"{name} depth is {depth}; accepted: 0 to 1")
    if context < min_length:
        raise TrialTooLong(
            f"a {name} trial does not fit into a context of {context} tokens; the shortest that "
            f"holds it has {min_length}"
        )
