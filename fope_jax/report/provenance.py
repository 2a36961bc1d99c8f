"""Provenance of a run's numbers: configuration, commit, versions, machine and times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fope_jax.report.comparison import run_labels
from fope_jax.report.rows import Run, flatten
from fope_jax.report.tables import EMPTY, Table


def run_titles(runs: Sequence[Run]) -> list[str]:
    """A unique title for each run: its label, then seed and path where needed."""
    labels = [run_labels(runs)[run.path] for run in runs]
    titles = [
        f"{label}, seed {run.seed}" if labels.count(label) > 1 else label
        for label, run in zip(labels, runs, strict=True)
    ]
    return [
        f"{title} ({run.path})" if titles.count(title) > 1 else title
        for title, run in zip(titles, runs, strict=True)
    ]


def config_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """The keys in which configurations differ, and those they share."""
    configs = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = {k: [json.dumps(c[k]) if k in c else EMPTY for c in configs] for k in keys}
    differing = [(key, cells) for key, cells in rows.items() if len(set(cells)) > 1]
    shared = [(key, cells[:1]) for key, cells in rows.items() if len(set(cells)) == 1]
    title = "Keys in which the runs differ"
    return (
        Table(title, "key", run_titles(runs), differing, is_prose=True),
        Table("Keys that all runs share", "key", ["value"], shared, is_prose=True),
    )


def provenance_table(runs: Sequence[Run]) -> Table:
    columns = []
    for run in runs:
        seconds: dict[str, float] = {}
        for row in run.of("time"):  # a phase may have several rows
            name = f"{row['phase']} (s)"
            seconds[name] = round(seconds.get(name, 0.0) + row["seconds"], 3)
        facts = {"directory": str(run.path), "evaluated step": run.step, "time": seconds}
        columns.append(flatten(facts | run.info))
    keys = dict.fromkeys(key for facts in columns for key in facts)
    rows = [(key, [_fact_text(facts.get(key)) for facts in columns]) for key in keys]
    title = "Commit, versions, machine, size and times of each run"
    return Table(title, "fact", run_titles(runs), rows, is_prose=True)


def _fact_text(value: Any) -> str:
    if value is None:
        return EMPTY
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or EMPTY
    return str(value)
