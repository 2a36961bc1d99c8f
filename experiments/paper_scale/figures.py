"""Figures of the rows: `python -m experiments.paper_scale figures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.paper_scale.tables import Curve, task_curves
from experiments.paper_scale.units import TASKS
from fope_jax.report.plots import legend_below, mark_length, new_figure, save_figure
from fope_jax.report.rows import Run
from fope_jax.report.styles import method_styles


def task_figure(task: str, curves: Sequence[Curve]) -> Any:
    """Percent of what a method finds at the training length, by context.

    The mean over seeds, with bars from the lowest to the highest; methods that have learned the
    task alone, the others are named in the title.
    """
    figure, (axes,) = new_figure(7.0, 4.3)
    styles, handles = method_styles([curve.method for curve in curves]), {}
    learned = [curve for curve in curves if curve.is_learned]
    for curve in learned:
        values = [curve.relative(context) for context in curve.contexts]
        means = [sum(each) / len(each) for each in values]
        bars = [
            [mean - min(each), max(each) - mean] for mean, each in zip(means, values, strict=True)
        ]
        style = styles[curve.method]._asdict()
        ends = list(zip(*bars, strict=True))
        handles[curve.method] = axes.errorbar(curve.contexts, means, yerr=ends, capsize=3, **style)
    others = [curve.method for curve in curves if not curve.is_learned]
    title = f"{task}: of what is found at the training length"
    axes.set_title(f"{title}; not learned: {', '.join(others)}" if others else title, fontsize=10)
    contexts = sorted({context for curve in curves for context in curve.contexts})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_ylim(0, 105)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("% of that at the training length")
    mark_length(axes, curves[0].training_length)
    legend_below(figure, list(handles.values()), list(handles))
    return figure


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
