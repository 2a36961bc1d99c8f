"""Needles after RULER, worded for base models: the end of the window is text to go on with.

Reference: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language
Models?", Section 3. What is different here: no instructions, the question repeats the needle's own
words; values have five digits; several answers are written in one order, that of their needles
(common words in that of the alphabet), so that there is one right text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Trial, check_trial_fits, split_of
from fope_jax.data.retrieval.text_task import (
    Pieces,
    TextTask,
    answer_tokens,
    distractor_tokens,
    draw_numbers,
)

NEEDLES = 4  # in a window: keys, values, questions or variables

WORDS = (
    "apple",
    "arrow",
    "basket",
    "bottle",
    "bridge",
    "candle",
    "castle",
    "circle",
    "cloud",
    "corner",
    "door",
    "engine",
    "farmer",
    "feather",
    "flower",
    "forest",
    "garden",
    "glass",
    "hammer",
    "harbour",
    "horse",
    "island",
    "kitchen",
    "ladder",
    "lamp",
    "letter",
    "market",
    "mirror",
    "mountain",
    "needle",
    "orange",
    "paper",
    "pencil",
    "pillow",
    "river",
    "saddle",
    "shadow",
    "silver",
    "stone",
    "table",
    "tower",
    "valley",
    "window",
    "winter",
)


def join_with_and(texts: Any) -> str:
    """A list as it stands in a sentence.

    >>> join_with_and(["a", "b", "c"]), join_with_and(["a"])
    ('a, b and c', 'a')
    """
    texts = [str(text) for text in texts]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _others(rng: np.random.Generator, split: str, count: int, taken: list[int]) -> list[list[int]]:
    """``NUM_DISTRACTORS`` lists of ``count`` numbers that do not begin with a taken one."""
    lists: list[list[int]] = []
    while len(lists) < NUM_DISTRACTORS:
        numbers = draw_numbers(rng, count, split)
        if numbers[0] not in taken:
            lists.append(numbers)
    return lists


def _sorted_depths(rng: np.random.Generator, count: int) -> list[float | None]:
    return np.sort(rng.random(count)).tolist()


@dataclass(frozen=True, eq=False)
class Needles(TextTask):
    """A task of needles, and what they have in common: the assembly of ``Pieces``."""

    def assemble(
        self,
        needles: list[str],
        depths: list[float | None],
        question: str,
        answer: str,
        distractors: list[str],
        texts: list[str],
    ) -> Pieces:
        """Pieces in tokens of pieces in text."""
        encode = self.tokenizer.encode
        asked, answered = answer_tokens(self.tokenizer, self.name, question, answer, texts)
        return Pieces(
            intro=[],
            needles=[list(encode(needle)) for needle in needles],
            depths=depths,
            question=asked,
            answer=answered,
            distractors=distractor_tokens(self.tokenizer, self.name, question, distractors),
            answer_texts=tuple(texts),
        )


class MultiKey(Needles):
    """Several words have a number each, and one of them is asked for; its needle is at the depth.

    Rivals are the numbers of the other words first, then numbers that are not in the window.
    """

    name: ClassVar[str] = "multi_key"

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        words = rng.choice(WORDS, NEEDLES, replace=False)
        numbers = draw_numbers(rng, NEEDLES + NUM_DISTRACTORS, split)
        pairs = list(zip(words, numbers, strict=False))
        return self.assemble(
            [f" The number of the {word} is {number}." for word, number in pairs],
            [None, *rng.random(NEEDLES - 1).tolist()],
            f" The number of the {words[0]} is",
            f" {numbers[0]}",
            [f" {number}" for number in numbers[1:]],
            [str(numbers[0])],
        )


class MultiValue(Needles):
    """One word has several numbers, each in a needle of its own, and all are asked for."""

    name: ClassVar[str] = "multi_value"
    has_depth: ClassVar[bool] = False

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        word = rng.choice(WORDS)
        numbers = draw_numbers(rng, NEEDLES, split)
        return self.assemble(
            [f" A number of the {word} is {number}." for number in numbers],
            _sorted_depths(rng, NEEDLES),
            f" The numbers of the {word} are",
            f" {join_with_and(numbers)}",
            [f" {join_with_and(others)}" for others in _others(rng, split, NEEDLES, numbers)],
            list(map(str, numbers)),
        )


class MultiQuery(Needles):
    """Several words have a number each, and all are asked for."""

    name: ClassVar[str] = "multi_query"
    has_depth: ClassVar[bool] = False

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        words = rng.choice(WORDS, NEEDLES, replace=False)
        numbers = draw_numbers(rng, NEEDLES, split)
        return self.assemble(
            [
                f" The number of the {word} is {number}."
                for word, number in zip(words, numbers, strict=True)
            ],
            _sorted_depths(rng, NEEDLES),
            f" The numbers of the {join_with_and(words)} are",
            f" {join_with_and(numbers)}",
            [f" {join_with_and(others)}" for others in _others(rng, split, NEEDLES, numbers)],
            list(map(str, numbers)),
        )


class VariableTracking(Needles):
    """A chain of assignments, and another beside it; all variables of one value are asked for.

    Each chain stands in its order, so that a variable is set before it is used. Rivals are the
    variables of the other chain first, then names that are not in the window.
    """

    name: ClassVar[str] = "variable_tracking"
    has_depth: ClassVar[bool] = False

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        numbers = draw_numbers(rng, 2, split)
        names = _draw_names(rng, (1 + NUM_DISTRACTORS) * NEEDLES)
        chains = [names[i : i + NEEDLES] for i in range(0, len(names), NEEDLES)]
        needles, depths = [], []
        for chain, number in zip(chains[:2], numbers, strict=True):
            values = [number, *(f"VAR {name}" for name in chain)]
            needles += [f" VAR {a} = {b}." for a, b in zip(chain, values, strict=False)]
            depths += _sorted_depths(rng, NEEDLES)
        return self.assemble(
            needles,
            depths,
            f" The variables with the value {numbers[0]} are",
            f" {join_with_and(chains[0])}",
            [f" {join_with_and(chain)}" for chain in chains[1:]],
            chains[0],
        )


def _draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of three capitals."""
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    codes = rng.choice(26**3, count, replace=False)
    return ["".join(letters[[code // 676, code // 26 % 26, code % 26]]) for code in codes]


@dataclass(frozen=True, eq=False)
class CommonWords(Needles):
    """A list of words in which some come eight times as often as any other; these are asked for.

    The list is the haystack: rounds of ``COMMON`` common words and as many of ``OTHERS`` others by
    turns, in random order. Its first round loses tokens from its beginning, to the length. Rivals
    are other words of the list.
    """

    name: ClassVar[str] = "common_words"
    has_depth: ClassVar[bool] = False
    COMMON: ClassVar[int] = 3
    OTHERS: ClassVar[int] = 24

    def _draw(self, rng: np.random.Generator, split: str) -> tuple[list[str], list[str], Pieces]:
        """The common words, the others, and the trial without its list."""
        while True:
            words = rng.choice(WORDS, self.COMMON + self.OTHERS, replace=False).tolist()
            common, others = sorted(words[: self.COMMON]), words[self.COMMON :]
            if split_of(" ".join(common).encode()) == split:
                break
        distractors = [
            rng.choice(others, self.COMMON, replace=False) for _ in range(NUM_DISTRACTORS)
        ]
        pieces = self.assemble(
            [],
            [],
            " The most common words are",
            f" {join_with_and(common)}",
            [f" {join_with_and(sorted(words))}" for words in distractors],
            common,
        )
        return common, others, pieces

    def _rounds(
        self, rng: np.random.Generator, common: list[str], others: list[str]
    ) -> Iterator[list[int]]:
        """The list in tokens, round by round, the last one first."""
        for turn in itertools.count(0, self.COMMON):
            words = [*common, *(others[(turn + i) % self.OTHERS] for i in range(self.COMMON))]
            yield [token for word in rng.permutation(words) for token in self._encoded(f" {word},")]

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        """With two whole rounds, below which no word is more common than another."""
        common, others, pieces = self._draw(rng, split)
        rounds = self._rounds(rng, common, others)
        return pieces.fixed + len(next(rounds)) + len(next(rounds))

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        common, others, pieces = self._draw(rng, split)
        kept: list[int] = []
        room = context - pieces.fixed
        for number, words in enumerate(self._rounds(rng, common, others)):
            kept = words + kept
            if number == 1:
                check_trial_fits(self.name, context, pieces.fixed + len(kept), depth)
            if number >= 1 and len(kept) >= room:
                break
        window = [*kept[len(kept) - room :], *pieces.question, *pieces.answer]
        distractors = tuple(np.asarray(distractor, np.int32) for distractor in pieces.distractors)
        return Trial(
            np.asarray(window, np.int32), len(pieces.answer), distractors, pieces.answer_texts
        )
