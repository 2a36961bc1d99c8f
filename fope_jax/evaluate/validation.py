"""Validation loss during training: protocol ``same-tokens`` on a few windows.

Rows have the kind ``validation``: `fope evaluate` scores more tokens; a curve must not mix the two.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from fope_jax.config import Experiment
from fope_jax.data.manifest import CacheError
from fope_jax.evaluate.metrics import Row, non_finite_rows, row_ids
from fope_jax.evaluate.progress import no_progress
from fope_jax.evaluate.protocol_plan import plan_protocols, unstated_settings
from fope_jax.evaluate.protocols import Protocol
from fope_jax.evaluate.restore import evaluation_graphdef
from fope_jax.evaluate.run_data import RunData
from fope_jax.evaluate.scoring import Scorer, scorer_factory
from fope_jax.processes.signals import is_distributed
from fope_jax.report.results import SUMS

log = logging.getLogger(__name__)

VALIDATION = "validation"

Check = Callable[[], None]
ValidationFn = Callable[[int, Any, Any, Check], list[Row]]


def find_validation_fn(experiment: Experiment, data: RunData, mesh: Mesh) -> ValidationFn | None:
    """What ``train.evaluate_every`` asks for; see `make_validation_fn`.

    With "auto" it measures the shortest of ``evaluate.lengths``, and is None, with a line in the
    log, where that cannot be measured.
    """
    if experiment.train.evaluation_interval is None:
        return None
    if experiment.train.evaluate_every != "auto":
        return make_validation_fn(experiment, data, mesh)
    if experiment.data.corpus == "none":
        log.info("no validation loss during training: all rows are tasks, there is no text")
        return None
    lengths = tuple(sorted(experiment.evaluate.lengths)[:1])
    shortest = dataclasses.replace(experiment.evaluate, lengths=lengths)
    try:
        cheap = dataclasses.replace(experiment, evaluate=shortest)
        return make_validation_fn(cheap, data, mesh)
    except (ValueError, CacheError) as error:
        log.info("no validation loss during training: %s", error)
        return None


def make_validation_fn(experiment: Experiment, data: RunData, mesh: Mesh) -> ValidationFn:
    """Makes the function that evaluates a model during training.

    It scores ``evaluate.training_windows`` windows at each of ``evaluate.lengths`` and
    ``evaluate.splits``, and compiles once for all parameters.

    Returns:
      ``(step, params, constants, check) -> rows``: sums over documents for each split and context,
      and a row with the seconds. Scores that are not finite give a warning. ``check`` is called
      before and, in a single process, during each batch; what it raises ends the evaluation.

    Raises:
      ValueError: nothing to measure, no document for a window, or settings that
        ``plan_protocols`` refuses.
    """
    settings = experiment.evaluate
    few = dataclasses.replace(settings, num_windows=settings.training_windows, texts=())
    cheap = dataclasses.replace(experiment, evaluate=few)
    unstated = unstated_settings(settings, is_extension=data.is_extension)
    wanted = ("same-tokens",)
    protocols = plan_protocols(cheap, data, wanted, unstated) if few.num_windows else []
    if not protocols:
        raise ValueError(
            f"train.evaluate_every = {experiment.train.evaluate_every}, but there is nothing to "
            f"measure: evaluate.lengths = {settings.lengths}, evaluate.splits = {settings.splits}, "
            f"evaluate.training_windows = {settings.training_windows}; None turns it off"
        )
    make_scorer = scorer_factory(evaluation_graphdef(experiment), mesh)

    def validate(step: int, params: Any, constants: Any, check: Check) -> list[Row]:
        started, scorer = time.perf_counter(), _checking(make_scorer(params, constants), check)
        tokens_seen = step * experiment.train.batch_size * experiment.train.length
        ids = row_ids(experiment, step) | {"tokens_seen": tokens_seen}
        rows = [row for protocol in protocols for row in _sum_documents(protocol, ids, scorer)]
        if bad := sorted({row["context"] for row in non_finite_rows(rows)}):
            log.warning(
                "step %d: validation loss is not finite at %s tokens of context; the rows say so, "
                "and whether the run goes on is decided by its steps (train.on_bad_step = %s)",
                step,
                ", ".join(map(str, bad)),
                experiment.train.on_bad_step,
            )
        seconds = round(time.perf_counter() - started, 3)
        return [*rows, {"kind": "time", "phase": VALIDATION, "step": step, "seconds": seconds}]

    return validate


def _checking(scorer: Scorer, check: Check) -> Scorer:
    """``scorer`` that calls ``check`` while it waits: Python would handle no signal meanwhile."""

    def score(tokens: Any, targets: Any, index: Any = None) -> tuple[Any, Any]:
        check()
        scores = scorer(tokens, targets, index)
        # Processes must call ``check`` equally often, so several call it between batches only.
        arrays: list[Any] = (
            [] if is_distributed() else [x for x in scores if isinstance(x, jax.Array)]
        )
        while not all(x.is_ready() for x in arrays):
            check()
            time.sleep(0.005)
        return scores

    return score


def _sum_documents(protocol: Protocol, ids: Row, scorer: Scorer) -> Iterable[Row]:
    """The protocol's rows, summed over documents for each context."""
    sums: dict[int, Row] = {}
    for row in protocol.run(scorer, no_progress)[0]:
        context = row["context"]
        fields = {"kind": VALIDATION, **protocol.row_fields, **ids, "context": context}
        fields |= {"scored_per_window": row["scored_per_window"]} | dict.fromkeys(SUMS, 0)
        total = sums.setdefault(context, fields)
        for name in SUMS:
            total[name] += row[name]
    return sums.values()


def format_losses(rows: Iterable[Row]) -> str:
    """Nats per token by context: ``3.21 at 128, 3.40 at 256``."""
    return ", ".join(
        f"{row['nats'] / row['tokens']:.3f} at {row['context']}"
        for row in rows
        if row["kind"] == VALIDATION
    )
