"""Texts in, scores and texts out: a model with its tokenizer, in rows of many texts at once."""

from __future__ import annotations

import logging
import math
import os.path
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fope_jax.data.bos import Bos, encode_prompt
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.evaluate.generation import by_rows, pad_left, padded_length
from fope_jax.evaluate.progress import Progress, no_progress
from fope_jax.evaluate.scoring import model_scorer
from fope_jax.model.decode import greedy_decode, prefill
from fope_jax.model.masks import TokenIndex
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

log = logging.getLogger(__name__)

SHOWN = 60  # characters of a text in a message

# (tokens, segments, targets), [B, T] each and padded left -> nats and hits [B, T].
RowScorer = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any]]
# (tokens [B, T], segments [B, T], count) -> greedy tokens [B, count], -1 where not finite. The
# first is none of the ids ``not_first``, a tuple.
Writer = Callable[..., Any]
Row = tuple[list[int], list[int]]  # context tokens, and the tokens scored after them


class RowPrograms(NamedTuple):
    """What ``TextModel`` calls; each is jitted once for each shape."""

    score: RowScorer
    write: Writer


def row_programs(model: Transformer, mesh: Mesh | None = None) -> RowPrograms:
    """The scorer and greedy decoder of a model, whose arrays are sharded over ``mesh``, if given.

    Rows are split over its "data" and "fsdp" axes.
    """
    scorer = model_scorer(model, mesh)
    graphdef, params, constants = split(model)

    def score(tokens: np.ndarray, segments: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
        positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
        return scorer(tokens, targets, TokenIndex(positions, segments))

    def write(
        params: Any,
        constants: Any,
        tokens: Array,
        segments: Array,
        count: int,
        not_first: tuple[int, ...] = (),
    ) -> Array:
        model = merge(graphdef, params, constants)
        return greedy_decode(model, *prefill(model, tokens, segments, count), count, not_first)

    static = ("count", "not_first")
    jitted = by_rows(write, mesh, static) if mesh else jax.jit(write, static_argnames=static)
    return RowPrograms(score, partial(jitted, params, constants))


def warn_of_cuts(cut: int, count: int, length: int) -> None:
    """Warns that ``cut`` of ``count`` contexts were longer than ``length`` tokens."""
    log.warning(
        "%d of %d contexts are longer than max_length = %d and lose their beginning",
        cut,
        count,
        length,
    )


@dataclass(frozen=True)
class TextModel:
    """Log-likelihoods of texts, and continuations of prompts.

    A continuation starts at the first joint token that the context alone does not have: ``Ans`` and
    ``wer`` may share the token ``Answer``. ``HFLM`` cuts at the context's number of tokens instead.

    Attributes:
      score, write: see ``row_programs``.
      max_length: most tokens read at once, None for no limit. Longer contexts lose their beginning,
        BOS included, with a warning; longer documents are read in windows.
      batch_tokens: most tokens in one forward pass; one row is always allowed.
      bos: token before a text without a context, not scored; None takes the end-of-document token.
      add_bos: whether contexts begin with ``bos`` too.
      report_cuts: called where ``loglikelihood`` cuts contexts, see ``warn_of_cuts``.
    """

    score: RowScorer
    write: Writer
    tokenizer: Tokenizer
    max_length: int | None
    batch_tokens: int = 16_384
    bos: Bos | None = None
    add_bos: bool = False
    report_cuts: Callable[[int, int, int], Any] = warn_of_cuts

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress = no_progress
    ) -> list[tuple[float, bool]]:
        """``log p(continuation | context)``, and whether the continuation is greedy.

        Raises:
          ValueError: names the request whose continuation is empty, has no tokens or more than
            ``max_length``, or whose score is not finite.
        """
        names = [
            f"request {number}, context {_abbreviate(context)}, continuation {_abbreviate(text)}"
            for number, (context, text) in enumerate(pairs)
        ]
        rows = [self.encode_pair(*pair, name) for pair, name in zip(pairs, names, strict=True)]
        if self.max_length is not None:
            whole, rows = (
                rows,
                [
                    (context[max(0, len(context) + len(target) - 1 - self.max_length) :], target)
                    for context, target in rows  # the last target is not an input
                ],
            )
            if cut := sum(a != b for a, b in zip(whole, rows, strict=True)):
                self.report_cuts(cut, len(rows), self.max_length)
        results = self.score_rows(rows, progress, "continuations")
        for (total, _), name in zip(results, names, strict=True):
            _check_finite(total, name)
        return results

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress = no_progress
    ) -> list[float]:
        """``log p(text)``: each token once, with the context that fits into its window.

        Raises:
          ValueError: names the request whose score is not finite.
        """
        windows = [
            list(rolling_windows(self._encode_text(text), self._first_token, self.max_length))
            for text in texts
        ]
        rows = [row for rows in windows for row in rows]
        scores = iter(self.score_rows(rows, progress, "documents"))
        results = [sum(total for total, _ in islice(scores, len(rows))) for rows in windows]
        for number, (text, total) in enumerate(zip(texts, results, strict=True)):
            _check_finite(total, f"request {number}, text {_abbreviate(text)}")
        return results

    def generate(self, context: str, until: Sequence[str], count: int) -> str:
        """``generate_each`` of one context."""
        return self.generate_each([context], until, count)[0]

    def generate_each(
        self,
        contexts: Sequence[str],
        until: Sequence[str],
        count: int,
        progress: Progress = no_progress,
    ) -> list[str]:
        """At most ``count`` greedy tokens as text, up to an end of document or text of ``until``.

        Raises:
          ValueError: ``max_length`` leaves no room for a prompt, or logits are not finite.
        """
        longest = None if self.max_length is None else self.max_length - count
        if longest is not None and longest < 1:
            raise ValueError(
                f"{count} tokens to write leave no room for a prompt in max_length = "
                f"{self.max_length}"
            )
        prompts = [self.prompt_tokens(context) for context in contexts]
        longest = max(map(len, prompts), default=1) if longest is None else longest
        if cut := [len(prompt) for prompt in prompts if len(prompt) > longest]:
            log.warning(
                "%d of %d prompts, of up to %d tokens, lose their beginning: with %d to write, "
                "max_length is %d",
                len(cut),
                len(prompts),
                max(cut),
                count,
                self.max_length,
            )
            prompts = [prompt[-longest:] for prompt in prompts]
        names = [f"the prompt {_abbreviate(context)}" for context in contexts]
        texts = []
        for tokens in self.write_after(prompts, count, names, progress=progress, desc="texts"):
            text = self.tokenizer.decode(tokens)
            for stop in filter(None, until):
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def write_after(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        names: Sequence[str],
        *,
        stops: Collection[int] = (),
        not_first: tuple[int, ...] = (),
        progress: Progress = no_progress,
        desc: str = "",
    ) -> list[list[int]]:
        """The greedy tokens after each prompt: ``count``, or those before an end of document.

        Args:
          prompts: tokens, at most ``max_length - count`` each.
          names: of the prompts, for messages.
          stops: tokens that end the writing too.
          not_first: tokens that are not written first.

        Raises:
          ValueError: logits are not finite; names the prompt.
        """
        longest = None if self.max_length is None else self.max_length - count
        settings: dict[str, Any] = {"not_first": not_first} if not_first else {}
        ends = {self.tokenizer.eos_id, *stops}
        results: list[list[int]] = [[]] * len(prompts)
        batches = self._batches([len(prompt) for prompt in prompts], longest, room=count)
        for index in progress(range(len(batches)), desc=desc):
            size, numbers, filled = batches[index]
            rows = pad_left([prompts[i] for i in filled], size, self.tokenizer.pad_id)
            written = np.asarray(self.write(*rows, count=count, **settings))
            for number, row in zip(numbers, written.tolist(), strict=False):
                length = next((i for i, token in enumerate(row) if token in ends), len(row))
                if min(row[: length + 1]) < 0:
                    raise ValueError(
                        f"the logits after {names[number]} are not finite (NaN or infinity): no "
                        "token is the most likely one"
                    )
                results[number] = row[:length]
        return results

    def _batches(
        self, lengths: Sequence[int], longest: int | None, room: int = 0
    ) -> list[tuple[int, list[int], list[int]]]:
        """``(padded length, rows, the same filled with copies)`` of batches of few shapes.

        A batch has at most ``batch_tokens`` tokens, with ``room`` more a row, or is one row.
        """
        groups: dict[int, list[int]] = {}  # padded length -> rows
        for number, length in enumerate(lengths):
            groups.setdefault(padded_length(length, longest), []).append(number)
        batches = []
        for size, members in sorted(groups.items()):
            count = max(1, self.batch_tokens // (size + room))
            for start in range(0, len(members), count):
                numbers = members[start : start + count]
                # Copies fill it to a power of two, so that few shapes are compiled.
                filled = np.resize(numbers, padded_length(len(numbers), count, least=1)).tolist()
                batches.append((size, numbers, filled))
        return batches

    @property
    def _first_token(self) -> int:
        return self.tokenizer.eos_id if self.bos is None else self.bos.id

    def _encode_text(self, text: str) -> list[int]:
        return self.encode_context(text)[1 if self.bos and self.add_bos else 0 :]

    def prompt_tokens(self, text: str) -> list[int]:
        """The tokens to continue, at least one."""
        return self.encode_context(text) or [self._first_token]

    def encode_context(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text, self.bos if self.add_bos else None)

    def encode_pair(self, context: str, continuation: str, where: str) -> Row:
        """Splits the joint tokens where they first differ from the context's."""
        if not continuation:
            raise ValueError(f"{where}: the continuation is empty; there is nothing to score")
        joint = self.encode_context(context + continuation)
        shared = len(os.path.commonprefix([self.encode_context(context.rstrip()), joint]))
        if shared == len(joint):
            raise ValueError(
                f"{where}: the continuation has no tokens of its own, because the tokenizer gives "
                "the context the same tokens with it and without"
            )
        if self.max_length is not None and len(joint) - shared > self.max_length:
            raise ValueError(
                f"{where}: a continuation of {len(joint) - shared} tokens is longer than "
                f"max_length = {self.max_length}"
            )
        return joint[:shared] or [self._first_token], joint[shared:]

    def score_rows(
        self, rows: Sequence[Row], progress: Progress = no_progress, desc: str = ""
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each row's targets, and whether all of them are greedy."""
        results = [(0.0, True)] * len(rows)
        lengths = [len(context) + len(target) - 1 for context, target in rows]
        batches = self._batches(lengths, self.max_length)
        for index in progress(range(len(batches)), desc=desc):
            size, numbers, filled = batches[index]
            joined = [[*rows[i][0], *rows[i][1]] for i in filled]
            pad = self.tokenizer.pad_id
            tokens, segments = pad_left([row[:-1] for row in joined], size, pad)
            targets, _ = pad_left([row[1:] for row in joined], size, pad)
            nats, hits = (np.asarray(x) for x in self.score(tokens, segments, targets))
            for row, number in enumerate(numbers):
                scored = np.s_[size - len(rows[number][1]) :]
                total = float(nats[row][scored].sum(dtype=np.float64))
                results[number] = (-total, bool(hits[row][scored].all()))
        return results


def _abbreviate(text: str) -> str:
    half = SHOWN // 2
    return repr(text if len(text) <= SHOWN else f"{text[:half]} ... {text[-half:]}")


def _check_finite(total: float, where: str) -> None:
    """Raises ValueError for NaN or infinity, which the harness would count as a correct answer."""
    if not math.isfinite(total):
        raise ValueError(
            f"{where}: the log-likelihood is {total}; the model's logits are not finite there"
        )


def rolling_windows(tokens: Sequence[int], prefix: int, length: int | None) -> Iterator[Row]:
    """Windows that score every token once, each after at least one token.

    >>> list(rolling_windows([5, 6, 7, 8, 9], prefix=1, length=2))
    [([1], [5, 6]), ([6], [7, 8]), ([7, 8], [9])]
    """
    length = length or len(tokens)
    text = [prefix, *tokens]
    for start in range(0, len(tokens), length or 1):
        stop = min(start + length, len(tokens))
        yield text[max(0, stop - length) : start + 1], text[start + 1 : stop + 1]
