"""Tables of the rows, in Markdown: `python -m experiments.paper_scale tables`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.paper_scale.units import METHODS, TASKS
from fope_jax.report.markdown import markdown_table
from fope_jax.report.rows import Run, read_runs

SOLVED = 95.0  # percent right at the training length, of every seed: below, nothing is said beyond


class Curve(NamedTuple):
    """A method's percent of right answers on one task, by context, a dict a seed."""

    method: str
    updates: int
    training_length: int
    seeds: list[dict[int, float]]

    @property
    def contexts(self) -> list[int]:
        return sorted({context for seed in self.seeds for context in seed})

    @property
    def is_learned(self) -> bool:
        """Whether every seed solves the task at the training length."""
        return all(seed[self.training_length] >= SOLVED for seed in self.seeds)

    def at(self, context: int) -> list[float]:
        return [seed[context] for seed in self.seeds]

    def relative(self, context: int) -> list[float]:
        """Percent of what the same seed has at the training length."""
        return [100 * seed[context] / seed[self.training_length] for seed in self.seeds]


def read_results(directory: Path) -> list[Run]:
    """The runs that are there; ValueError if there is none."""
    paths = sorted(directory.glob("*.jsonl"))
    if not paths:
        raise ValueError(
            f"no rows in {directory}; python -m experiments.paper_scale run makes them"
        )
    return read_runs(paths)


def task_curves(runs: Iterable[Run], task: str) -> list[Curve]:
    """A curve for each method and number of updates, in the order of ``METHODS``."""
    curves: dict[tuple[str, int], Curve] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        rows = run.of("passkey") if task == "passkey" else run.of("retrieval")
        rows = [row for row in rows if row.get("task", "passkey") == task]
        sums: dict[int, list[int]] = {}
        for row in rows:
            found = sums.setdefault(row["context"], [0, 0])
            found[0] += row["correct"]
            found[1] += row["total"]
        updates = run.config["train"]["steps"]
        curve = Curve(run.variant, updates, run.training_length, [])
        curve = curves.setdefault((run.variant, updates), curve)
        curve.seeds.append({c: 100 * right / asked for c, (right, asked) in sums.items()})
    order = list(METHODS)
    return [curves[key] for key in sorted(curves, key=lambda k: (k[1], order.index(k[0])))]


def task_table(curves: Sequence[Curve]) -> str:
    """Percent right, mean over seeds with the lowest and highest.

    A method that has not learned the task at the training length has no numbers beyond it.
    """
    contexts = sorted({context for curve in curves for context in curve.contexts})
    rows = []
    for curve in curves:
        cells = []
        for context in contexts:
            is_shown = context <= curve.training_length or curve.is_learned
            cells.append(mean_and_range(curve.at(context)) if is_shown else "not learned")
        rows.append([curve.method, f"{curve.updates:,}", str(len(curve.seeds)), *cells])
    header = ["method", "updates", "seeds", *(f"{context:,}" for context in contexts)]
    return markdown_table(header, rows)


def mean_and_range(values: Sequence[float]) -> str:
    """
    >>> mean_and_range([50.0, 60.0]), mean_and_range([50.0])
    ('55 (50 to 60)', '50')
    """
    mean = f"{sum(values) / len(values):.0f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.0f} to {max(values):.0f})"


def all_tables(runs: Sequence[Run]) -> str:
    """A table for each task."""
    return "\n\n".join(
        f"## {task}, percent right by context\n\n{task_table(task_curves(runs, task))}"
        for task in TASKS
    )
