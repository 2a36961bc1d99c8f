"""Scores of downstream tasks (`fope evaluate --tasks`): tables by length, and of the harness."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fope_jax.report.comparison import run_labels
from fope_jax.report.rows import Row, Run
from fope_jax.report.summary import summarize
from fope_jax.report.sums import group, spread
from fope_jax.report.tables import EMPTY, Table

LM_EVAL = "lm-eval"
OVER_ITEMS = "± is the standard error over items"
OF_MODEL = ("position", "tokenizer")  # settings in which compared runs may differ
LENGTHS: Mapping[str, tuple[str, str]] = {
    "words": ("by words of context and question", "words"),
    "multiples": ("by tokens of the prompt in training lengths", "training lengths"),
}


@dataclass(frozen=True)
class TaskScores:
    """Rows of one task from runs that were asked the same.

    ``curves`` is label -> one list of rows a seed; ``settings`` those of its protocol.
    """

    benchmark: str
    name: str
    settings: dict[str, Any]
    curves: dict[str, list[list[Row]]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        rows = (row for seeds in self.curves.values() for rows in seeds for row in rows)
        return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def task_scores(runs: Sequence[Run]) -> list[TaskScores]:
    """The tasks that runs were asked; apart where items, prompts or lengths differ."""
    labels, tasks = run_labels(runs), {}
    for run in runs:
        for (benchmark, name), rows in group(
            run.of("task"), lambda row: (row["protocol"], row["task"])
        ).items():
            stated = [
                row["settings"]
                for row in run.of("protocol")
                if (row["protocol"], row.get("task")) == (benchmark, name)
            ]
            settings = stated[0] if stated else {}
            asked = {key: value for key, value in settings.items() if key not in OF_MODEL}
            asked["bos"] = rows[0].get("bos_token")
            key = (benchmark, name, json.dumps(asked, sort_keys=True))
            scores = tasks.setdefault(key, TaskScores(benchmark, name, settings))
            scores.curves.setdefault(labels[run.path], []).append(rows)
    return list(tasks.values())


def summarize_tasks(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Records of the rows of one run's tasks, with

      benchmark, task      such as "longbench" and "trec", or "ruler" and "recall"
      words, multiples     range of words of context and question, and of tokens of the prompt in
                           training lengths (from, below; None is open); None where a task has none
      metric, score        mean over the items, 0 to 1
      standard_error       of that mean over items; NaN for one item
      items, truncated     how many were asked, and how many of their prompts were cut

    >>> row = {"kind": "task", "protocol": "file", "task": "own", "total": 4, "truncated": 0}
    >>> record, = summarize_tasks([row | {"scores": {"f1": [3.0, 3.0]}, "multiples": [0, 1]}])
    >>> record["benchmark"], record["multiples"], record["score"], record["standard_error"]
    ('file', (0, 1), 0.75, 0.25)
    """
    records, rows = [], list(rows)
    for row in (row for row in rows if row["kind"] == "task"):
        same = {"benchmark": row["protocol"], "task": row["task"]}
        same |= {key: tuple(row[key]) if key in row else None for key in LENGTHS}
        for metric, (total, squares) in row["scores"].items():
            record = _record(metric, total, squares, row["total"], row["truncated"])
            records.append(same | record)
    for found in summarize(row for row in rows if row["kind"] == "retrieval"):
        same = {"benchmark": "ruler", "task": found["data"], "words": None}
        same["multiples"] = (found["multiple"], found["multiple"])
        right = found["accuracy"] * found["trials"]
        records.append(same | _record("accuracy", right, right, found["trials"], 0))
    return records


def _record(
    metric: str, total: float, squares: float, items: int, truncated: int
) -> dict[str, Any]:
    return {
        "metric": metric,
        "score": total / items,
        "standard_error": standard_error(total, squares, items) / 100,
        "items": items,
        "truncated": truncated,
    }


def task_tables(runs: Sequence[Run]) -> list[Table]:
    """For each task a table by words, where the benchmark counts them, and by training lengths.

    Tasks of lm-evaluation-harness have no lengths and share a table.
    """
    tasks = task_scores(runs)
    of_harness = [task for task in tasks if task.benchmark == LM_EVAL]
    tables = [_harness_table(of_harness)] if of_harness else []
    for task in tasks:
        if task not in of_harness:
            tables += [table for key in LENGTHS if (table := _length_table(task, key))]
    return tables


def _length_table(task: TaskScores, key: str) -> Table | None:
    """Scores in percent by ``words`` or ``multiples``; None where rows have none."""
    rows = [row for seeds in task.curves.values() for rows in seeds for row in rows]
    if not all(key in row for row in rows):
        return None
    ranges = sorted({tuple(row[key]) for row in rows}, key=lambda ends: ends[0])
    what, unit = LENGTHS[key]
    columns = [range_name(*ends) for ends in ranges] + ["all"] * (len(ranges) > 1)
    metrics, lines = task.metrics, []
    for label, seeds in task.curves.items():
        for metric in metrics:
            cells = [_cell(seeds, metric, lambda row, r=r: tuple(row[key]) == r) for r in ranges]
            name = label if len(metrics) == 1 else f"{label}: {metric}"
            whole = [_cell(seeds, metric)] if len(ranges) > 1 else []
            lines.append((name, [*cells, *whole]))
    title = f"{task.benchmark} {task.name}: {', '.join(metrics)} (%), {what}"
    return Table(title, unit, columns, lines, _note([task]))


def _harness_table(tasks: Sequence[TaskScores]) -> Table:
    """Rows are tasks and metrics; columns are variants."""
    labels = list(dict.fromkeys(label for task in tasks for label in task.curves))
    lines = [
        (f"{task.name}: {metric}", [_cell(task.curves.get(label, []), metric) for label in labels])
        for task in tasks
        for metric in task.metrics
    ]
    title = "Tasks of lm-evaluation-harness (%)"
    return Table(title, "task", labels, lines, _note(tasks))


def range_name(start: int, stop: int | None) -> str:
    """A range of lengths; thousands are written k.

    >>> range_name(0, 4000), range_name(8000, None), range_name(1, 2)
    ('0-4k', '8k+', '1-2')
    """

    def short(number: int) -> str:
        return f"{number // 1000}k" if number and number % 1000 == 0 else str(number)

    return f"{short(start)}+" if stop is None else f"{short(start)}-{short(stop)}"


def _cell(
    seeds: Iterable[Iterable[Row]], metric: str, wanted: Callable[[Row], bool] = lambda row: True
) -> str:
    """Mean in percent, and below it what it is uncertain by and the number of items.

    That is the deviation of several seeds; of one the standard error over its items.
    """
    means, error, total = [], math.nan, 0
    for rows in seeds:
        chosen = [row for row in rows if wanted(row) and metric in row["scores"]]
        count = sum(row["total"] for row in chosen)
        if count:
            total = count
            scores, squares = (
                math.fsum(row["scores"][metric][i] for row in chosen) for i in (0, 1)
            )
            means.append(100 * scores / total)
            error = standard_error(scores, squares, total)
    if not means:
        return EMPTY
    found = spread(means)
    error = found.deviation if found.count > 1 else error
    uncertainty = "" if math.isnan(error) else f"± {error:.2f}, "
    return f"{found.mean:.2f}\n{uncertainty}{total:,} item{'s' if total > 1 else ''}"


def standard_error(total: float, squares: float, count: int) -> float:
    """Standard error of a mean in percent, from sums of scores and of squares; NaN for one item.

    >>> f"{standard_error(3.0, 3.0, 4):.1f}"
    '25.0'
    """
    if count < 2:
        return math.nan
    variance = max(0.0, squares - total**2 / count) / (count - 1)
    return 100 * math.sqrt(variance / count)


def _note(tasks: Sequence[TaskScores]) -> str:
    """What the ± is, which items were asked, and how many prompts were cut."""
    curves: dict[Hashable, list[list[Row]]] = {}
    for task in tasks:
        for label, seeds in task.curves.items():
            curves.setdefault(label, []).extend(seeds)
    counts = [len(seeds) for task in tasks for seeds in task.curves.values()]
    parts = ["± is the deviation over seeds" if max(counts) > 1 else OVER_ITEMS]
    if max(counts) > min(counts) == 1:
        parts[0] += f", with one seed {OVER_ITEMS.removeprefix('± is ')}"
    limits: dict[Hashable, set[int]] = {}
    for task in tasks:
        for label in task.curves:
            if (longest := task.settings.get("max_length")) is not None:
                limits.setdefault(label, set()).add(longest)
    for label, seeds in curves.items():
        cut = sum(row["truncated"] for rows in seeds for row in rows)
        total = sum(row["total"] for rows in seeds for row in rows)
        if cut:
            end = "beginning" if tasks[0].benchmark == LM_EVAL else "middle"
            of = "contexts" if end == "beginning" else f"of {total:,} prompts"
            longest = " or ".join(f"{limit:,}" for limit in sorted(limits.get(label, ())))
            longest = f" (longest {longest} tokens)" if longest else ""
            parts.append(f"{label}: {cut:,} {of} lost their {end}{longest}")
    return "; ".join(parts)
