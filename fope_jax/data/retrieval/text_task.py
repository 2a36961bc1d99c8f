"""Trials of text: pieces that stand in a haystack, and a question whose answer ends the window.

All joining is done in tokens, so a window has exactly the tokens that were asked for with any
tokenizer; only question and answer are encoded as one text, see ``answer_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Task, Trial, check_trial_fits, split_of

FILLER = " The sky is blue. The grass is green. The sun is yellow. There and back again."


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
    depths: list[float | None]
    question: list[int]
    answer: list[int]
    distractors: list[list[int]]
    answer_texts: tuple[str, ...]

    @property
    def fixed(self) -> int:
        """Tokens of a window without haystack."""
        needles = sum(map(len, self.needles))
        return len(self.intro) + needles + len(self.question) + len(self.answer)


def answer_tokens(
    tokenizer: Any, name: str, question: str, answer: str, texts: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Question and answer in tokens.

    They are encoded as one text, because that is what a model that writes the answer in its usual
    tokens would produce; the answer's tokens are those after the tokens shared with the question
    alone. With most tokenizers this is ``encode(question) + encode(answer)``; where a token
    straddles the border, it counts as part of the answer. However digits are grouped, the answer
    is the tokens that the tokenizer makes of them.

    Args:
      tokenizer: ``encode`` and ``decode``.
      name: of the task.
      question, answer: texts.
      texts: what must be read in the answer.

    Raises:
      ValueError: the tokenizer cannot write one of ``texts``, so no model could be right.
    """
    alone = list(tokenizer.encode(question))
    joint = list(tokenizer.encode(question + answer))
    shared = 0
    while shared < min(len(alone), len(joint)) and alone[shared] == joint[shared]:
        shared += 1
    written = tokenizer.decode(joint[shared:])
    lost = [text for text in texts if text not in written]
    if lost:
        raise ValueError(
            f"{name}: the tokenizer writes the answer {lost[0]} as {written!r}; it must keep "
            "digits and letters"
        )
    return joint[:shared], joint[shared:]


# ---------------------------------------------------------------------------- haystacks


class Haystack(Protocol):
    """What needles are hidden in."""

    def gaps(self, rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
        """Tokens before, between and after the needles, as many as ``sizes`` say."""
        ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class NoiseHaystack:
    """A text that is repeated, so that a needle stands between whole sentences.

    What is before the first needle loses tokens from its beginning, every later gap from its end.
    Where the last that is left is the space before a word, the text's last token takes its place:
    what follows begins with a space of its own.

    Attributes:
      text: as it is described.
      tokens: of the text.
      spaces: those of them that end in a space.
    """

    text: str
    tokens: tuple[int, ...]
    spaces: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, text: str = FILLER) -> NoiseHaystack:
        tokens = tuple(tokenizer.encode(text))
        ends_in_space = (i for i in set(tokens) if tokenizer.decode([i])[-1:].isspace())
        return cls(text, tokens, frozenset(ends_in_space))

    def gaps(self, rng: np.random.Generator, sizes: Sequence[int]) -> list[np.ndarray]:
        text = np.asarray(self.tokens, np.int32)
        first = np.resize(text, -(-sizes[0] // len(text)) * len(text))
        later = [np.resize(text, size) for size in sizes[1:]]
        for gap in later:
            if len(gap) and int(gap[-1]) in self.spaces:
                gap[-1] = text[-1]
        return [first[len(first) - sizes[0] :], *later]

    def describe(self) -> dict[str, Any]:
        return {"haystack": "noise", "filler": self.text} | self.ends

    @property
    def ends(self) -> dict[str, str]:
        """What is described where it differs from windows that kept the space before a needle."""
        return {"ends": "no space"} if self.spaces else {}


@dataclass(frozen=True, eq=False)
class CorpusHaystack:
    """A stretch of a token cache, anywhere in it; needles cut it where they stand.

    Attributes:
      cache: ``num_tokens``, ``tokens(start, stop)``, ``fingerprint`` and ``split``.
    """

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
        stretch = self.cache.tokens(start, start + total)
        return np.split(stretch, np.cumsum(sizes)[:-1])

    def describe(self) -> dict[str, Any]:
        return {"haystack": self.cache.split, "cache": self.cache.fingerprint}


# ---------------------------------------------------------------------------- tasks


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

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        return self.draw_pieces(rng, split).fixed

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        pieces = self.draw_pieces(rng, split)
        check_trial_fits(self.name, context, pieces.fixed, depth)
        room = context - pieces.fixed
        depths = [depth if own is None else own for own in pieces.depths]
        order = np.argsort(depths, kind="stable")
        places = [round(depths[i] * room) for i in order]
        gaps = self.haystack.gaps(rng, np.diff([0, *places, room]).tolist())
        pieces: list[Any] = [pieces.intro, gaps[0]]
        for index, gap in zip(order, gaps[1:], strict=True):
            pieces += [pieces.needles[index], gap]
        window = np.concatenate([*pieces, pieces.question, pieces.answer]).astype(np.int32)
        distractors = tuple(np.asarray(distractor, np.int32) for distractor in pieces.distractors)
        return Trial(window, len(pieces.answer), distractors, pieces.answer_texts)

    def describe(self) -> dict[str, Any]:
        return {**describe_pieces(self.tokenizer), **self.haystack.describe()}


def describe_pieces(tokenizer: Any) -> dict[str, Any]:
    """Of what tokens pieces are made; with a prefix, windows once had it before every piece."""
    prefix = {"prefix": "none"} if getattr(tokenizer, "prefix", "") else {}
    return {"tokenizer": tokenizer.fingerprint, **prefix}


def draw_number(rng: np.random.Generator, split: str) -> int:
    """A number of five digits of one half.

    The script that made the passkey test common draws ``randint(1, 50000)``; here every number has
    five digits, so that no trial is easier than another.
    """
    while True:
        number = int(rng.integers(10_000, 100_000))
        if split_of(str(number).encode()) == split:
            return number


def draw_numbers(rng: np.random.Generator, count: int, split: str) -> list[int]:
    """``count`` different numbers of one half."""
    numbers: list[int] = []
    while len(numbers) < count:
        number = draw_number(rng, split)
        if number not in numbers:
            numbers.append(number)
    return numbers


def distractor_tokens(
    tokenizer: Any, name: str, question: str, answers: Sequence[str]
) -> list[list[int]]:
    """The first ``NUM_DISTRACTORS`` of ``answers`` in tokens, each as after the question."""
    return [answer_tokens(tokenizer, name, question, a, ())[1] for a in answers[:NUM_DISTRACTORS]]
