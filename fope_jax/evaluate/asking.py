"""The protocols that have a model write an answer: passkeys and retrieval tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fope_jax.config import Experiment
from fope_jax.data.bos import Bos
from fope_jax.data.retrieval import TASKS
from fope_jax.data.retrieval.base import Task
from fope_jax.data.retrieval.passkey import TEMPLATES, Passkey
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.retrieval.text_task import CorpusHaystack
from fope_jax.evaluate.answering import Answerer
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import Progress
from fope_jax.evaluate.protocol import Protocol
from fope_jax.evaluate.retrieval import Series, check_series, score_task

logger = logging.getLogger(__name__)

PASSKEY, RETRIEVAL = "passkey", "retrieval"
PASSKEY_SEED = 0  # one seed for all runs: every variant is asked for the same keys


def retrieval_protocols(
    experiment: Experiment,
    cache: Any,
    contexts: list[int],
    names: Sequence[str],
    asked: Sequence[str],
    bos: Bos | None = None,
) -> list[Protocol]:
    """A protocol for each passkey template and each retrieval task.

    Prompts begin with ``bos``, where there is one; it is one of a window's tokens. Where
    "retrieval" is asked for and the configuration names no task, all of them; what does not fit is
    an error where it is named there, and a warning otherwise.
    """
    settings, tokenizer = experiment.evaluate, cache.tokenizer
    if not (contexts and settings.passkey_trials and settings.passkey_depths):
        return []
    depths, trials = settings.passkey_depths, settings.passkey_trials
    series = Series(contexts, depths, trials, PASSKEY_SEED, bos and bos.id)
    protocols = []
    for name in settings.passkey_templates if PASSKEY in names else ():
        if name not in TEMPLATES:
            raise ValueError(
                f"evaluate.passkey_templates names {name!r}; accepted: {', '.join(TEMPLATES)}"
            )
        task = Passkey.from_tokenizer(tokenizer, TEMPLATES[name])
        identity = {"protocol": PASSKEY, "template": name}
        protocols.append(_task("passkey", identity, task, series, tokenizer, experiment, bos))
    tasks = settings.retrieval_tasks if RETRIEVAL in names else ()
    every = not tasks and RETRIEVAL in names and asked is not settings.protocols
    haystack = CorpusHaystack(cache) if settings.needle_haystack == "corpus" else None
    for name in [task for task in TASKS if task != PASSKEY] if every else tasks:
        identity = {"protocol": RETRIEVAL, "task": name}
        try:
            task = make_task(name, tokenizer, haystack)
            protocols.append(_task("retrieval", identity, task, series, tokenizer, experiment, bos))
        except ValueError as error:
            if not every:
                raise
            logger.warning("retrieval (%s) is left out: %s", name, error)
    return protocols


def _task(
    kind: str,
    identity: dict[str, str],
    task: Task,
    series: Series,
    tokenizer: Any,
    experiment: Experiment,
    bos: Bos | None,
) -> Protocol:
    check_series(task, series)
    stated = {
        "contexts": list(series.contexts),
        "depths": list(series.depths),
        "trials": series.trials,
        "seed": series.seed,
        "half": "test",
        **task.describe(),
    }

    def run(answerer: Answerer, progress: Progress) -> tuple[list[Row], None]:
        batch_tokens = experiment.evaluate.batch_tokens
        rows = score_task(
            answerer, task, tokenizer, series, batch_tokens=batch_tokens, progress=progress
        )
        return rows, None

    if bos is None:
        return Protocol(kind, identity, stated, run, answers=True)
    return Protocol(
        kind,
        identity,
        stated | {"bos_token": bos.token},
        run,
        answers=True,
        bos=f"every prompt begins with {bos.token}",
        bos_token=bos.token,
    )
