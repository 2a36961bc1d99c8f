"""Reads and replaces the rows of metrics.jsonl that evaluation writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fope_jax.storage.files import read_json_lines, write_text

if TYPE_CHECKING:
    from fope_jax.config import Experiment

METRICS = "metrics.jsonl"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file; none without a file. A last line that was cut off is left out.

    Raises:
      ValueError: another line is not a JSON object; names its number.
    """
    return [row for _, row in read_json_lines(path)] if path.exists() else []


def replace_rows(
    path: Path, replaced: Callable[[Row], bool], rows: Iterable[Mapping[str, Any]]
) -> int:
    """Replaces the rows for which ``replaced`` is true, all or nothing; returns how many they were.

    No other process may append meanwhile: its rows would be lost.
    """
    before = read_rows(path)
    kept = [row for row in before if not replaced(row)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in [*kept, *rows]))
    return len(before) - len(kept)


def row_ids(experiment: Experiment, step: int) -> Row:
    """The fields that all rows of an evaluation share."""
    train = experiment.train
    ids = {
        "variant": experiment.name,
        "seed": experiment.seed,
        "step": step,
        "training_length": train.length,
    }
    if train.position_range is not None:
        ids |= {"position_range": train.position_range, "position_draw": train.position_draw}
    return ids


def non_finite_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows whose sum of nats is not finite."""
    return [row for row in rows if not math.isfinite(row.get("nats", 0.0))]
