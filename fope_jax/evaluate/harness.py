"""A run as a model of EleutherAI's lm-evaluation-harness.

    import lm_eval
    from fope_jax.evaluate.harness import harness_model
    lm_eval.simple_evaluate(model=harness_model("runs/fope"), tasks=["lambada_openai"])

What the harness asks is answered by ``TextModel``, which knows nothing of the harness. It answers
what the harness's own model for Hugging Face does (``TemplateLM`` and ``HFLM`` of
lm-evaluation-harness 0.4.13), except where that stops with an assertion or departs from what ``LM``
documents: see ``TextModel``.

A text without a context is scored after the tokenizer's token for the beginning of a sequence, BOS,
where ``evaluate.bos_token`` names one, as it does for models that were trained with it elsewhere;
else after the end-of-document token. With ``packing = "documents"`` no model has seen text after
that token in training, so the first tokens of such texts cost more than they would elsewhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.config import check_vocabulary
from fope_jax.data.bos import Bos, find_bos
from fope_jax.data.cache import open_cache
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.evaluate.restore import load_run, warn_where_bos_is_unknown
from fope_jax.extras import require
from fope_jax.model.decode import greedy_decode, prefill
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.losses import token_nats
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

log = logging.getLogger(__name__)

GENERATED = 256  # tokens, where a task does not say how many; the harness's own default
SHOWN = 60  # characters of a text that a message shows
# Keys of a task's generation_kwargs: those that say how many tokens to write, of which the first
# one counts; those that leave greedy decoding as it is with one value; and with any value.
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}
_IGNORED = {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed", *_COUNTS}

# Rows of tokens with each row's text at its end: tokens, segments and targets [B, T] -> nats and
# whether each target is the most likely token, [B, T].
RowScorer = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any]]
# Tokens and segments [B, T] of prompts that end together, and a number of tokens -> [B, count];
# -1 from where on logits are not finite.
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
        return greedy_decode(model, *prefill(model, tokens, segments, count), count)

    jitted = jax.jit(write, static_argnums=4)
    return (
        lambda *rows: score(params, constants, *rows),
        lambda tokens, segments, count: jitted(params, constants, tokens, segments, count),
    )


class TextModel:
    """Log-likelihoods of texts, and texts gone on with.

    Where a token spans the border of context and continuation, as ``Answer`` that of ``Ans`` and
    ``wer``, the continuation is every token from the first one on that the context alone does not
    have; the harness's own model cuts the joint tokens at the context's number of tokens, scores
    other tokens than the continuation's, and stops where none are left. A text that is scored whole
    follows one BOS token, which is not scored itself, as ``LM.loglikelihood_rolling`` documents.

    Args:
      score, write: see ``row_programs``.
      tokenizer: of the model.
      max_length: tokens that the model reads at once; longer contexts lose their beginning, BOS
        with it, which is logged, and longer documents are read in windows. None reads everything
        whole.
      batch_tokens: upper bound of tokens in one forward pass; one row is always allowed.
      bos: what a text without a context follows; None takes the end-of-document token.
      add_bos: whether contexts begin with ``bos``, too.
    """

    def __init__(
        self,
        score: RowScorer,
        write: Writer,
        tokenizer: Tokenizer,
        *,
        max_length: int | None,
        batch_tokens: int = 16_384,
        bos: Bos | None = None,
        add_bos: bool = False,
    ):
        self._score, self._write, self._tokenizer = score, write, tokenizer
        self.max_length, self._batch_tokens = max_length, batch_tokens
        self._prefix = tokenizer.eos_id if bos is None else bos.id
        self._added = bos if add_bos else None

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """``log p(continuation | context)``, and whether greedy decoding writes it.

        Raises:
          ValueError: a continuation that is empty, has no tokens or too many for ``max_length``, or
            whose score is not finite; the message names the request.
        """
        rows = [self._encode(number, *pair) for number, pair in enumerate(pairs)]
        results = self._sums(self._fitting(rows))
        for number, ((total, _), pair) in enumerate(zip(results, pairs, strict=True)):
            _check_score(total, _request(number, *pair))
        return results

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """``log p(text)``: every token once, after as many as fit into a window before it.

        Raises:
          ValueError: a score that is not finite; the message names the request.
        """
        results = []
        for number, text in enumerate(texts):
            tokens = self._encode_text(text)
            windows = list(rolling_windows(tokens, self._prefix, self.max_length))
            results.append(sum(total for total, _ in self._sums(windows)))
            _check_score(results[-1], f"request {number}, text {_shown(text)}")
        return results

    def generate(self, context: str, until: Sequence[str], count: int) -> str:
        """What greedy decoding writes after ``context``.

        Args:
          context: the prompt.
          until: texts that end it, looked for one after the other; they and what follows is left
            out.
          count: tokens at most. An end of document ends it as well.

        Raises:
          ValueError: no room for a prompt in ``max_length``, or logits that are not finite.
        """
        tokens = self._encode_context(context) or [self._prefix]
        if self.max_length is not None and len(tokens) + count > self.max_length:
            if count >= self.max_length:
                raise ValueError(
                    f"{count} tokens to write leave no room for a prompt in max_length = "
                    f"{self.max_length}"
                )
            log.warning(
                "a prompt of %d tokens loses its beginning: with %d to write, max_length is %d",
                len(tokens),
                count,
                self.max_length,
            )
            tokens = tokens[count - self.max_length :]
        most = None if self.max_length is None else self.max_length - count
        size = _room(len(tokens), most)
        batch, segments = _at_the_end([tokens], size, self._tokenizer.pad_id)
        written = np.asarray(self._write(batch, segments, count))[0].tolist()
        if min(written) < 0:
            raise ValueError(
                f"the logits after the prompt {_shown(context)} are not finite (NaN or infinity): "
                "no token is the most likely one"
            )
        if self._tokenizer.eos_id in written:
            written = written[: written.index(self._tokenizer.eos_id)]
        text = self._tokenizer.decode(written)
        for stop in filter(None, until):
            text = text.split(stop)[0]
        return text

    def _without_bos(self, text: str) -> str:
        """``text`` without a BOS that is written at its beginning: it gets one as a token."""
        return text.removeprefix(self._added.token) if self._added else text

    def _encode_text(self, text: str) -> list[int]:
        """Tokens of a text from its beginning, with what the tokenizer itself puts before it."""
        text = self._without_bos(text)
        return list(self._tokenizer.encode(self._tokenizer.prefix + text)) if text else []

    def _encode_context(self, text: str) -> list[int]:
        """Tokens of a text with what stands before every text."""
        before = [self._added.id] if self._added else []
        return before + self._encode_text(text)

    def _encode(self, number: int, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both in the tokens of their joint text.

        White space at the context's end goes to the continuation, and so does every token of the
        context from the first one on that is another in the joint text.
        """
        where = _request(number, context, continuation)
        if not continuation:
            raise ValueError(f"{where}: the continuation is empty; there is nothing to score")
        bare = context.rstrip()
        joint = self._encode_context(context + continuation)
        alone = self._encode_context(bare)
        shared = 0
        while shared < min(len(alone), len(joint)) and alone[shared] == joint[shared]:
            shared += 1
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
        return joint[:shared] or [self._prefix], joint[shared:]

    def _fitting(
        self, rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], list[int]]]:
        """Rows whose contexts are cut from their beginning to ``max_length`` inputs."""
        if self.max_length is None:
            return list(rows)
        # The last target is no input.
        room = [self.max_length + 1 - len(target) for _, target in rows]
        cut = sum(len(context) > own for (context, _), own in zip(rows, room, strict=True))
        if cut:
            log.warning(
                "%d of %d contexts are longer than max_length = %d and lose their beginning",
                cut,
                len(rows),
                self.max_length,
            )
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


def _shown(text: str) -> str:
    """``text`` for a message, its middle left out where it is long."""
    half = SHOWN // 2
    return repr(text if len(text) <= SHOWN else f"{text[:half]} ... {text[-half:]}")


def _request(number: int, context: str, continuation: str) -> str:
    return f"request {number}, context {_shown(context)}, continuation {_shown(continuation)}"


def _check_score(total: float, where: str) -> None:
    """Raises ValueError for NaN or infinity, which would count as right in a task's accuracy."""
    if not math.isfinite(total):
        raise ValueError(
            f"{where}: the log-likelihood is {total}; the model's logits are not finite there"
        )


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
    add_bos_token: bool | None = None,
) -> TextModel:
    """The model of a run, with the tokenizer of its token cache.

    Args:
      workdir: a run.
      step: which checkpoint; None takes the newest valid one.
      max_length: see ``TextModel``; None takes what the position embedding is defined for.
      batch_tokens: see ``TextModel``; None takes that of the run's ``evaluate`` section.
      add_bos_token: whether contexts begin with the run's ``evaluate.bos_token``; None takes
        ``evaluate.add_bos_token``.

    Raises:
      ValueError: ``max_length`` is beyond what the position embedding is defined for, weights that
        are not finite, a tokenizer of more tokens than the model, or a BOS token that is none.
    """
    loaded = load_run(workdir, step)
    experiment = loaded.experiment
    limit = experiment.position.limits.max_length
    if limit is not None and max_length is not None and max_length > limit:
        raise ValueError(
            f"max_length = {max_length}: {type(experiment.position).__name__} is defined for at "
            f"most {limit}"
        )
    _, params, constants = split(loaded.model)
    if counts := count_non_finite({"params": params, "constants": constants}):
        raise ValueError(
            f"{workdir}, step {loaded.step}: weights are not finite (NaN or infinity), so that no "
            f"score means anything: {describe_non_finite(counts)}"
        )
    settings = experiment.evaluate
    tokenizer = open_cache(experiment.data, "train").tokenizer
    check_vocabulary(tokenizer.vocab_size, experiment.model)
    bos = find_bos(tokenizer, settings.bos_token)
    add_bos = settings.add_bos_token if add_bos_token is None else add_bos_token
    if add_bos and bos is None:
        raise ValueError(
            "add_bos_token = True: evaluate.bos_token of the run is None, so that there is no token"
            " to add"
        )
    if add_bos_token is None:
        warn_where_bos_is_unknown(workdir)
    first = "with no BOS token" if bos is None or not add_bos else f"with {bos.token} ({bos.id})"
    after = tokenizer.eos_id if bos is None else f"{bos.token} ({bos.id})"
    log.info("texts begin %s; one without a context follows token %s", first, after)
    return TextModel(
        *row_programs(loaded.model),
        tokenizer,
        max_length=max_length or limit,
        batch_tokens=batch_tokens or settings.batch_tokens,
        bos=bos,
        add_bos=add_bos,
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
    samples = settings.get("do_sample")
    if samples or (samples is None and settings.get("temperature")):
        raise ValueError(
            f"generate_until asks for sampling ({settings}); only greedy decoding is done: set "
            "do_sample to false and temperature to 0 in the task"
        )
    for key, value in settings.items():
        if key not in _IGNORED and value is not None and value != _NEUTRAL.get(key):
            raise ValueError(
                f"generate_until asks for {key} = {value!r}, which greedy decoding here does not "
                "know; leave it out of the task's generation_kwargs"
            )
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"generate_until: until = {until!r}; accepted: a text or a list of texts")
    counts = {key: settings[key] for key in _COUNTS if settings.get(key) is not None}
    key, count = next(iter(counts.items()), (_COUNTS[0], GENERATED))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"generate_until: {key} = {count!r}; accepted: an integer of 1 or more")
    return model.generate(context, until, count)
