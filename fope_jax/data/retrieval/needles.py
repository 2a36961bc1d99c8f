"""Needle tasks after RULER, for base models: the window ends in text to continue.

Reference: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language
Models?", Section 3. Differences: no instructions; the question repeats the needle's words; values
have five digits; several answers have one order, that of their needles or the alphabet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fope_jax.data.retrieval.base import (
    NUM_DISTRACTORS,
    Trial,
    TrialLengths,
    check_trial_fits,
    split_of,
)
from fope_jax.data.retrieval.text_task import Pieces, TextTask, answer_tokens, draw_numbers

NEEDLES = 4  # per window: keys, values, questions or variables
KEYS = 1 + NUM_DISTRACTORS  # per window of every_key

_WORD_LIST = """
apple arrow basket bottle bridge candle castle circle cloud corner door engine farmer feather
flower forest garden glass hammer harbour horse island kitchen ladder lamp letter market mirror
mountain needle orange paper pencil pillow river saddle shadow silver stone table tower valley
window winter
"""
WORDS = _WORD_LIST.split()


def join_with_and(texts: Any) -> str:
    """Joins a list for a sentence.

    >>> join_with_and(["a", "b", "c"]), join_with_and(["a"])
    ('a, b and c', 'a')
    """
    texts = [str(text) for text in texts]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _sorted_depths(rng: np.random.Generator, count: int) -> list[float]:
    return np.sort(rng.random(count)).tolist()


def _other_answers(rng: np.random.Generator, split: str, numbers: list[int]) -> list[str]:
    """Wrong answers with as many numbers; none begins with one of ``numbers``."""
    answers: list[str] = []
    while len(answers) < NUM_DISTRACTORS:
        drawn = draw_numbers(rng, len(numbers), split)
        if drawn[0] not in numbers:
            answers.append(f" {join_with_and(drawn)}")
    return answers


class MultiKey(TextTask):
    """Several words have a number each and one is asked for; its needle is at the depth.

    Distractors: the numbers of the other words, then numbers that are not in the window.
    """

    name: ClassVar[str] = "multi_key"

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        words = rng.choice(WORDS, NEEDLES, replace=False)
        numbers = draw_numbers(rng, NEEDLES + NUM_DISTRACTORS, split)
        pairs = zip(words, numbers, strict=False)
        return self.encode_pieces(
            needles=[f" The number of the {word} is {number}." for word, number in pairs],
            depths=[None, *rng.random(NEEDLES - 1).tolist()],
            question=f" The number of the {words[0]} is",
            answer=f" {numbers[0]}",
            distractors=[f" {number}" for number in numbers[1:]],
            answer_texts=[str(numbers[0])],
        )


class MultiValue(TextTask):
    """One word has several numbers, each in a separate needle, and all are asked for."""

    name: ClassVar[str] = "multi_value"
    has_depth: ClassVar[bool] = False
    article: ClassVar[str] = "A"

    def draw_words(self, rng: np.random.Generator) -> list[str]:
        return [rng.choice(WORDS)]

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        words, numbers = self.draw_words(rng), draw_numbers(rng, NEEDLES, split)
        pairs = zip(itertools.cycle(words), numbers, strict=False)
        return self.encode_pieces(
            needles=[
                f" {self.article} number of the {word} is {number}." for word, number in pairs
            ],
            depths=_sorted_depths(rng, NEEDLES),
            question=f" The numbers of the {join_with_and(words)} are",
            answer=f" {join_with_and(numbers)}",
            distractors=_other_answers(rng, split, numbers),
            answer_texts=list(map(str, numbers)),
        )


class MultiQuery(MultiValue):
    """Several words have a number each, and all are asked for."""

    name: ClassVar[str] = "multi_query"
    article: ClassVar[str] = "The"

    def draw_words(self, rng: np.random.Generator) -> list[str]:
        return rng.choice(WORDS, NEEDLES, replace=False).tolist()


class EveryKey(TextTask):
    """Ten words have a number each, evenly spaced, and every one is asked for after one window.

    A window is read once and then asked ten times, each time as if nothing had been asked before.
    That is cheap where reading costs, but the ten trials share a haystack: they are less than ten
    of other windows. The candidates are the numbers of the window, so a model that knows which
    numbers there were, and not whose, ranks the right one by chance.

    Questions have equally many tokens, and so have answers: words and numbers are chosen for it.
    """

    name: ClassVar[str] = "every_key"
    depths: ClassVar[tuple[float, ...]] = tuple((i + 0.5) / KEYS for i in range(KEYS))

    @cached_property
    def words(self) -> list[str]:
        """Words whose questions have equally many tokens; ValueError where fewer than ``KEYS``."""
        lengths = [len(self.tokenizer.encode(_question(word))) for word in WORDS]
        most = max(lengths, key=lengths.count)
        words = [word for word, size in zip(WORDS, lengths, strict=True) if size == most]
        if len(words) < KEYS:
            raise ValueError(
                f"{self.name} takes {KEYS} words whose questions have equally many tokens; "
                f"with this tokenizer {len(words)} of {len(WORDS)} have; leave it out"
            )
        return words

    def draw_pieces(self, rng: np.random.Generator, split: str, asked: int = 0) -> Pieces:
        words = rng.choice(self.words, KEYS, replace=False).tolist()
        numbers: list[int] = []
        sizes: list[tuple[int, int]] = []  # tokens of question and answer
        while len(numbers) < KEYS:
            (number,) = draw_numbers(rng, 1, split)
            question = _question(words[len(numbers)])
            asked_for = answer_tokens(self.tokenizer, self.name, question, f" {number}", ())
            size = (len(asked_for[0]), len(asked_for[1]))
            if number not in numbers and size in (sizes or [size]):
                numbers.append(number)
                sizes = [size]
        pairs = list(zip(words, numbers, strict=True))
        return self.encode_pieces(
            needles=[f"{_question(word)} {number}." for word, number in pairs],
            depths=self.depths,
            question=_question(words[asked]),
            answer=f" {numbers[asked]}",
            distractors=[f" {number}" for number in numbers if number != numbers[asked]],
            answer_texts=[str(numbers[asked])],
        )

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        """Asks for the key at the one of ``depths`` that is next to ``depth``."""
        asked = min(max(0, int(depth * KEYS)), KEYS - 1)
        pieces = self.draw_pieces(rng, split, asked)
        trial = self.place_pieces(pieces, rng, context, depth)
        return trial._replace(question_length=len(pieces.question))


def _question(word: str) -> str:
    return f" The number of the {word} is"


class VariableTracking(TextTask):
    """Two chains of assignments, each in order; all variables with one chain's value are asked for.

    Distractors: variables of the other chain, then names that are not in the window.
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
        return self.encode_pieces(
            needles=needles,
            depths=depths,
            question=f" The variables with the value {numbers[0]} are",
            answer=f" {join_with_and(chains[0])}",
            distractors=[f" {join_with_and(chain)}" for chain in chains[1:]],
            answer_texts=chains[0],
        )


def _draw_names(rng: np.random.Generator, count: int) -> list[str]:
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    codes = rng.choice(26**3, count, replace=False)
    return ["".join(letters[[code // 676, code // 26 % 26, code % 26]]) for code in codes]


class CommonWords(TextTask):
    """A list of words, some eight times as frequent as the others; these are asked for.

    The list is the haystack. A round is ``COMMON`` common and as many other words in random order;
    the first round is cut at its beginning to fit. Distractors are other words of the list.
    """

    name: ClassVar[str] = "common_words"
    has_depth: ClassVar[bool] = False
    COMMON: ClassVar[int] = 3
    OTHERS: ClassVar[int] = 24

    def _draw(
        self, rng: np.random.Generator, split: str
    ) -> tuple[Pieces, Iterator[list[int]], list[int]]:
        """The pieces, an iterator over earlier rounds, and the last two rounds, all in tokens."""
        while True:
            words = rng.choice(WORDS, self.COMMON + self.OTHERS, replace=False).tolist()
            common, others = sorted(words[: self.COMMON]), words[self.COMMON :]
            if split_of(" ".join(common).encode()) == split:
                break
        drawn = (rng.choice(others, self.COMMON, replace=False) for _ in range(NUM_DISTRACTORS))
        wrong = list(dict.fromkeys(tuple(sorted(words)) for words in drawn))
        # Others in place of repeated ones, without a draw, which would change the haystack.
        more = (tuple(sorted(words)) for words in itertools.combinations(others, self.COMMON))
        unused = (words for words in more if words not in wrong)
        wrong += itertools.islice(unused, NUM_DISTRACTORS - len(wrong))
        pieces = self.encode_pieces(
            needles=[],
            depths=[],
            question=" The most common words are",
            answer=f" {join_with_and(common)}",
            distractors=[f" {join_with_and(words)}" for words in wrong],
            answer_texts=common,
        )

        def rounds() -> Iterator[list[int]]:
            for turn in itertools.count(0, self.COMMON):
                rare = [others[(turn + i) % self.OTHERS] for i in range(self.COMMON)]
                order = rng.permutation([*common, *rare])
                yield [token for word in order for token in self.tokenizer.encode(f" {word},")]

        earlier = rounds()
        last = next(earlier)
        return pieces, earlier, next(earlier) + last

    def lengths(self, rng: np.random.Generator, split: str) -> TrialLengths:
        pieces, _, two_rounds = self._draw(rng, split)
        return pieces.lengths._replace(window=pieces.fixed + len(two_rounds))

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        pieces, earlier, words = self._draw(rng, split)
        check_trial_fits(self.name, context, pieces.fixed + len(words), depth)
        room = context - pieces.fixed
        while len(words) < room:
            words = next(earlier) + words
        return pieces.trial([words[len(words) - room :]])
