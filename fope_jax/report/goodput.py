"""Where the time of each run went, and the share of it that trained: goodput."""

from __future__ import annotations

from collections.abc import Sequence

from fope_jax.report.provenance import run_titles
from fope_jax.report.rows import Run
from fope_jax.report.tables import EMPTY, Table

PHASES = ("start", "compile", "restore", "data", "step", "save", "evaluation", "lost")
EVALUATION = "evaluat"  # "evaluate same-tokens (validation)", "evaluation": all such phases


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Seconds of a run in each phase that it has rows of, over all its starts.

    A phase that is not in ``PHASES`` keeps its own name.
    """
    found: dict[str, float] = {}
    for row in run.of("time"):
        phase = "evaluation" if row["phase"].startswith(EVALUATION) else row["phase"]
        found[phase] = found.get(phase, 0.0) + row["seconds"]
    return found


def goodput(seconds: dict[str, float]) -> float | None:
    """The share of the time that went into steps whose work was kept; None without any time.

    >>> goodput({"start": 10.0, "step": 80.0, "lost": 10.0})
    0.8
    """
    total = sum(seconds.values())
    return seconds.get("step", 0.0) / total if total else None


def goodput_table(runs: Sequence[Run]) -> Table:
    """Seconds and shares by phase, one row a run that has trained with an account of its time."""
    accounts = {
        title: seconds_by_phase(run) for title, run in zip(run_titles(runs), runs, strict=True)
    }
    accounts = {title: seconds for title, seconds in accounts.items() if "step" in seconds}
    others = sorted({phase for own in accounts.values() for phase in own} - set(PHASES))
    phases = [
        phase for phase in (*PHASES, *others) if any(phase in own for own in accounts.values())
    ]
    rows = [
        (title, [*(_cell(own, phase) for phase in phases), *_sums(own)])
        for title, own in accounts.items()
    ]
    return Table(
        "Where the time went (seconds, share)",
        "run",
        [*phases, "total", "goodput"],
        rows,
        "goodput is the share of steps; lost is what a killed process had trained after its last "
        "checkpoint",
    )


def _cell(seconds: dict[str, float], phase: str) -> str:
    if phase not in seconds:
        return EMPTY
    return f"{seconds[phase]:,.1f} ({seconds[phase] / (sum(seconds.values()) or 1.0):.1%})"


def _sums(seconds: dict[str, float]) -> list[str]:
    share = goodput(seconds)
    return [f"{sum(seconds.values()):,.1f}", EMPTY if share is None else f"{share:.1%}"]
