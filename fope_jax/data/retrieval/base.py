"""What every retrieval task has: test trials, training windows, and no item that is in both."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, NamedTuple

import numpy as np

NUM_DISTRACTORS = 9  # wrong answers that the right one is ranked among

# A checksum of what makes an item (a key, a dictionary, the beginning of a text to copy) puts it
# into one split. Both splits are drawn alike, so there is nothing to learn from the rule, and no
# list of used items has to be kept.
ITEM_SPLITS = ("training", "test")


def split_of(item: bytes) -> str:
    """The split that an item belongs to, of ``ITEM_SPLITS``.

    >>> split_of(b"12347"), split_of(b"12348")
    ('training', 'test')
    """
    return ITEM_SPLITS[zlib.crc32(item) & 1]


class Trial(NamedTuple):
    """One window with the answer as its end.

    Attributes:
      tokens: ``[C]`` int32, prompt and answer.
      answer_length: how many of the last tokens are the answer.
      distractors: wrong answers in tokens, ``NUM_DISTRACTORS`` of them, to rank it among.
      answer_texts: texts that the answer is made of, where it is a text of several.
    """

    tokens: np.ndarray
    answer_length: int
    distractors: tuple[np.ndarray, ...]
    answer_texts: tuple[str, ...] = ()


class Task:
    """A kind of trial. Everything is drawn from the generator that is passed in.

    Attributes:
      name: in rows and reports.
      has_depth: whether what is asked for stands at one place, the depth: a share of the window's
        free tokens, 0 its beginning and 1 its end.
    """

    name: Any
    has_depth: ClassVar[bool] = True

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        """Tokens of the shortest window that holds the trial which ``rng`` would draw."""
        raise NotImplementedError

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        """A window of exactly ``context`` tokens.

        Args:
          rng: draws what is asked for first, so that one seed asks the same at every length.
          context: tokens, answer included.
          depth: 0 to 1; without meaning where not ``has_depth``.
          split: of ``ITEM_SPLITS``.

        Raises:
          ValueError: the trial does not fit, or the depth is outside 0 to 1.
        """
        raise NotImplementedError

    def draw_training_window(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A window to train on: ``tokens [length]`` int32 and which of them are answers, bool."""
        trial = self.draw_trial(rng, length, rng.random(), "training")
        return trial.tokens, np.arange(length) >= length - trial.answer_length

    def describe(self) -> dict[str, Any]:
        """Everything that its windows depend on besides seed, length and depth, as JSON values."""
        raise NotImplementedError


def check_trial_fits(name: str, context: int, min_length: int, depth: float) -> None:
    """Raises ValueError where a trial does not fit into ``context``, or ``depth`` is none."""
    if not 0 <= depth <= 1:
        raise ValueError(f"{name} depth is {depth}; accepted: 0 to 1")
    if context < min_length:
        raise ValueError(
            f"a {name} trial does not fit into a context of {context} tokens; the shortest that "
            f"holds it has {min_length}"
        )
