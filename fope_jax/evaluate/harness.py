"""A run as a model of EleutherAI's lm-evaluation-harness.

    import lm_eval
    from fope_jax.evaluate.harness import harness_model
    lm_eval.simple_evaluate(model=harness_model("runs/fope"), tasks=["lambada_openai"])

Scores are those of ``HFLM`` (lm-evaluation-harness 0.4.13), except where that fails an assertion or
departs from what ``LM`` documents, see ``TextModel``.

A text without a context is scored after ``evaluate.bos_token`` or the end-of-document token. With
``packing = "documents"`` no text follows the latter in training: first tokens then have a higher
loss.
"""

from __future__ import annotations

import logging
import math
import os.path
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fope_jax.config import Experiment, check_vocabulary
from fope_jax.data.bos import Bos, encode_prompt, find_bos
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.evaluate.generation import by_rows, pad_left, padded_length
from fope_jax.evaluate.restore import check_weights, load_run, warn_where_bos_is_unknown
from fope_jax.evaluate.run_data import load_run_tokenizer
from fope_jax.evaluate.scoring import Progress, model_scorer, no_progress
from fope_jax.extras import require
from fope_jax.model.decode import greedy_decode, prefill
from fope_jax.model.masks import TokenIndex
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256  # the harness's default
SHOWN = 60  # characters of a text in a message
# Keys of a task's generation_kwargs: the number of tokens (the first key present counts), keys
# accepted with one value only, and keys that greedy decoding ignores.
COUNT_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}
IGNORED = {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed", *COUNT_KEYS}

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

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
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
        results = self.score_rows(rows)
        for (total, _), name in zip(results, names, strict=True):
            _check_finite(total, name)
        return results

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """``log p(text)``: each token once, with the context that fits into its window.

        Raises:
          ValueError: names the request whose score is not finite.
        """
        results = []
        for number, text in enumerate(texts):
            windows = rolling_windows(self._encode_text(text), self._first_token, self.max_length)
            results.append(sum(total for total, _ in self.score_rows(list(windows))))
            _check_finite(results[-1], f"request {number}, text {_abbreviate(text)}")
        return results

    def generate(self, context: str, until: Sequence[str], count: int) -> str:
        """At most ``count`` greedy tokens as text, up to an end of document or text of ``until``.

        Raises:
          ValueError: ``max_length`` leaves no room for a prompt, or logits are not finite.
        """
        tokens = self.prompt_tokens(context)
        longest = None if self.max_length is None else self.max_length - count
        if longest is not None and longest < 1:
            raise ValueError(
                f"{count} tokens to write leave no room for a prompt in max_length = "
                f"{self.max_length}"
            )
        if longest is not None and len(tokens) > longest:
            log.warning(
                "a prompt of %d tokens loses its beginning: with %d to write, max_length is %d",
                len(tokens),
                count,
                self.max_length,
            )
            tokens = tokens[-longest:]
        (written,) = self.write_after([tokens], count, [f"the prompt {_abbreviate(context)}"])
        text = self.tokenizer.decode(written)
        for stop in filter(None, until):
            text = text.split(stop)[0]
        return text

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


# ---------------------------------------------------------------------------- the harness


def load_text_model(
    workdir: str | Path,
    step: int | None = None,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    add_bos_token: bool | None = None,
) -> TextModel:
    """Loads the model of a run with its tokenizer.

    Defaults: the newest valid ``step``; as ``max_length`` the limit of the position embedding; for
    the rest the run's ``evaluate`` section. Settings are those of ``TextModel``.

    Raises:
      NonFiniteError: weights are not finite.
      ValueError: ``max_length`` exceeds the limit of the position embedding, the tokenizer has more
        tokens than the model, or the BOS token is unknown.
    """
    experiment, model, step, _ = load_run(workdir, step)
    text = plan_text_model(
        workdir,
        experiment,
        max_length=max_length,
        batch_tokens=batch_tokens,
        add_bos_token=add_bos_token,
    )
    check_weights(model, f"{workdir}, step {step}")
    if add_bos_token is None:
        warn_where_bos_is_unknown(workdir)
    name = f"{text.bos.token} ({text.bos.id})" if text.bos else str(text.tokenizer.eos_id)
    first = f"with {name}" if text.add_bos else "with no BOS token"
    log.info("texts begin %s; one without a context follows token %s", first, name)
    return text.of(row_programs(model))


class TextModelPlan(NamedTuple):
    """A ``TextModel`` but for its programs, whose fields it has."""

    tokenizer: Tokenizer
    max_length: int | None
    batch_tokens: int
    bos: Bos | None
    add_bos: bool

    def of(self, programs: RowPrograms) -> TextModel:
        return TextModel(*programs, *self)


def plan_text_model(
    workdir: str | Path,
    experiment: Experiment,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    add_bos_token: bool | None = None,
) -> TextModelPlan:
    """The settings of a run's ``TextModel``, checked before any device work.

    Defaults and errors are those of ``load_text_model``.
    """
    limit = experiment.position.limits.max_length
    if limit is not None and max_length is not None and max_length > limit:
        raise ValueError(
            f"max_length = {max_length}: {type(experiment.position).__name__} is defined for at "
            f"most {limit}"
        )
    settings = experiment.evaluate
    tokenizer = load_run_tokenizer(workdir, experiment.data)
    check_vocabulary(tokenizer.vocab_size, experiment.model)
    bos = find_bos(tokenizer, settings.bos_token)
    add_bos = settings.add_bos_token if add_bos_token is None else add_bos_token
    if add_bos and bos is None:
        raise ValueError(
            "add_bos_token = True: evaluate.bos_token of the run is None, so that there is no token"
            " to add"
        )
    tokens = batch_tokens or settings.batch_tokens
    return TextModelPlan(tokenizer, max_length or limit, tokens, bos, add_bos)


def harness_model(workdir: str | Path, step: int | None = None, **settings: Any) -> Any:
    """An ``lm_eval.api.model.LM`` of a run; arguments as for ``load_text_model``.

    Raises:
      ImportError: the harness is not installed; the message holds the pip line.
    """
    base = require("lm_eval.api.model", "harness").LM
    return as_harness_model(base, load_text_model(workdir, step, **settings))


def as_harness_model(base: Any, model: TextModel) -> Any:
    """Wraps ``model`` as a subclass of ``base``, the harness's LM."""

    class RunLM(base):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return model.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any) -> list[str]:
            pairs = (request.args for request in requests)
            return [model.generate(text, *generation_settings(kwargs)) for text, kwargs in pairs]

    return RunLM()


def generation_settings(settings: dict[str, Any]) -> tuple[Sequence[str], int]:
    """The stop texts and the most tokens, from a task's generation_kwargs.

    Raises:
      ValueError: a setting that greedy decoding does not support; the message names it.
    """
    samples = settings.get("do_sample")
    if samples or (samples is None and settings.get("temperature")):
        raise ValueError(
            f"generate_until asks for sampling ({settings}); only greedy decoding is done: set "
            "do_sample to false and temperature to 0 in the task"
        )
    for key, value in settings.items():
        if key not in IGNORED and value is not None and value != NEUTRAL.get(key):
            raise ValueError(
                f"generate_until asks for {key} = {value!r}, which greedy decoding here does not "
                "know; leave it out of the task's generation_kwargs"
            )
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"generate_until: until = {until!r}; accepted: a text or a list of texts")
    counts = {key: settings[key] for key in COUNT_KEYS if settings.get(key) is not None}
    key, count = next(iter(counts.items()), (COUNT_KEYS[0], MAX_NEW_TOKENS))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"generate_until: {key} = {count!r}; accepted: an integer of 1 or more")
    return until, count
