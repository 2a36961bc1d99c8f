"""Recall and copying over token ids: for models too small for language, and for any tokenizer.

The symbols are ordinary tokens, evenly spaced in the vocabulary; what they spell means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fope_jax.data.retrieval.base import NUM_DISTRACTORS, Task, Trial, check_trial_fits, split_of
from fope_jax.data.tokenizers import Tokenizer


def choose_symbols(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """``[count]`` int32 ids of tokens that stand for text, evenly spaced; ValueError without."""
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

    A window has a dictionary of ``entries`` keys and as many different values. In a trial the key
    that is asked for at the end stands once before, at the depth; all others come again and again,
    so that a window of any length takes no more symbols. In training all keys come again and again,
    and every value whose key was there before is an answer. A dictionary belongs to one
    split. Distractors are the values of other keys of the window.

    Attributes:
      keys, values: ids, ``[M]`` each, without a common one.
      entries: keys of a window, more than ``NUM_DISTRACTORS``.

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
        """With half of the symbols as keys, half as values."""
        keys, values = choose_symbols(tokenizer, cls.symbols).reshape(-1, 2).T
        return cls(keys, values)

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        return 4

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        check_trial_fits(self.name, context, 4, depth)
        keys, values = self._dictionary(rng, split)
        chosen = rng.choice(np.arange(1, self.entries), NUM_DISTRACTORS, replace=False)
        distractors = tuple(values[i : i + 1] for i in chosen)
        pairs = (context - 2) // 2
        order = rng.integers(1, self.entries, pairs)
        order[round(depth * (pairs - 1))] = 0
        stream = np.stack([keys[order], values[order]], axis=1).ravel()
        # Of an odd context the first token is the end of a pair that began before it.
        before = values[rng.integers(1, self.entries, context % 2)]
        return Trial(np.concatenate([before, stream, keys[:1], values[:1]]), 1, distractors)

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
            order = np.argsort(keys)  # a dictionary is the same in any order
            if split_of(np.stack([keys, values])[:, order].astype("<i4").tobytes()) == split:
                return keys, values

    def describe(self) -> dict[str, Any]:
        return {"entries": self.entries, "keys": len(self.keys), "values": len(self.values)}


@dataclass(frozen=True, eq=False)
class Copy(Task):
    """Copying: ``source mark source mark``, the second time written by the model.

    A trial asks for ``span`` tokens of the copy; the depth is the share of the source copied before
    them. A window is as full at every depth: source, mark, and the copy up to the answer's end.
    Sources of training have random lengths, as far as a trial's in a window of the same length, so
    that no fixed distance leads to the answer and the first tokens of the longest source are asked
    for as well. A source belongs to one split by its first ``span`` tokens. Distractors are as many
    tokens of the source in random order.

    Attributes:
      symbols: ids of the source, ``[M]``.
      mark: id of the token after a source.
      span: tokens of the answer.

    Reference: Jelassi et al. 2024, "Repeat After Me: Transformers are Better than State Space
    Models at Copying", Section 4.
    """

    name: ClassVar[str] = "copy"

    symbols: np.ndarray
    mark: int
    span: int = 8

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> Copy:
        """With the symbols of ``Recall``, and the end of a document as the mark."""
        return cls(choose_symbols(tokenizer, Recall.symbols), tokenizer.eos_id)

    def min_length(self, rng: np.random.Generator, split: str) -> int:
        return 2 * self.span + 1

    def draw_trial(self, rng: np.random.Generator, context: int, depth: float, split: str) -> Trial:
        check_trial_fits(self.name, context, 2 * self.span + 1, depth)
        room = context - 1 - self.span  # source, and what is copied of it before the answer
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
