"""What is measured, as a list of units in the order of their worth; a unit that is done is kept.

A unit is one forward pass (or one prefill with its questions) of one variant, or one training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

LENGTH = 8192  # tokens that the model was trained on
MULTIPLES = (2, 1, 1.5)  # in the order of their worth
FAR = 4  # the longest, for the methods of FAR_METHODS
LONGEST = FAR * LENGTH
SCORED = 4096  # windows end this many tokens apart, so that no token is compared twice
PLACES = 6  # windows of a text that are chosen; how many are run is an argument

# A method as `fope evaluate --as` takes it. A stretch is made for twice the length up to there, and
# for four times beyond.
METHODS = {
    "rope": "same",
    "yarn": "yarn:factor={factor}",
    "fope": "fope",
    "clip": "clip",
    "ntk": "ntk_aware:factor={factor}",
    "self_extend": "self_extend:window=1024,group={group}",
    "dynamic_ntk": "dynamic_ntk:factor={factor}",
    "pi": "pi:factor={factor}",
    "llama3": "llama3:factor={factor}",
    "rerope": "rerope:window=2048",
    "log_n": "logit_scaling",
}
FAR_METHODS = ("rope", "yarn", "self_extend", "dynamic_ntk", "fope", "rerope", "ntk", "llama3")


class Unit(NamedTuple):
    """One measurement.

    Attributes:
      kind: "loss" or "every_key".
      method: of ``METHODS``, or the name of a training of ``TRAININGS``.
      text: what is read: "books" or "news"; of every_key the haystack, "noise" or "corpus".
      context: tokens of the window.
      window: its number; the same tokens, or questions, for all methods and contexts.
    """

    kind: str
    method: str
    text: str
    context: int
    window: int

    @property
    def key(self) -> dict[str, Any]:
        """The fields that tell its row from all others."""
        return self._asdict()


def variant_text(method: str, context: int) -> str:
    """The variant of the checkpoint for a context, as `fope evaluate --as` takes it.

    >>> variant_text("yarn", 16384), variant_text("yarn", 32768), variant_text("rope", 8192)
    ('yarn:factor=2', 'yarn:factor=4', 'same')
    """
    is_far = context > 2 * LENGTH
    return METHODS[method].format(factor=4 if is_far else 2, group=8 if is_far else 4)


def without_training(windows: int) -> Iterator[Unit]:
    """Part 1, the first window of everything before the second of anything."""
    contexts = [round(LENGTH * multiple) for multiple in MULTIPLES]
    for window in range(windows):
        for context, method in itertools.product(contexts, METHODS):
            yield Unit("loss", method, "books", context, window)
        for context, text, method in itertools.product(contexts, ("noise", "corpus"), METHODS):
            yield Unit("every_key", method, text, context, window)
        for method in FAR_METHODS:
            yield Unit("loss", method, "books", LONGEST, window)
        for context, method in itertools.product(contexts[:2], METHODS):
            yield Unit("loss", method, "news", context, window)
