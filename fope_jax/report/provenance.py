"""Where a run's numbers come from: configurations side by side, commit, versions, machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fope_jax.report.comparison import run_labels
from fope_jax.report.rows import Run
from fope_jax.report.tables import EMPTY, Table


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys.

    >>> flatten({"train": {"steps": 3}, "seed": 0})
    {'train.steps': 3, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def run_titles(runs: Sequence[Run]) -> list[str]:
    """A title for each run: its label, with the seed where a label has several runs."""
    names = [run_labels(runs)[run.path] for run in runs]
    titles = [
        f"{name}, seed {run.seed}" if names.count(name) > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]
    return [
        f"{title} ({run.path})" if titles.count(title) > 1 else title
        for title, run in zip(titles, runs, strict=True)
    ]


def config_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Configurations side by side: the keys in which runs differ, and the keys they share."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = {k: [json.dumps(c[k]) if k in c else EMPTY for c in flat] for k in keys}
    differing = [(key, cells) for key, cells in rows.items() if len(set(cells)) > 1]
    shared = [(key, cells[:1]) for key, cells in rows.items() if len(set(cells)) == 1]
    return (
        Table("Keys in which the runs differ", "key", run_titles(runs), differing),
        Table("Keys that all runs share", "key", ["value"], shared),
    )


def provenance_table(runs: Sequence[Run]) -> Table:
    """run.json and the times of each run, one column a run."""
    facts = [flatten(_facts(run) | run.info) for run in runs]
    keys = list(dict.fromkeys(key for own in facts for key in own))
    rows = [(key, [_fact(own.get(key)) for own in facts]) for key in keys]
    return Table(
        "Commit, versions, machine, size and times of each run", "fact", run_titles(runs), rows
    )


def _facts(run: Run) -> dict[str, Any]:
    times: dict[str, float] = {}
    for row in run.of("time"):  # a phase has a row for each time that it came
        name = f"{row['phase']} (s)"
        times[name] = round(times.get(name, 0.0) + row["seconds"], 3)
    return {"directory": str(run.path), "evaluated step": run.step, "time": times}


def _fact(value: Any) -> str:
    if value is None:
        return EMPTY
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or EMPTY
    return str(value)
