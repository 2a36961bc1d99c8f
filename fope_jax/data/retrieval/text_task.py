"""Tasks in text: needles in a haystack, then a question and its answer.

Pieces are joined as tokens, so that a window has the exact length with any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.retrieval.base import (
    NUM_DISTRACTORS,
    Task,
    Trial,
    TrialLengths,
    check_trial_fits,
    split_of,
)

FILLER = " The sky is blue. The grass is green. The sun is yellow. There and back again."


def answer_tokens(
    tokenizer: Any, name: str, question: str, answer: str, texts: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Tokens of question and answer, which are encoded as one text as a model would write it.

    The answer's tokens are those after the prefix shared with the question alone, so a token that
    spans the border belongs to the answer. ValueError if decoding them loses one of ``texts``.
    """
    question_alone = list(tokenizer.encode(question))
    joint = list(tokenizer.encode(question + answer))
    shared = 0
    while shared < min(len(question_alone), len(joint)) and question_alone[shared] == joint[shared]:
        shared += 1
    written = tokenizer.decode(joint[shared:])
    for text in texts:
        if text not in written:
            raise ValueError(
                f"{name}: the tokenizer writes the answer {text} as {written!r}; it must keep "
                "digits and letters"
            )
    return joint[:shared], joint[shared:]


@dataclass(frozen=True)
class NoiseHaystack:
    """A repeated text; needles stand between whole sentences.

    The gap before the first needle is cut at its beginning, later gaps at their end. Needles begin
    with a space: a gap cut after a token in ``space_tokens`` ends in the text's last token instead.
    """

    text: str
    tokens: tuple[int, ...]
    space_tokens: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, text: str = FILLER) -> NoiseHaystack:
        tokens = tuple(tokenizer.encode(text))
        ends_in_space = (i for i in set(tokens) if tokenizer.decode([i])[-1:].isspace())
        return cls(text, tokens, frozenset(ends_in_space))

    def gaps(self, rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
        """Tokens before, between and after the needles, of these ``sizes``."""
        text = np.asarray(self.tokens, np.int32)
        first = np.resize(text, -(-sizes[0] // len(text)) * len(text))
        later = [np.resize(text, size) for size in sizes[1:]]
        for gap in later:
            if len(gap) and int(gap[-1]) in self.space_tokens:
                gap[-1] = text[-1]
        return [first[len(first) - sizes[0] :], *later]

    @property
    def ending(self) -> dict[str, str]:
        """Distinguishes these windows from older ones, which kept a space before a needle."""
        return {"ends": "no space"} if self.space_tokens else {}

    def describe(self) -> dict[str, Any]:
        return {"haystack": "noise", "filler": self.text, **self.ending}


@dataclass(frozen=True, eq=False)
class CorpusHaystack:
    """A random stretch of a `TokenCache`; needles may stand inside a sentence."""

    cache: Any

    def gaps(self, rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
        total = sum(sizes)
        if total > self.cache.num_tokens:
            raise ValueError(
                f"a haystack of {total} tokens: the {self.cache.split} split has "
                f"{self.cache.num_tokens}; evaluate shorter lengths, or take needle_haystack = "
                "'noise'"
            )
        start = int(rng.integers(0, self.cache.num_tokens - total + 1))
        return np.split(self.cache.tokens(start, start + total), np.cumsum(sizes)[:-1])

    def describe(self) -> dict[str, Any]:
        return {"haystack": self.cache.split, "cache": self.cache.fingerprint}


Haystack = NoiseHaystack | CorpusHaystack


class Pieces(NamedTuple):
    """A trial in tokens, without the haystack; a depth of None is that of the trial."""

    intro: list[int]
    needles: list[list[int]]
    depths: Sequence[float | None]
    question: list[int]
    answer: list[int]
    distractors: list[list[int]]
    answer_texts: tuple[str, ...]

    @property
    def fixed(self) -> int:
        """Tokens of a window without haystack."""
        return sum(map(len, [self.intro, *self.needles, self.question, self.answer]))

    @property
    def lengths(self) -> TrialLengths:
        longest = max(map(len, [self.answer, *self.distractors]))
        return TrialLengths(self.fixed, len(self.answer), longest)

    def trial(self, context: Sequence[Any]) -> Trial:
        window = np.concatenate([*context, self.question, self.answer]).astype(np.int32)
        distractors = tuple(np.asarray(wrong, np.int32) for wrong in self.distractors)
        return Trial(window, len(self.answer), distractors, self.answer_texts)


@dataclass(frozen=True, eq=False)
class TextTask(Task):
    """A task with windows ``intro, haystack with needles, question, answer``."""

    tokenizer: Any
    haystack: Haystack

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        raise NotImplementedError

    def encode_pieces(
        self,
        needles: Sequence[str],
        depths: Sequence[float | None],
        question: str,
        answer: str,
        distractors: Sequence[str],
        answer_texts: Sequence[str],
        intro: str = "",
    ) -> Pieces:
        """Encodes texts as `Pieces`, with the first ``NUM_DISTRACTORS`` distractors."""
        encode, name = self.tokenizer.encode, self.name
        asked, right = answer_tokens(self.tokenizer, name, question, answer, answer_texts)
        wrong = [
            answer_tokens(self.tokenizer, name, question, text, ())[1]
            for text in distractors[:NUM_DISTRACTORS]
        ]
        in_tokens = [list(encode(needle)) for needle in needles]
        before = list(encode(intro)) if intro else []
        return Pieces(before, in_tokens, depths, asked, right, wrong, tuple(answer_texts))

    def lengths(self, rng: np.random.Generator, split: str) -> TrialLengths:
        return self.draw_pieces(rng, split).lengths

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        return self.place_pieces(self.draw_pieces(rng, split), rng, context, depth)

    def place_pieces(
        self, pieces: Pieces, rng: np.random.Generator, context: int, depth: float
    ) -> Trial:
        """The window with these pieces in a haystack that ``rng`` draws."""
        check_trial_fits(self.name, context, pieces.fixed, depth)
        room = context - pieces.fixed
        depths = [depth if needle_depth is None else needle_depth for needle_depth in pieces.depths]
        order = np.argsort(depths, kind="stable")
        offsets = [round(depths[i] * room) for i in order]
        gaps = self.haystack.gaps(rng, np.diff([0, *offsets, room]).tolist())
        tokens: list[Any] = [pieces.intro, gaps[0]]
        for index, gap in zip(order, gaps[1:], strict=True):
            tokens += [pieces.needles[index], gap]
        return pieces.trial(tokens)

    def describe(self) -> dict[str, Any]:
        # Marks windows as new: older ones had the tokenizer's prefix before every piece.
        prefix = {"prefix": "none"} if getattr(self.tokenizer, "prefix", "") else {}
        return {"tokenizer": self.tokenizer.fingerprint, **prefix, **self.haystack.describe()}


def draw_numbers(rng: np.random.Generator, count: int, split: str) -> list[int]:
    """``count`` different numbers of one split; all of five digits, so that none is easier.

    The usual passkey script draws ``randint(1, 50000)`` instead.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        number = int(rng.integers(10_000, 100_000))
        if split_of(str(number).encode()) == split and number not in numbers:
            numbers.append(number)
    return numbers
