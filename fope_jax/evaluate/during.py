"""The same tokens at every length, scored while a model is being trained.

Protocol ``same-tokens`` of `fope evaluate` with few windows, on the parameters as they are. Its
rows have a kind of their own, ``validation``: `fope evaluate` scores more tokens, and the two are
no points of one curve.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import Mesh

from fope_jax.config import Experiment
from fope_jax.data.cache import open_cache
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import plain
from fope_jax.evaluate.run import Protocol, evaluation_graphdef, plan
from fope_jax.evaluate.scoring import scorer_maker
from fope_jax.evaluate.windows import place_windows

VALIDATION = "validation"
_SUMS = ("nats", "tokens", "bytes", "correct")

Measure = Callable[[int, Any, Any], list[Row]]


def during_training(experiment: Experiment, data_fingerprint: str, mesh: Mesh) -> Measure:
    """What measures a model in the loop of its training.

    At each length of ``evaluate.lengths``, ``evaluate.training_windows`` windows of each of
    ``evaluate.splits``, placed as those of `fope evaluate` are. No program is compiled again when
    the parameters change.

    Args:
      experiment: of the run.
      data_fingerprint: of the token cache of training.
      mesh: that the arrays lie over.

    Returns:
      (step, params, constants) -> rows: one for each split and context with sums over the
      documents, and one with the seconds it took. Every process gets the same numbers.

    Raises:
      ValueError: nothing to measure, no document for the longest window, or the ``evaluate``
        section asks for what cannot be, see ``evaluate.run.plan``.
    """
    settings = experiment.evaluate
    few = dataclasses.replace(settings, num_windows=settings.training_windows, texts=())
    cheap = dataclasses.replace(experiment, evaluate=few)
    protocols = plan(cheap, data_fingerprint, ("same-tokens",)) if few.num_windows else []
    if not protocols:
        raise ValueError(
            f"train.evaluate_every = {experiment.train.evaluate_every}, but there is nothing to "
            f"measure: evaluate.lengths = {settings.lengths}, evaluate.splits = {settings.splits}, "
            f"evaluate.training_windows = {settings.training_windows}; None turns it off"
        )
    for protocol in protocols:  # here, not at the first evaluation of a run that has begun
        asked = protocol.settings
        documents = open_cache(experiment.data, protocol.identity["split"]).documents
        for context in (min(asked["contexts"]), max(asked["contexts"])):
            place_windows(
                documents, longest=context, scored=asked["scored"], total=asked["num_windows"]
            )
    make_scorer = scorer_maker(evaluation_graphdef(experiment), mesh)
    tokens_an_update = experiment.train.batch_size * experiment.train.length

    def measure(step: int, params: Any, constants: Any) -> list[Row]:
        began, scorer = time.perf_counter(), make_scorer(params, constants)
        ids = {
            "variant": experiment.name,
            "seed": experiment.seed,
            "step": step,
            "training_length": experiment.train.length,
            "tokens_seen": step * tokens_an_update,
        }
        rows = [row for protocol in protocols for row in _pooled(protocol, ids, scorer)]
        seconds = round(time.perf_counter() - began, 3)
        return [*rows, {"kind": "time", "phase": VALIDATION, "step": step, "seconds": seconds}]

    return measure


def _pooled(protocol: Protocol, ids: Row, scorer: Any) -> Iterable[Row]:
    """The protocol's rows with the documents of each context added up."""
    contexts: dict[int, Row] = {}
    for row in protocol.run(scorer, plain)[0]:
        sums = contexts.setdefault(
            row["context"],
            {
                "kind": VALIDATION, **protocol.identity, **ids, "context": row["context"],
                "scored_per_window": row["scored_per_window"], "windows": 0,
            } | dict.fromkeys(_SUMS, 0),
        )  # fmt: skip
        for name in ("windows", *_SUMS):
            sums[name] += row[name]
    return contexts.values()


def told(rows: Iterable[Row]) -> str:
    """For people: ``3.21 at 128, 3.40 at 256``, nats a token by tokens of context."""
    return ", ".join(
        f"{row['nats'] / row['tokens']:.3f} at {row['context']}"
        for row in rows
        if row["kind"] == VALIDATION
    )
