"""Recall and copying over token ids, for models too small for language, with any tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fope_jax.data.retrieval.base import (
    NUM_DISTRACTORS,
    Task,
    Trial,
    TrialLengths,
    check_trial_fits,
    split_of,
)
from fope_jax.data.tokenizers import Tokenizer


def choose_symbols(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """``[count]`` int32 ids of text tokens, evenly spaced in V; ValueError if V is too small."""
    ordinary = np.flatnonzero(tokenizer.token_bytes)
    if len(ordinary) < count:
        raise ValueError(
            f"recall and copy take {count} tokens that stand for text; the tokenizer has "
            f"{len(ordinary)}"
        )
    return ordinary[np.arange(count) * len(ordinary) // count].astype(np.int32)


@dataclass(frozen=True, eq=False)
class Recall(Task):
    """Key-value recall: ``k v k v ... k -> v``, pairs of one dictionary in random order.

    In a trial the key asked for occurs once before, at the depth; the other keys repeat. In
    training all repeat, and every value of a repeated key is an answer. The dictionary decides the
    split. Distractors are other values of the window; in one that has too few, also other values of
    the dictionary (at short contexts older rows have more of these, so that their ranks are not
    comparable). ``keys`` and ``values``, ``[M]`` each, are disjoint ids; a dictionary has
    ``entries`` keys, more than ``NUM_DISTRACTORS``.

    Reference: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language
    Models", Section 3, for recall of many keys in one window.
    """

    name: ClassVar[str] = "recall"
    symbols: ClassVar[int] = 128

    keys: np.ndarray
    values: np.ndarray
    entries: int = 16

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> Recall:
        """Half of the symbols are keys, half values."""
        keys, values = choose_symbols(tokenizer, cls.symbols).reshape(-1, 2).T
        return cls(keys, values)

    def lengths(self, rng: np.random.Generator, split: str) -> TrialLengths:
        return TrialLengths(window=4, answer=1, longest=1)

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        check_trial_fits(self.name, context, 4, depth)
        keys, values = self._dictionary(rng, split)
        chosen = rng.choice(np.arange(1, self.entries), NUM_DISTRACTORS, replace=False)
        pairs = (context - 2) // 2
        order = rng.integers(1, self.entries, pairs)
        order[round(depth * (pairs - 1))] = 0
        stream = np.stack([keys[order], values[order]], axis=1).ravel()
        # An odd context begins with the second token of a pair.
        extra = rng.integers(1, self.entries, context % 2)
        # Drawn last, so that they change no token of the window.
        in_window = np.union1d(order, extra)
        more = rng.permutation(np.setdiff1d(in_window, [0, *chosen]))
        is_in_window = np.isin(chosen, in_window)
        wrong = [*chosen[is_in_window], *more, *chosen[~is_in_window]][:NUM_DISTRACTORS]
        distractors = tuple(values[i : i + 1] for i in wrong)
        return Trial(np.concatenate([values[extra], stream, keys[:1], values[:1]]), 1, distractors)

    def draw_training_window(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self._dictionary(rng, "training")
        order = rng.integers(0, self.entries, length // 2 + 1)
        _, first = np.unique(order, return_index=True)
        again = np.ones(len(order), bool)
        again[first] = False
        stream = np.stack([keys[order], values[order]], axis=1).ravel()
        answers = np.stack([np.zeros_like(again), again], axis=1).ravel()
        return stream[:length], answers[:length]

    def _dictionary(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values ``[entries]``, int32; the first key is the one asked for."""
        while True:
            keys = rng.choice(self.keys, self.entries, replace=False)
            values = rng.choice(self.values, self.entries, replace=False)
            order = np.argsort(keys)  # order does not distinguish dictionaries
            if split_of(np.stack([keys, values])[:, order].astype("<i4").tobytes()) == split:
                return keys, values

    def describe(self) -> dict[str, Any]:
        return {"entries": self.entries, "keys": len(self.keys), "values": len(self.values)}


@dataclass(frozen=True, eq=False)
class Recall64Keys(Recall):
    """`Recall` with 64 keys in a window, not 16: each repeats a quarter as often at one length.

    So a window of 4L has as many of each other key as one of L has in `Recall`, and what length
    does to a model can be told from what repetition does.
    """

    name: ClassVar[str] = "recall_64_keys"

    entries: int = 64


@dataclass(frozen=True, eq=False)
class Copy(Task):
    """Copying: ``source mark source mark``; the model writes the second one.

    A trial asks for ``span`` tokens of the copy after a share ``depth`` of the source. The window
    is full at every depth. Training sources have random lengths up to the longest of a trial, so no
    fixed distance leads to the answer. The first ``span`` tokens decide the split. Distractors are
    shuffled source tokens. ``symbols [M]`` are the ids of a source; ``mark`` follows it.

    Reference: Jelassi et al. 2024, "Repeat After Me: Transformers are Better than State Space
    Models at Copying", Section 4.
    """

    name: ClassVar[str] = "copy"

    symbols: np.ndarray
    mark: int
    span: int = 8

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> Copy:
        """The symbols of `Recall`, with EOS as the mark."""
        return cls(choose_symbols(tokenizer, Recall.symbols), tokenizer.eos_id)

    def lengths(self, rng: np.random.Generator, split: str) -> TrialLengths:
        return TrialLengths(window=2 * self.span + 1, answer=self.span, longest=self.span)

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        check_trial_fits(self.name, context, 2 * self.span + 1, depth)
        room = context - 1 - self.span  # source, and its copy before the answer
        size = round((room + depth * self.span) / (1 + depth))
        size = min(max(size, context // 2), room)
        source = self._source(rng, size, split)
        done = room - size
        answer = source[done : done + self.span]
        distractors = []
        while len(distractors) < NUM_DISTRACTORS:
            other = rng.permutation(source)[: self.span]
            if (other != answer).any():
                distractors.append(other)
        tokens = np.concatenate([source, [self.mark], source[: done + self.span]])
        return Trial(tokens.astype(np.int32), self.span, tuple(distractors))

    def draw_training_window(
        self, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        size = int(rng.integers(self.span, max(self.span, length - 1 - self.span) + 1))
        period = np.append(self._source(rng, size, "training"), self.mark)
        tokens = np.resize(period, length).astype(np.int32)
        return tokens, np.arange(length) > size

    def _source(self, rng: np.random.Generator, size: int, split: str) -> np.ndarray:
        while True:
            source = rng.choice(self.symbols, size)
            if split_of(source[: self.span].astype("<i4").tobytes()) == split:
                return source

    def describe(self) -> dict[str, Any]:
        return {"symbols": len(self.symbols), "span": self.span}
