"""Figures of the rows: `python -m experiments.paper_scale figures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.paper_scale.tables import Curve, task_curves
from experiments.paper_scale.units import TASKS
from fope_jax.report import charts
from fope_jax.report.bootstrap import Interval
from fope_jax.report.plots import chart_figure, save_figure
from fope_jax.report.rows import Run
from fope_jax.report.styles import method_styles


def task_figure(task: str, curves: Sequence[Curve]) -> Any:
    """Percent of what a method finds at the training length, by context.

    Methods that have learned the task alone, the others are named above them.
    """
    shown = {}
    for curve in (curve for curve in curves if curve.is_learned):
        values = [curve.relative(context) for context in curve.contexts]
        means = [sum(each) / len(each) for each in values]
        ends = [Interval(min(each), max(each)) for each in values]
        shown[curve.method] = charts.Curve([*curve.contexts], means, ends)
    others = [curve.method for curve in curves if not curve.is_learned]
    chart = charts.Chart(
        title=f"{task}: of what is found at the training length",
        subtitle=f"not learned: {', '.join(others)}" if others else "",
        x_label="context (tokens)",
        y_label="% of that at the training length",
        curves=shown,
        coloured=list(shown),
        ticks=sorted({context for curve in curves for context in curve.contexts}),
        lengths=[curves[0].training_length],
        limits=(0.0, 105.0),
        note="Mean over seeds, error bars from the lowest to the highest.",
    )
    return chart_figure(chart, method_styles([curve.method for curve in curves]))


def write_figures(runs: Sequence[Run], directory: Path) -> list[Path]:
    """A figure for each task and number of updates, as PNG and SVG."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for task in TASKS:
        curves = task_curves(runs, task)
        for updates in sorted({curve.updates for curve in curves}):
            chosen = [curve for curve in curves if curve.updates == updates]
            figure = task_figure(task, chosen)
            written += save_figure(figure, directory, f"{task}-{updates}")
    return written
