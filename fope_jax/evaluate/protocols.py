"""The nine protocols, and the ones that an experiment asks for."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fope_jax.config import EvaluateConfig, Experiment, check_vocabulary
from fope_jax.data.bos import Bos, find_bos
from fope_jax.data.cache import open_cache
from fope_jax.data.held_out import read_held_out
from fope_jax.data.retrieval import TASKS
from fope_jax.data.retrieval.base import Task
from fope_jax.data.retrieval.passkey import TEMPLATES, Passkey
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.retrieval.text_task import CorpusHaystack
from fope_jax.evaluate.generation import Answerer
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.packed import check_chunks, score_chunks, score_resets
from fope_jax.evaluate.perplexity import score_from_start, score_positions, score_same_tokens
from fope_jax.evaluate.retrieval import TrialGrid, check_trials, score_task
from fope_jax.evaluate.scoring import Progress, Scorer
from fope_jax.evaluate.sliding import check_stride, score_sliding
from fope_jax.evaluate.windows import Windows, context_lengths, place_blocks

log = logging.getLogger(__name__)

NO_BOS = "no BOS token is added"
FIRST_TOKEN = f"{NO_BOS}; the first token of a window is read and not scored"
PASSKEY, RETRIEVAL = "passkey", "retrieval"
TRIAL_SEED = 0  # the same for all runs: every variant gets the same trials


@dataclass(frozen=True)
class Protocol:
    """A measurement on one checkpoint.

    Attributes:
      kind: ``kind`` of its rows.
      identity: fields of all its rows, unique among the protocols of that kind.
      settings: everything else that its numbers depend on, as JSON values.
      run: (scorer, progress) -> (rows, windows or None).
      is_generative: ``run`` takes an ``Answerer`` instead of a scorer.
      bos: how windows begin, in words.
      bos_token: name of the BOS token that windows begin with, None without one.
    """

    kind: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    run: Callable[[Any, Progress], tuple[list[Row], Windows | None]]
    is_generative: bool = False
    bos: str = NO_BOS
    bos_token: str | None = None

    @property
    def row_fields(self) -> dict[str, Any]:
        """Fields of all its rows. ``bos_token`` keeps rows with and without BOS in two curves."""
        return self.identity | ({"bos_token": self.bos_token} if self.bos_token else {})

    @property
    def label(self) -> str:
        return "{} ({})".format(*self.identity.values())

    def with_bos(self, bos: Bos | None, beginning: str) -> Protocol:
        """This protocol with BOS at the start of its windows, described by ``beginning``."""
        if bos is None:
            return self
        settings = self.settings | {"bos_token": bos.token}
        words = beginning.format(bos.token)
        return dataclasses.replace(self, settings=settings, bos=words, bos_token=bos.token)

    def owns(self, row: Row, step: int) -> bool:
        """Whether ``row`` belongs to this protocol at ``step``, with or without BOS."""
        return (
            row.get("kind") in (self.kind, "protocol")
            and row.get("step") == step
            and all(row.get(key) == value for key, value in self.identity.items())
        )


# ---------------------------------------------------------------------------- the table


class TextProtocol(NamedTuple):
    """How a protocol on text is made.

    Attributes:
      kind: ``kind`` of its rows.
      score: (scorer, cache, **settings, batch_tokens, progress, bos) -> (rows, windows). Its
        argument names select its settings from the values in ``_text_protocol``.
      check: (cache, settings); raises ValueError before any device work.
      beginning: text for ``Protocol.bos`` where a BOS token is added.
    """

    kind: str
    score: Callable[..., Any]
    check: Callable[[Any, dict[str, Any]], Any] = lambda cache, settings: None
    beginning: str = "every window begins with {}, in place of its first token"


def _check_sliding(cache: Any, settings: dict[str, Any]) -> None:
    check_stride(settings["stride"], settings["contexts"])


def _check_chunks(cache: Any, settings: dict[str, Any]) -> None:
    check_chunks(settings["contexts"])


def _check_boundaries(cache: Any, settings: dict[str, Any]) -> None:
    length, blocks = math.lcm(*settings["contexts"]), settings["num_blocks"]
    place_blocks(cache.documents, length=length, total=blocks, require_boundary=True)


CHUNKS_AND_DOCUMENTS = (
    "every chunk begins with {}, in place of its first token, and every document in it, in place "
    "of the end-of-document token before it"
)
DOCUMENTS = "every document is read after {}"
TEXT_PROTOCOLS = {
    "same-tokens": TextProtocol("perplexity", score_same_tokens),
    "sliding-window": TextProtocol("perplexity", score_sliding, _check_sliding),
    "chunks": TextProtocol("perplexity", score_chunks, _check_chunks),
    "document-resets": TextProtocol(
        "perplexity", score_resets, _check_boundaries, CHUNKS_AND_DOCUMENTS
    ),
    "no-resets": TextProtocol("perplexity", score_resets, _check_boundaries),
    "long-window": TextProtocol("position", score_positions),
    "from-start": TextProtocol("position", score_from_start, beginning=DOCUMENTS),
}
PROTOCOLS = (*TEXT_PROTOCOLS, PASSKEY, RETRIEVAL)


def protocol_names(wanted: Sequence[str]) -> tuple[str, ...]:
    """The names in ``wanted`` or, for "all", all names, in the order of ``PROTOCOLS``.

    >>> protocol_names(("passkey", "chunks"))
    ('chunks', 'passkey')

    Raises:
      ValueError: an unknown name.
    """
    for name in wanted:
        if name not in (*PROTOCOLS, "all"):
            raise ValueError(
                f"{name!r} is no protocol; accepted: {', '.join(PROTOCOLS)}, or all of them: all"
            )
    return PROTOCOLS if "all" in wanted else tuple(p for p in PROTOCOLS if p in wanted)


# ---------------------------------------------------------------------------- planning


def plan_protocols(
    experiment: Experiment, data_fingerprint: str | None, wanted: Sequence[str] | None = None
) -> list[Protocol]:
    """The protocols that an experiment's ``evaluate`` section asks for, checked before any work.

    Args:
      data_fingerprint: of the token cache used in training; None for imported weights.
      wanted: names of ``PROTOCOLS``, or "all", in place of ``evaluate.protocols``. A protocol that
        cannot run is an error if named, and a warning if part of "all". "retrieval" without
        ``evaluate.retrieval_tasks`` means all tasks that fit.

    Raises:
      ValueError: an unknown protocol, a length that the position embedding or a protocol does not
        allow, or another token cache than in training.
    """
    settings = experiment.evaluate
    asked = settings.protocols if wanted is None else wanted
    names = protocol_names(asked)
    text_names = [name for name in names if name in TEXT_PROTOCOLS]
    multiples = settings.lengths if text_names else ()
    contexts = context_lengths(experiment, multiples, "evaluate.lengths")
    multiples = settings.passkey_lengths if len(names) > len(text_names) else ()
    trial_contexts = context_lengths(experiment, multiples, "evaluate.passkey_lengths")
    caches = {name: open_cache(experiment.data, name) for name in settings.splits or ("train",)}
    cache = next(iter(caches.values()))
    if data_fingerprint is not None and cache.fingerprint != data_fingerprint:
        raise ValueError(
            f"the model was trained on a token cache with fingerprint {data_fingerprint}, but the "
            f"one in {experiment.data.cache_dir} has {cache.fingerprint}: its corpus or tokenizer "
            "has changed, and its tokens mean something else to the model"
        )
    tokenizer = cache.tokenizer
    check_vocabulary(tokenizer.vocab_size, experiment.model)
    bos = find_bos(tokenizer, settings.bos_token) if settings.add_bos_token else None

    # (label, is_required, make) of each protocol, in order.
    planned: list[tuple[str, bool, Callable[[], Protocol]]] = []
    texts = {name: caches[name] for name in settings.splits}
    held_out = [read_held_out(source, tokenizer, experiment.data) for source in settings.texts]
    texts |= {text.split: text for text in held_out}
    for split, text in texts.items() if contexts else ():
        for name in text_names:
            make = functools.partial(_text_protocol, name, experiment, text, split, contexts, bos)
            if _num_windows(name, settings):
                planned.append((f"{name} ({split})", name in asked, make))
            elif name in asked and wanted is not None:
                raise ValueError(
                    f"protocol {name} is asked for, but this run's configuration has "
                    "evaluate.num_windows or evaluate.position_windows = 0, none of its windows"
                )
    if trial_contexts and settings.passkey_trials and settings.passkey_depths:
        tasks = [(PASSKEY, name, True) for name in settings.passkey_templates if PASSKEY in names]
        if RETRIEVAL in names and (settings.retrieval_tasks or wanted is None):
            tasks += [(RETRIEVAL, name, True) for name in settings.retrieval_tasks]
        elif RETRIEVAL in names:
            tasks += [(RETRIEVAL, name, False) for name in TASKS if name != PASSKEY]
        for kind, name, is_required in tasks:
            make = functools.partial(
                _trial_protocol, kind, name, experiment, cache, trial_contexts, bos
            )
            planned.append((f"{kind} ({name})", is_required, make))

    protocols = []
    for label, is_required, make in planned:
        try:
            protocols.append(make())
        except ValueError as error:
            if is_required:
                raise
            log.warning("%s is left out: %s", label, error)
    return protocols


def _num_windows(name: str, config: EvaluateConfig) -> int:
    """Windows, blocks or documents of a text protocol; 0 leaves it out."""
    return config.num_windows if name == "same-tokens" else config.position_windows


def _text_protocol(
    name: str, experiment: Experiment, cache: Any, split: str, contexts: list[int], bos: Bos | None
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

    def run(scorer: Scorer, progress: Progress) -> tuple[list[Row], Windows]:
        batching = {"batch_tokens": config.batch_tokens, "progress": progress}
        return score(scorer, cache, **settings, **batching, bos=bos and bos.id)

    identity = {"protocol": name, "split": split}
    recorded = settings | {"cache": cache.fingerprint}
    protocol = Protocol(kind, identity, recorded, run, bos=FIRST_TOKEN)
    return protocol.with_bos(bos, f"{beginning}; it is read and not scored")


def _trial_protocol(
    kind: str, name: str, experiment: Experiment, cache: Any, contexts: list[int], bos: Bos | None
) -> Protocol:
    """A protocol on trials; ValueError where a context is too short for them."""
    settings, tokenizer = experiment.evaluate, cache.tokenizer
    if kind == PASSKEY and name not in TEMPLATES:
        raise ValueError(
            f"evaluate.passkey_templates names {name!r}; accepted: {', '.join(TEMPLATES)}"
        )
    task: Task
    if kind == PASSKEY:
        task = Passkey.from_tokenizer(tokenizer, TEMPLATES[name])
    else:
        haystack = CorpusHaystack(cache) if settings.needle_haystack == "corpus" else None
        task = make_task(name, tokenizer, haystack)
    depths, trials = settings.passkey_depths, settings.passkey_trials
    grid = TrialGrid(contexts, depths, trials, TRIAL_SEED, bos and bos.id)
    check_trials(task, grid)

    def run(answerer: Answerer, progress: Progress) -> tuple[list[Row], None]:
        batch_tokens = settings.batch_tokens
        return score_task(
            answerer, task, tokenizer, grid, batch_tokens=batch_tokens, progress=progress
        ), None

    identity = {"protocol": kind, "template" if kind == PASSKEY else "task": name}
    recorded = {
        "contexts": list(contexts),
        "depths": list(depths),
        "trials": trials,
        "seed": TRIAL_SEED,
        "half": "test",
        **task.describe(),
    }
    protocol = Protocol(kind, identity, recorded, run, is_generative=True)
    return protocol.with_bos(bos, "every prompt begins with {}")
