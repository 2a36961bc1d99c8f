"""The protocols that an experiment asks for, checked before any device work."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from fope_jax.config import ConfigError, EvaluateConfig, Experiment, check_vocabulary
from fope_jax.data.bos import Bos, find_bos
from fope_jax.data.held_out import read_held_out
from fope_jax.data.random_positions import PositionDraw
from fope_jax.data.retrieval import TASKS
from fope_jax.data.retrieval.base import Task
from fope_jax.data.retrieval.passkey import TEMPLATES, Passkey
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.retrieval.text_task import CorpusHaystack, TextTask
from fope_jax.evaluate.generation import Answerer
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.progress import Progress
from fope_jax.evaluate.protocols import TEXT_PROTOCOLS, Protocol, protocol_names
from fope_jax.evaluate.retrieval import (
    ContextTooLongError,
    ContextTooShortError,
    TrialGrid,
    answers_at_random_positions,
    check_trials,
    score_task,
)
from fope_jax.evaluate.run_data import RunData, load_run_tokenizer
from fope_jax.evaluate.scoring import Scorer, at_random_positions
from fope_jax.evaluate.windows import TooShortError, Windows, allowed_contexts, context_lengths
from fope_jax.report.rows import NO_BOS
from fope_jax.storage.protocol_names import PASSKEY, RETRIEVAL

log = logging.getLogger(__name__)

FIRST_TOKEN = f"{NO_BOS}; the first token of a window is read and not scored"


class Planned(NamedTuple):
    """A protocol that may not fit the data.

    Attributes:
      label: as ``Protocol.label``.
      contexts: tokens of its windows.
      make: contexts -> the protocol; ValueError where it does not fit.
      is_named: whether it was asked for by name: it is an error if it does not fit.
      is_one_of_all: whether it was asked for by "all": it is left out if it does not fit.
      is_flexible: whether contexts that do not fit are left out; an error otherwise.
    """

    label: str
    contexts: list[int]
    make: Callable[[list[int]], Protocol]
    is_named: bool
    is_one_of_all: bool
    is_flexible: bool


def unstated_settings(
    evaluate: EvaluateConfig, stated: Collection[str] = (), *, is_extension: bool = False
) -> frozenset[str]:
    """The fields of an ``evaluate`` section that nobody stated: they have their defaults.

    An extension divides the default lengths by its longer training length.

    Args:
      stated: keys of overrides, such as "evaluate.lengths".

    >>> sorted(unstated_settings(EvaluateConfig(lengths=(1, 3)), ["evaluate.protocols"]))[:2]
    ['add_bos_token', 'batch_tokens']
    """
    default, unstated = EvaluateConfig(), set()
    for field in dataclasses.fields(evaluate):
        value, usual = getattr(evaluate, field.name), getattr(default, field.name)
        if is_extension and field.name in ("lengths", "passkey_lengths"):
            usual = usual[: len(value)]
        if value == usual and f"evaluate.{field.name}" not in stated:
            unstated.add(field.name)
    return frozenset(unstated)


def plan_protocols(
    experiment: Experiment,
    data: RunData,
    wanted: Sequence[str] | None = None,
    unstated: Collection[str] | None = None,
) -> list[Protocol]:
    """The protocols that an experiment's ``evaluate`` section asks for, checked before any work.

    What does not fit the data is left out with a warning that says why, unless it was asked for by
    name: a protocol or a task by ``wanted`` or by its setting, a length by its setting.

    Args:
      data: the token cache of the run.
      wanted: names of ``PROTOCOLS``, or "all", in place of ``evaluate.protocols``. "retrieval"
        without ``evaluate.retrieval_tasks`` means all tasks that fit.
      unstated: see ``unstated_settings``; None compares the settings with the defaults.

    Raises:
      ValueError: an unknown protocol, or something asked for by name that does not fit.
      CacheError: the token cache is missing or damaged.
    """
    settings = experiment.evaluate
    unstated = unstated_settings(settings) if unstated is None else unstated
    asked = settings.protocols if wanted is None else wanted
    named = () if wanted is None and "protocols" in unstated else asked
    names = protocol_names(asked)
    texts: dict[str, Any] = {name: data.open(name) for name in settings.splits}
    if settings.texts and not texts and data.workdir:  # as for imported weights: no token cache
        cache, tokenizer = None, load_run_tokenizer(data.workdir, data.config)
    else:
        cache = next(iter(texts.values())) if texts else data.open("train")
        tokenizer = cache.tokenizer
    check_vocabulary(tokenizer.vocab_size, experiment.model)
    bos = find_bos(tokenizer, settings.bos_token) if settings.add_bos_token else None
    for source in settings.texts:
        held_out = read_held_out(source, tokenizer, data.config, settings.text_field)
        texts[held_out.split] = held_out
    haystack = next(iter(texts.values())) if texts else cache

    planned: list[Planned] = []
    is_all = "all" in asked
    text_names = [name for name in names if name in TEXT_PROTOCOLS]
    is_flexible = "lengths" in unstated
    contexts = _contexts(experiment, "lengths", is_flexible) if text_names else []
    for split, text in texts.items() if contexts else ():
        for name in text_names:
            make = functools.partial(_text_protocol, name, experiment, text, split, bos)
            label = f"{name} ({split})"
            if _num_windows(name, settings):
                planned.append(Planned(label, contexts, make, name in named, is_all, is_flexible))
            elif name in asked and wanted is not None:
                key = f"evaluate.{_windows_field(name)}"
                raise ValueError(
                    f"protocol {name} is asked for, but this run's configuration has {key} = 0, "
                    f"and so no window of it; set it for this call, as --config.{key}=16"
                )
    has_trials = settings.passkey_trials and settings.passkey_depths
    if wanted is not None:
        _check_trials_exist(settings, named)
    if has_trials and len(names) > len(text_names):
        is_flexible = "passkey_lengths" in unstated
        contexts = _contexts(experiment, "passkey_lengths", is_flexible)
        for kind, name, is_named in _trial_names(settings, names, named, wanted):
            make = functools.partial(_trial_protocol, kind, name, experiment, haystack, bos)
            if contexts:
                label = f"{kind} ({name})"
                planned.append(Planned(label, contexts, make, is_named, is_all, is_flexible))
    return _make_fitting(planned)


def _contexts(experiment: Experiment, field: str, is_flexible: bool) -> list[int]:
    """The contexts of ``evaluate.lengths`` or ``passkey_lengths``, see ``context_lengths``."""
    multiples, what = getattr(experiment.evaluate, field), f"evaluate.{field}"
    if not is_flexible:
        return context_lengths(experiment, multiples, what)
    contexts, beyond = allowed_contexts(experiment, multiples)
    if beyond:
        log.warning(
            "%s: %s tokens are left out: %s is defined for at most %d",
            what,
            _join(beyond),
            type(experiment.position).__name__,
            experiment.position.limits.max_length,
        )
    return contexts


def _check_trials_exist(settings: EvaluateConfig, named: Collection[str]) -> None:
    """Raises ConfigError for a protocol on trials that is asked for by name and has none."""
    for name in (PASSKEY, RETRIEVAL):
        needed = {"passkey_trials": "20", "passkey_depths": "0.1,0.5,0.9", "passkey_lengths": "1,2"}
        needed |= {"passkey_templates": "standard"} if name == PASSKEY else {}
        for field, example in needed.items():
            if name in named and not (value := getattr(settings, field)):
                raise ConfigError(
                    f"protocol {name} is asked for, but this run's configuration has "
                    f"evaluate.{field} = {value}, and so no trial of it; set it for this call, as "
                    f"--config.evaluate.{field}={example}"
                )


def _trial_names(
    settings: EvaluateConfig,
    names: Sequence[str],
    named: Sequence[str],
    wanted: Sequence[str] | None,
) -> list[tuple[str, str, bool]]:
    """Kind, template or task, and whether it was named, of each protocol with trials."""
    templates = settings.passkey_templates if PASSKEY in names else ()
    tasks = [(PASSKEY, name, PASSKEY in named) for name in templates]
    if RETRIEVAL in names and (settings.retrieval_tasks or wanted is None):
        tasks += [(RETRIEVAL, name, True) for name in settings.retrieval_tasks]
    elif RETRIEVAL in names:
        tasks += [(RETRIEVAL, name, False) for name in TASKS if name != PASSKEY]
    return tasks


def _make_fitting(planned: Sequence[Planned]) -> list[Protocol]:
    """Makes the protocols; warns of what is left out, once for each reason."""
    protocols: list[Protocol] = []
    left_out: dict[str, list[str]] = {}
    for plan in planned:
        protocol, reason = _fit(plan)
        if protocol is not None:
            protocols.append(protocol)
        if reason:
            left_out.setdefault(reason, []).append(plan.label)
    for reason, labels in left_out.items():
        log.warning("%s: %s", ", ".join(labels), reason)
    if planned and not protocols:
        log.warning("nothing that this evaluation measures fits the data")
    return protocols


def _fit(plan: Planned) -> tuple[Protocol | None, str]:
    """The protocol at the contexts that fit, or None; and what was left out and why."""
    contexts, reasons = list(plan.contexts), {}
    while True:
        try:
            protocol = plan.make(contexts)
        except ValueError as error:
            may_drop = plan.is_flexible and len(contexts) > 1
            if may_drop and isinstance(error, (TooShortError, ContextTooLongError)):
                contexts.pop()
            elif may_drop and isinstance(error, ContextTooShortError):
                contexts.pop(0)
            elif plan.is_named or (_is_of_settings(error, plan) and not plan.is_one_of_all):
                raise
            else:
                return None, f"left out: {error}"
            reasons.setdefault(type(error), str(error))
        else:
            dropped = _join(n for n in plan.contexts if n not in contexts)
            why = "; ".join(reasons.values())
            return protocol, f"{dropped} tokens left out: {why}" if dropped else ""


def _is_of_settings(error: ValueError, plan: Planned) -> bool:
    """Whether a stated setting is at fault, and not the data."""
    unfit = (TooShortError, ContextTooShortError, ContextTooLongError)
    is_of_length = isinstance(error, unfit)
    return isinstance(error, ConfigError) or (is_of_length and not plan.is_flexible)


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def check_haystack(cache: Any, context: int) -> None:
    """Raises TooShortError where a split has fewer tokens than a context takes as haystack."""
    if context > cache.num_tokens:
        raise TooShortError(
            f"a haystack of {context} tokens is not in the {cache.split} split, which has "
            f"{cache.num_tokens}; evaluate shorter lengths, or take "
            "--config.evaluate.needle_haystack=noise"
        )


def _num_windows(name: str, config: EvaluateConfig) -> int:
    """Windows, blocks or documents of a text protocol; 0 leaves it out."""
    return getattr(config, _windows_field(name))


def _windows_field(name: str) -> str:
    return "num_windows" if name == "same-tokens" else "position_windows"


def _text_protocol(
    name: str, experiment: Experiment, cache: Any, split: str, bos: Bos | None, contexts: list[int]
) -> Protocol:
    """A protocol on one text; ValueError where its settings or the text are unfit."""
    config, length = experiment.evaluate, experiment.train.length
    amount = _num_windows(name, config)
    values = {
        "contexts": contexts,
        "context": max(contexts),
        "training_length": length,
        "scored": config.scored_tokens,
        "stride": config.stride or max(1, length // 2),
        "reset": name == "document-resets",
        "num_windows": amount,
        "num_blocks": amount,
        "num_documents": amount,
    }
    kind, score, check, beginning = TEXT_PROTOCOLS[name]
    settings = {key: values[key] for key in inspect.signature(score).parameters if key in values}
    check(cache, settings)
    draw = _position_draw(experiment, max(contexts))

    def run(scorer: Scorer, progress: Progress) -> tuple[list[Row], Windows]:
        batching = {"batch_tokens": config.batch_tokens, "progress": progress}
        if draw is not None:
            scorer = at_random_positions(scorer, draw)
        return score(scorer, cache, **settings, **batching, bos=bos and bos.id)

    identity = {"protocol": name, "split": split}
    recorded = settings | {"cache": cache.fingerprint, **_recorded(draw)}
    is_random = draw is not None
    protocol = Protocol(kind, identity, recorded, run, bos=FIRST_TOKEN, is_random=is_random)
    return protocol.with_bos(bos, f"{beginning}; it is read and not scored")


def _recorded(draw: PositionDraw | None) -> dict[str, Any]:
    """What the settings of a protocol say of its positions."""
    return {} if draw is None else {"positions": "random"}


def _position_draw(experiment: Experiment, longest: int) -> PositionDraw | None:
    """How positions are drawn for an evaluation of ``longest`` tokens, if they are."""
    train = experiment.train
    if not experiment.evaluate.random_positions or train.position_range is None:
        return None
    if longest > train.position_range:
        raise ValueError(
            f"evaluate.random_positions: a context of {longest} tokens has not so many different "
            f"positions in train.position_range = {train.position_range}; evaluate multiples of "
            f"train.length = {train.length} up to {train.position_range // train.length}"
        )
    return PositionDraw(train.position_range, train.position_draw, experiment.seed)


def _trial_protocol(
    kind: str, name: str, experiment: Experiment, cache: Any, bos: Bos | None, contexts: list[int]
) -> Protocol:
    """A protocol on trials; ValueError where a context is too short or the haystack too small."""
    settings, tokenizer = experiment.evaluate, cache.tokenizer
    task: Task
    if kind == PASSKEY:
        task = Passkey.from_tokenizer(tokenizer, TEMPLATES[name])
    else:
        haystack = CorpusHaystack(cache) if settings.needle_haystack == "corpus" else None
        task = make_task(name, tokenizer, haystack)
    depths, trials = task.depths or settings.passkey_depths, settings.passkey_trials
    grid = TrialGrid(contexts, depths, trials, settings.trial_seed, bos and bos.id)
    draw = _position_draw(experiment, max(contexts))
    if draw is None:
        check_trials(task, grid, experiment.position.limits.max_length)
    else:
        check_trials(task, grid, draw.position_range, "train.position_range has")
    if isinstance(task, TextTask) and isinstance(task.haystack, CorpusHaystack):
        check_haystack(cache, max(contexts))

    def run(answerer: Answerer, progress: Progress) -> tuple[list[Row], None]:
        batch_tokens = settings.batch_tokens
        if draw is not None:
            answerer = answers_at_random_positions(answerer, draw)
        return score_task(
            answerer, task, tokenizer, grid, batch_tokens=batch_tokens, progress=progress
        ), None

    identity = {"protocol": kind, "template" if kind == PASSKEY else "task": name}
    recorded = {
        "contexts": list(contexts),
        "depths": list(depths),
        "trials": trials,
        "seed": settings.trial_seed,
        "half": "test",
        **task.describe(),
        **_recorded(draw),
    }
    is_random = draw is not None
    protocol = Protocol(kind, identity, recorded, run, is_generative=True, is_random=is_random)
    return protocol.with_bos(bos, "every prompt begins with {}")
