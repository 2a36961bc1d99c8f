"""The rows of metrics.jsonl: is each there once, whole and in its place."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.doctor.findings import Check, Finding, some
from fope_jax.evaluate.metrics import METRICS


class Due(NamedTuple):
    """Where a run's train rows end: after so many updates, at saves, and at the ends of stages."""

    log_every: int
    save_every: int
    stops: tuple[int, ...]

    def after(self, step: int) -> int | None:
        """The step of the row that follows one of ``step``; None after the last.

        >>> due = Due(log_every=3, save_every=4, stops=(5, 10))
        >>> [due.after(step) for step in (0, 3, 4, 5, 9, 10)]
        [3, 4, 5, 6, 10, None]
        """
        if step >= self.stops[-1]:
            return None
        ends = [stop for stop in self.stops if stop > step]
        return min(*(step - step % n + n for n in (self.log_every, self.save_every)), *ends)


class Line(NamedTuple):
    """A line of a file: its number, its object or None, and whether it has an end."""

    number: int
    row: dict[str, Any] | None
    whole: bool
    text: bytes


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, those that cannot be read too."""
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        yield Line(number, row if isinstance(row, dict) else None, text.endswith(b"\n"), text)


def step_of(row: dict[str, Any]) -> int:
    """The step of a row; -1 where it has none."""
    step = row.get("step")
    return step if isinstance(step, int) else -1


def is_train(row: dict[str, Any] | None) -> bool:
    """Whether a line holds a train row with its step."""
    return row is not None and row.get("kind") == "train" and step_of(row) >= 0


_TRAINING = ("train", "validation")  # kinds of the rows that training writes


def _not_finite(row: dict[str, Any]) -> list[str]:
    return [key for key, x in row.items() if isinstance(x, float) and not math.isfinite(x)]


def check_metrics(run: Path, due: Due | None, newest: int | None, imported: bool = False) -> Check:
    """The rows of metrics.jsonl: whole, finite, each step once, none left out.

    Args:
      run: the directory.
      due: where train rows end; None does not look for rows that were left out.
      newest: step of the newest sound checkpoint.
      imported: whether its weights were trained elsewhere.
    """
    path = run / METRICS
    if not path.exists():
        findings = () if not newest else (Finding(f"{path} does not exist", "bring it back"),)
        return Check("metrics", "no rows", findings)
    findings = []

    def add(problem: str, advice: str, harmless: bool = False) -> None:
        findings.append(Finding(f"{path}: {problem}", advice, harmless))

    lines = list(read_lines(path))
    repair = f"fope doctor {run} --repair"
    bad = [line.number for line in lines if line.row is None and line.whole]
    if bad:
        add(f"no JSON object in line {some(bad)}", repair)
    if lines and lines[-1].row is None and not lines[-1].whole:
        add(f"line {lines[-1].number} was cut off", "nothing: the next row replaces it", True)
    rows = [line.row for line in lines if line.row is not None]
    again = f"fope evaluate --run {run} --force names the weights or documents it comes from"
    if imported:
        again += "; weights that are not finite have to be imported again from a sound checkpoint"
    for of_training, advice in ((True, "lower train.learning_rate"), (False, again)):
        numbers = [
            f"{line.number} ({key})"
            for line in lines
            if (row := line.row) and (row.get("kind") in _TRAINING) == of_training
            for key in _not_finite(row)
        ]
        if numbers:
            add(f"numbers that are not finite in line {some(numbers)}", advice)
    steps = [step_of(row) for row in rows if is_train(row)]
    twice = sorted(step for step, count in Counter(steps).items() if count > 1)
    if twice:
        add(f"several train rows of step {some(twice)}", repair)
    back = [b for a, b in itertools.pairwise(steps) if b < a]
    if back:
        add(f"train rows out of order at step {some(back)}", repair)
    if due is not None:
        _add_missing(add, sorted(set(steps)), due, newest or 0)
    later = sorted({step for row in rows if (step := step_of(row)) > (newest or 0)})
    if later:
        saved = f"the newest checkpoint, {newest}" if newest else "any checkpoint"
        told = f"rows of steps beyond {saved}: {some(later)}"
        add(told, "nothing: training again writes them again", harmless=True)
    summary = f"{len(rows):,} rows" + (f", train rows to step {max(steps):,}" if steps else "")
    return Check("metrics", summary, tuple(findings))


def _add_missing(add: Callable[..., None], steps: list[int], due: Due, newest: int) -> None:
    """Adds a finding where a train row is missing up to the newest checkpoint."""
    missing = []
    for before, step in itertools.pairwise([0, *steps]):
        expected = due.after(before)
        if expected is not None and step > expected:
            missing.append(f"after step {before}")
    last = steps[-1] if steps else 0
    if last < newest:
        missing.append(f"from step {last} to the checkpoint {newest}")
    if missing:
        add(
            f"train rows are missing {some(missing)} (one every {due.log_every} steps)",
            "bring the file back from a copy; nothing else has these numbers. Where train.log_every"
            " was larger then, nothing is missing",
        )
