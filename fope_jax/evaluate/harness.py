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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.config import Experiment, check_vocabulary
from fope_jax.config.fields import check_value
from fope_jax.data.bos import Bos, find_bos
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.evaluate.progress import progress_bar
from fope_jax.evaluate.restore import check_weights, load_run, warn_where_bos_is_unknown
from fope_jax.evaluate.run_data import load_run_tokenizer
from fope_jax.evaluate.text_model import RowPrograms, TextModel, row_programs
from fope_jax.extras import require

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256  # the harness's default
# Keys of a task's generation_kwargs: the number of tokens (the first key present counts), keys
# accepted with one value only, and keys that greedy decoding ignores.
COUNT_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}
IGNORED = {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed", *COUNT_KEYS}


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
      ValueError: ``max_length`` or ``batch_tokens`` is no whole number of 1 or more,
        ``max_length`` exceeds the limit of the position embedding, the tokenizer has more tokens
        than the model, or the BOS token is unknown.
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
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value is not None:
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            check_value(name, value, is_whole and value >= 1, "an integer of 1 or more, or None")
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
    tokens = settings.batch_tokens if batch_tokens is None else batch_tokens
    longest = limit if max_length is None else max_length
    return TextModelPlan(tokenizer, longest, tokens, bos, add_bos)


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
            return model.loglikelihood([request.args for request in requests], progress_bar)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            texts = [request.args[0] for request in requests]
            return model.loglikelihood_rolling(texts, progress_bar)

        def generate_until(self, requests: Any) -> list[str]:
            groups: dict[tuple[tuple[str, ...], int], list[int]] = {}  # settings -> requests
            for number, request in enumerate(requests):
                until, count = generation_settings(request.args[1])
                groups.setdefault((tuple(until), count), []).append(number)
            texts = [""] * len(requests)
            for settings, numbers in groups.items():
                contexts = [requests[number].args[0] for number in numbers]
                written = model.generate_each(contexts, *settings, progress_bar)
                for number, text in zip(numbers, written, strict=True):
                    texts[number] = text
            return texts

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
