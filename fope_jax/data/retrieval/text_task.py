"""Trials of text: needles in a haystack, and a question whose answer ends the window.

All joining is done in tokens, so a window has exactly the tokens that were asked for with any
tokenizer; only question and answer are encoded as one text, see ``answer_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Task, Trial, check_trial_fits, split_of

FILLER = " The sky is blue. The grass is green. The sun is yellow. There and back again."


def answer_tokens(
    tokenizer: Any, name: str, question: str, answer: str, texts: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Question and answer in tokens.

    They are encoded as one text, which is what a model that writes the answer in its usual tokens
    would produce. The answer's tokens are those after the tokens shared with the question alone. A
    token that straddles the border is part of the answer.

    Args:
      tokenizer: ``encode`` and ``decode``.
      name: of the task.
      question, answer: texts.
      texts: what must be read in the answer.

    Raises:
      ValueError: the tokenizer cannot write one of ``texts``, so no model could be right.
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
    """A text that is repeated, so that a needle stands between whole sentences.

    What is before the first needle loses tokens from its beginning, every later gap from its end.
    Where the last that is left is the space before a word, the text's last token takes its place:
    what follows begins with a space of its own.

    Attributes:
      text, tokens: what is repeated.
      space_tokens: those of the tokens that end in a space.
    """

    text: str
    tokens: tuple[int, ...]
    space_tokens: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, text: str = FILLER) -> NoiseHaystack:
        """The haystack of ``text`` in a tokenizer's tokens."""
        tokens = tuple(tokenizer.encode(text))
        ends_in_space = (i for i in set(tokens) if tokenizer.decode([i])[-1:].isspace())
        return cls(text, tokens, frozenset(ends_in_space))

    def gaps(self, rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
        """Tokens before, between and after the needles, as many as ``sizes`` say."""
        text = np.asarray(self.tokens, np.int32)
        first = np.resize(text, -(-sizes[0] // len(text)) * len(text))
        later = [np.resize(text, size) for size in sizes[1:]]
        for gap in later:
            if len(gap) and int(gap[-1]) in self.space_tokens:
                gap[-1] = text[-1]
        return [first[len(first) - sizes[0] :], *later]

    @property
    def ending(self) -> dict[str, str]:
        """Tells these windows from older ones, which kept the space before a needle."""
        return {"ends": "no space"} if self.space_tokens else {}

    def describe(self) -> dict[str, Any]:
        """What the gaps depend on, as JSON values."""
        return {"haystack": "noise", "filler": self.text, **self.ending}


@dataclass(frozen=True, eq=False)
class CorpusHaystack:
    """A stretch of a token cache, anywhere in it; needles cut it where they stand.

    Attributes:
      cache: ``num_tokens``, ``tokens(start, stop)``, ``fingerprint`` and ``split``.
    """

    cache: Any

    def gaps(self, rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
        """Tokens before, between and after the needles, as many as ``sizes`` say."""
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
        """What the gaps depend on, as JSON values."""
        return {"haystack": self.cache.split, "cache": self.cache.fingerprint}


Haystack = NoiseHaystack | CorpusHaystack


class Pieces(NamedTuple):
    """A trial in tokens, without the haystack.

    Attributes:
      intro: at the beginning of the window.
      needles: what is hidden.
      depths: where each stands, 0 to 1; None at the depth of the trial.
      question: before the answer.
      answer: what the model must write.
      distractors: wrong answers.
      answer_texts: what the answer is made of.
    """

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

    def trial(self, context: Sequence[Any]) -> Trial:
        """The trial with these tokens before the question."""
        window = np.concatenate([*context, self.question, self.answer]).astype(np.int32)
        distractors = tuple(np.asarray(wrong, np.int32) for wrong in self.distractors)
        return Trial(window, len(self.answer), distractors, self.answer_texts)


@dataclass(frozen=True, eq=False)
class TextTask(Task):
    """A task whose windows are ``intro, haystack with needles, question, answer``.

    Attributes:
      tokenizer: ``encode``, ``decode`` and ``fingerprint``.
      haystack: what stands between the pieces.
    """

    tokenizer: Any
    haystack: Haystack

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        """Draws the pieces of a trial."""
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
        """Pieces in tokens of pieces in text; of the distractors the first ``NUM_DISTRACTORS``."""
        encode, name = self.tokenizer.encode, self.name
        asked, right = answer_tokens(self.tokenizer, name, question, answer, answer_texts)
        wrong = [
            answer_tokens(self.tokenizer, name, question, text, ())[1]
            for text in distractors[:NUM_DISTRACTORS]
        ]
        in_tokens = [list(encode(needle)) for needle in needles]
        before = list(encode(intro)) if intro else []
        return Pieces(before, in_tokens, depths, asked, right, wrong, tuple(answer_texts))

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        return self.draw_pieces(rng, split).fixed

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        pieces = self.draw_pieces(rng, split)
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
        # With a prefix of the tokenizer, windows once had it before every piece.
        prefix = {"prefix": "none"} if getattr(self.tokenizer, "prefix", "") else {}
        return {"tokenizer": self.tokenizer.fingerprint, **prefix, **self.haystack.describe()}


def draw_numbers(rng: np.random.Generator, count: int, split: str) -> list[int]:
    """``count`` different numbers of one split.

    The script that made the passkey test common draws ``randint(1, 50000)``; here every number has
    five digits, so that no trial is easier than another.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        number = int(rng.integers(10_000, 100_000))
        if split_of(str(number).encode()) == split and number not in numbers:
            numbers.append(number)
    return numbers
