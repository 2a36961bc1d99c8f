"""Where each run's time went, and its goodput: the share of wall time spent in steps."""

from __future__ import annotations

from collections.abc import Sequence

from fope_jax.report.provenance import run_titles
from fope_jax.report.rows import Run
from fope_jax.report.tables import EMPTY, Table

PHASES = ("start", "compile", "restore", "data", "step", "save", "validation", "evaluation", "lost")


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Seconds by phase over all starts of a run; phases that begin with "evaluat" are pooled."""
    seconds: dict[str, float] = {}
    for row in run.of("time"):
        phase = "evaluation" if row["phase"].startswith("evaluat") else row["phase"]
        seconds[phase] = seconds.get(phase, 0.0) + row["seconds"]
    return seconds


def goodput_table(runs: Sequence[Run]) -> Table:
    """Seconds and shares by phase, one row for each run with timed steps."""
    runs_seconds = dict(zip(run_titles(runs), map(seconds_by_phase, runs), strict=True))
    runs_seconds = {title: seconds for title, seconds in runs_seconds.items() if "step" in seconds}
    measured = {phase for seconds in runs_seconds.values() for phase in seconds}
    phases = [*(p for p in PHASES if p in measured), *sorted(measured - set(PHASES))]
    rows = []
    for title, seconds in runs_seconds.items():
        total = sum(seconds.values())
        cells = [
            f"{seconds[phase]:,.1f} ({seconds[phase] / (total or 1.0):.1%})"
            if phase in seconds
            else EMPTY
            for phase in phases
        ]
        goodput = f"{seconds['step'] / total:.1%}" if total else EMPTY
        rows.append((title, [*cells, f"{total:,.1f}", goodput]))
    note = (
        "goodput is the share of steps that were kept; lost is what a killed process had done "
        "after its last checkpoint"
    )
    columns = [*phases, "total", "goodput"]
    return Table("Where the time went (seconds, share)", "run", columns, rows, note)
