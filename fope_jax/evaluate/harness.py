"""A run as a model of EleutherAI's lm-evaluation-harness.

    import lm_eval
    from fope_jax.evaluate.harness import harness_model
    lm_eval.simple_evaluate(model=harness_model("runs/fope"), tasks=["lambada_openai"])

What the harness asks is answered by ``TextModel``, which knows nothing of the harness. A text
without a context is scored after one end-of-document token, since the tokenizers here have no token
for a beginning. With ``packing = "documents"`` no model has seen text after that token in training,
so the first tokens of such texts cost more than they would elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.data.cache import open_cache
from fope_jax.data.tokenizer import Tokenizer
from fope_jax.evaluate.run import load_run
from fope_jax.extras import require
from fope_jax.model.decode import greedy, prefill
from fope_jax.model.losses import token_nats
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

log = logging.getLogger(__name__)

GENERATED = 256  # tokens, where a task does not say how many; the harness's own default

# Rows of tokens with each row's text at its end: tokens, segments and targets [B, T] -> nats and
# whether each target is the most likely token, [B, T].
RowScorer = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any]]
# Tokens and segments [B, T] of prompts that end together, and a number of tokens -> [B, count].
Writer = Callable[[np.ndarray, np.ndarray, int], Any]


def row_programs(model: Transformer) -> tuple[RowScorer, Writer]:
    """The two programs that a model answers the harness with, jitted once a shape."""
    graphdef, params, constants = split(model)

    @jax.jit
    def score(params: Any, constants: Any, tokens: Array, segments: Array, targets: Array):
        model = merge(graphdef, params, constants)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        hidden = model.hidden(tokens, positions, segments)
        # One position's logits at a time are small beside the hidden states of the rows.
        return token_nats(hidden, model.unembedding_matrix(), targets, time_chunk=64)

    def write(params: Any, constants: Any, tokens: Array, segments: Array, count: int) -> Array:
        model = merge(graphdef, params, constants)
        return greedy(model, *prefill(model, tokens, segments, count), count)

    jitted = jax.jit(write, static_argnums=4)
    return (
        lambda *rows: score(params, constants, *rows),
        lambda tokens, segments, count: jitted(params, constants, tokens, segments, count),
    )


class TextModel:
    """Log-likelihoods of texts, and texts gone on with.

    Args:
      score, write: see ``row_programs``.
      tokenizer: of the model.
      max_length: tokens that the model reads at once; longer contexts lose their beginning, which
        is told, and longer documents are read in windows. None reads everything whole.
      batch_tokens: upper bound of tokens in one forward pass; one row is always allowed.
    """

    def __init__(
        self, score: RowScorer, write: Writer, tokenizer: Tokenizer, *,
        max_length: int | None, batch_tokens: int = 16_384,
    ):  # fmt: skip
        self._score, self._write, self._tokenizer = score, write, tokenizer
        self.max_length, self._batch_tokens = max_length, batch_tokens

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """``log p(continuation | context)``, and whether greedy decoding writes it."""
        rows = [self._encode(*pair) for pair in pairs]
        return self._sums(self._fitting(rows))

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """``log p(text)``: every token once, after as many as fit into a window before it."""
        results = []
        for text in texts:
            tokens = list(self._tokenizer.encode(text))
            windows = list(rolling_windows(tokens, self._tokenizer.eos_id, self.max_length))
            results.append(sum(total for total, _ in self._sums(windows)))
        return results

    def generate(self, context: str, until: Sequence[str], count: int) -> str:
        """What greedy decoding writes after ``context``.

        Args:
          context: the prompt.
          until: texts that end it; they and what follows is left out.
          count: tokens at most. An end of document ends it as well.
        """
        tokens = list(self._tokenizer.encode(context)) or [self._tokenizer.eos_id]
        if self.max_length is not None and len(tokens) + count > self.max_length:
            if count >= self.max_length:
                raise ValueError(
                    f"{count} tokens to write leave no room for a prompt in max_length = "
                    f"{self.max_length}"
                )
            log.warning(
                "a prompt of %d tokens loses its beginning: with %d to write, max_length is %d",
                len(tokens), count, self.max_length,
            )  # fmt: skip
            tokens = tokens[count - self.max_length :]
        most = None if self.max_length is None else self.max_length - count
        size = _room(len(tokens), most)
        batch, segments = _at_the_end([tokens], size, self._tokenizer.pad_id)
        written = np.asarray(self._write(batch, segments, count))[0].tolist()
        if self._tokenizer.eos_id in written:
            written = written[: written.index(self._tokenizer.eos_id)]
        text = self._tokenizer.decode(written)
        ends = [text.index(stop) for stop in until if stop and stop in text]
        return text[: min(ends, default=len(text))]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both in the tokens of their joint text; spaces between them go to the continuation."""
        bare = context.rstrip(" ")
        continuation = context[len(bare) :] + continuation
        if not bare:
            return [self._tokenizer.eos_id], list(self._tokenizer.encode(continuation))
        before = len(self._tokenizer.encode(bare))
        tokens = list(self._tokenizer.encode(bare + continuation))
        return tokens[:before], tokens[before:]

    def _fitting(
        self, rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], list[int]]]:
        """Rows whose contexts are cut from their beginning to ``max_length`` inputs."""
        if self.max_length is None:
            return list(rows)
        longest = max((len(target) for _, target in rows), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation of {longest} tokens is longer than max_length = {self.max_length}"
            )
        # The last target is no input.
        room = [self.max_length + 1 - len(target) for _, target in rows]
        cut = sum(len(context) > own for (context, _), own in zip(rows, room, strict=True))
        if cut:
            log.warning(
                "%d of %d contexts are longer than max_length = %d and lose their beginning",
                cut, len(rows), self.max_length,
            )  # fmt: skip
        return [
            (context[max(0, len(context) - own) :], target)
            for (context, target), own in zip(rows, room, strict=True)
        ]

    def _sums(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each row's targets after its context, and whether all are greedy."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        sizes = [_room(len(context) + len(target) - 1, self.max_length) for context, target in rows]
        for size in sorted(set(sizes)):
            own = [i for i, other in enumerate(sizes) if other == size]
            count = max(1, self._batch_tokens // size)
            for start in range(0, len(own), count):
                numbers = own[start : start + count]
                filled = np.resize(numbers, _room(len(numbers), count, least=1))
                joined = [[*rows[i][0], *rows[i][1]] for i in filled]
                pad = self._tokenizer.pad_id
                tokens, segments = _at_the_end([row[:-1] for row in joined], size, pad)
                targets, _ = _at_the_end([row[1:] for row in joined], size, pad)
                nats, hits = (np.asarray(x) for x in self._score(tokens, segments, targets))
                for row, number in enumerate(numbers):
                    scored = np.s_[size - len(rows[number][1]) :]
                    total = float(nats[row][scored].sum(dtype=np.float64))
                    results[number] = (-total, bool(hits[row][scored].all()))
        return results


def _room(length: int, most: int | None, least: int = 16) -> int:
    """The next power of two, so that rows of all lengths need few programs; at most ``most``.

    >>> _room(17, None), _room(17, 20), _room(1, None)
    (32, 20, 16)
    """
    room = max(least, 1 << max(0, length - 1).bit_length())
    return room if most is None else min(room, most)


def _at_the_end(
    rows: Sequence[Sequence[int]], size: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments ``[B, size]``, each row filled up from its beginning."""
    tokens = np.full((len(rows), size), pad, np.int32)
    segments = np.zeros((len(rows), size), np.int32)
    for i, row in enumerate(rows):
        tokens[i, size - len(row) :], segments[i, size - len(row) :] = row, 1
    return tokens, segments


def rolling_windows(
    tokens: Sequence[int], prefix: int, length: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Windows that score every token once: a context, and the tokens scored after it.

    All but the last are full of tokens to be scored, with one before them; the last is full too,
    with as much context as that leaves.

    >>> list(rolling_windows([5, 6, 7, 8, 9], prefix=1, length=2))
    [([1], [5, 6]), ([6], [7, 8]), ([7, 8], [9])]
    """
    length = length or len(tokens)
    text = [prefix, *tokens]
    for start in range(0, len(tokens), length or 1):
        stop = min(start + length, len(tokens))
        yield text[max(0, stop - length) : start + 1], text[start + 1 : stop + 1]


# ---------------------------------------------------------------------------- the harness


def load_text_model(
    workdir: str | Path,
    step: int | None = None,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
) -> TextModel:
    """The model of a run, with the tokenizer of its token cache.

    Args:
      workdir: a run.
      step: which checkpoint; None takes the newest valid one.
      max_length: see ``TextModel``; None takes what the position embedding is defined for.
      batch_tokens: see ``TextModel``; None takes that of the run's ``evaluate`` section.

    Raises:
      ValueError: ``max_length`` is beyond what the position embedding is defined for.
    """
    loaded = load_run(workdir, step)
    experiment = loaded.experiment
    limit = experiment.position.max_length()
    if limit is not None and max_length is not None and max_length > limit:
        raise ValueError(
            f"max_length = {max_length}: {type(experiment.position).__name__} is defined for at "
            f"most {limit}"
        )
    return TextModel(
        *row_programs(loaded.model),
        open_cache(experiment.data, "train").tokenizer,
        max_length=max_length or limit,
        batch_tokens=batch_tokens or experiment.evaluate.batch_tokens,
    )


def harness_model(workdir: str | Path, step: int | None = None, **settings: Any) -> Any:
    """An ``lm_eval.api.model.LM`` of a run; arguments are those of ``load_text_model``.

    Raises:
      ImportError: the harness is not installed; the message holds the pip line.
    """
    base = require("lm_eval.api.model", "harness").LM
    return as_harness_model(base, load_text_model(workdir, step, **settings))


def as_harness_model(base: Any, model: TextModel) -> Any:
    """``model`` behind the methods of ``base``, the harness's LM."""

    class RunLM(base):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return model.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return [_generate(model, *request.args) for request in requests]

    return RunLM()


def _generate(model: TextModel, context: str, settings: dict[str, Any]) -> str:
    if settings.get("do_sample") or settings.get("temperature"):
        raise ValueError(
            f"generate_until asks for sampling ({settings}); only greedy decoding is done: set "
            "do_sample to false and temperature to 0 in the task"
        )
    until = settings.get("until") or []
    count = settings.get("max_gen_toks") or GENERATED
    return model.generate(context, [until] if isinstance(until, str) else until, count)
