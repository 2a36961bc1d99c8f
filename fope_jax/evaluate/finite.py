"""Where evaluation stops: weights or scores that are not finite, which no row may stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fope_jax.evaluate.metrics import Row
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.transformer import Transformer, split

_SHOWN = 3  # places named in a message; the count says how many there are


class NonFiniteError(FloatingPointError):
    """Weights, activations or scores hold NaN or an infinity."""


def check_weights(model: Transformer, where: str) -> None:
    """Raises NonFiniteError where an array of a model is not finite, naming each.

    Args:
      model: its arrays may lie over the devices of all processes.
      where: the checkpoint, for people.
    """
    _, params, constants = split(model)
    counts = count_non_finite(params) | count_non_finite(constants)
    if counts:
        raise NonFiniteError(
            f"{where}: weights that are not finite: {describe_non_finite(counts)}; no score of "
            "such a model means anything, and none was written. Name another checkpoint with "
            "--step, or bring weights in that are finite"
        )


def non_finite_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows whose sum of nats is not finite."""
    return [row for row in rows if not math.isfinite(row.get("nats", 0.0))]


def check_rows(rows: Iterable[Row], label: str, dtype: str) -> None:
    """Raises NonFiniteError where a score is not finite, naming its context and document.

    Args:
      rows: of one protocol, before they are written.
      label: the protocol, for people.
      dtype: of the model's activations.
    """
    bad = non_finite_rows(rows)
    if bad:
        raise NonFiniteError(
            f"{label}: scores are not finite at {_shown([_place(row) for row in bad])}, though all "
            f"weights are: activations or logits overflow there (model.dtype = {dtype}). Nothing "
            "of this protocol was written"
        )


def _place(row: Row) -> str:
    """For people: ``context 128, document 'Macbeth'``."""
    named: dict[str, Any] = {"document": repr(row.get("document")), "depth": row.get("depth")}
    parts = [f"{key} {named[key]}" for key in named if row.get(key) is not None]
    return ", ".join([f"context {row['context']}", *parts])


def _shown(places: Sequence[str]) -> str:
    places = list(dict.fromkeys(places))
    rest = len(places) - _SHOWN
    return "; ".join(places[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
