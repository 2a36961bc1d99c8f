"""Does a run's spectrum predict its length generalization? A correlation over the runs of a report.

Each run is a point: a number of its spectrum, and its generalization gap on the same tokens

    gap = loss at the longest context - loss at the training length      (nats per token)

Pearson's r and Spearman's rho have 95% bootstrap intervals. Whole variants are resampled, because
seeds of one variant are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fope_jax.report.comparison import context_of, run_labels
from fope_jax.report.plots import legend_below, new_figure
from fope_jax.report.rows import Row, Run
from fope_jax.report.styles import Style
from fope_jax.report.sums import add_up, group
from fope_jax.report.tables import EMPTY, Table, format_loss, table_of_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 10_000
LEAST_VARIANTS = 4  # with fewer, most draws repeat the same one or two
SEED = 0


class Measure(NamedTuple):
    """A number of a run's spectrum: the mean of ``fields`` over layers and heads."""

    name: str
    fields: tuple[str, ...]
    is_pooled: bool  # weights heads by profile energy: one that ignores distance says little
    is_beyond: bool  # at the longest measured context, else at the training length


MEASURES = (
    Measure("logits' leakage ratio", ("leakage",), True, False),
    Measure("leakage ratio of q and k", ("q_leakage", "k_leakage"), False, False),
    Measure("undertrained energy", ("undertrained_energy",), False, False),
    Measure("energy under the floor, longest context", ("floor_energy",), True, True),
)


class Point(NamedTuple):
    """One run; numbers by ``Measure.name``, None where the method has no frequencies."""

    label: str
    seed: int
    gap: float | None  # nats per token; None without losses at both lengths
    numbers: dict[str, float | None]
    before: dict[str, float | None]  # of the untrained parameters
    trained_at: int  # step; 0: only the untrained parameters were measured


class Correlation(NamedTuple):
    """A correlation over runs; NaN where a number is constant or runs are too few."""

    pearson: float
    pearson_interval: tuple[float, float]
    spearman: float
    spearman_interval: tuple[float, float]
    runs: int
    variants: int


# ---------------------------------------------------------------------------- numbers


def spectrum_points(runs: Sequence[Run]) -> list[Point]:
    """The runs with rows of kind "spectrum", at the newest measured step."""
    labels, points = run_labels(runs), []
    unmeasured: dict[str, float | None] = {measure.name: None for measure in MEASURES}
    for run in runs:
        by_step = group(run.of("spectrum"), lambda row: row["step"])
        if by_step:
            step = max(by_step)
            numbers = _spectrum_numbers(run, by_step[step]) if step else unmeasured
            before = _spectrum_numbers(run, by_step[0]) if 0 in by_step else unmeasured
            gap = generalization_gap(run, by_step[step][0]["split"])
            points.append(Point(labels[run.path], run.seed, gap, numbers, before, step))
    return points


def generalization_gap(run: Run, split: str) -> float | None:
    """Loss at the longest context minus at the training length, nats/token.

    None without both, and where it is not finite.
    """
    scored = ("same-tokens", split)
    rows = [row for row in run.of("perplexity") if (row["protocol"], row["split"]) == scored]
    losses = {context: add_up(pool).loss() for context, pool in group(rows, context_of).items()}
    longest = max(losses, default=0)
    if run.training_length not in losses or longest == run.training_length:
        return None
    gap = losses[longest] - losses[run.training_length]
    return gap if math.isfinite(gap) else None


def _spectrum_numbers(run: Run, rows: Sequence[Row]) -> dict[str, float | None]:
    by_context = group(rows, context_of)
    within = run.training_length if run.training_length in by_context else min(by_context)
    numbers: dict[str, float | None] = {}
    for measure in MEASURES:
        total = weights = 0.0
        for row in by_context[max(by_context) if measure.is_beyond else within]:
            for values in (row[name] for name in measure.fields if row[name] is not None):
                values = values if isinstance(values, list) else [values]
                heads = row["profile_energy"] if measure.is_pooled else [1.0] * len(values)
                for value, weight in zip(values, heads, strict=True):
                    if value is not None:
                        total, weights = total + weight * value, weights + weight
        numbers[measure.name] = total / weights if weights else None
    return numbers


def correlate(x: Sequence[float], y: Sequence[float], variants: Sequence[str]) -> Correlation:
    """Correlations over runs, with bootstrap intervals (NaN below ``LEAST_VARIANTS`` variants)."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    names = sorted(set(variants))
    groups = [np.flatnonzero(np.asarray(variants) == name) for name in names]
    intervals = [(math.nan, math.nan)] * 2
    if len(names) >= LEAST_VARIANTS:
        rng = np.random.default_rng(SEED)
        drawn = [
            np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))])
            for _ in range(DRAWS)
        ]
        same_size: dict[int, list[np.ndarray]] = {}  # variants may differ in seeds
        for runs in drawn:
            same_size.setdefault(len(runs), []).append(runs)
        for index, coefficient in enumerate((pearson, spearman)):
            stacks = map(np.stack, same_size.values())
            values = np.concatenate([coefficient(xs[runs], ys[runs]) for runs in stacks])
            known = values[np.isfinite(values)]
            if len(known):
                low, high = np.percentile(known, [2.5, 97.5])
                intervals[index] = (float(low), float(high))
    return Correlation(
        float(pearson(xs, ys)),
        intervals[0],
        float(spearman(xs, ys)),
        intervals[1],
        len(xs),
        len(names),
    )


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r over the last axis; NaN for fewer than three runs or a constant number.

    >>> pearson(np.array([1.0, 2.0, 4.0]), np.array([[2.0, 4.0, 8.0], [8.0, 4.0, 0.0]])).round(3)
    array([ 1.   , -0.982])
    """
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    sizes = np.sqrt(np.sum(x**2, -1) * np.sum(y**2, -1))
    is_known = (sizes > 0) & (x.shape[-1] >= 3)
    return np.sum(x * y, -1) / np.where(is_known, sizes, math.nan)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho: Pearson's r of the ranks; ties share their mean rank."""
    from scipy.stats import rankdata  # slow to import

    return pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def _pairs(points: Sequence[Point], name: str) -> list[tuple[Point, float, float]]:
    pairs = ((point, point.numbers[name], point.gap) for point in points)
    return [(point, x, gap) for point, x, gap in pairs if x is not None and gap is not None]


# ---------------------------------------------------------------------------- shown


def run_table(points: Sequence[Point]) -> Table:

    def change(before: float | None, after: float | None) -> str:
        last = EMPTY if after is None else format_loss(after)
        return last if before is None else f"{format_loss(before)} → {last}"

    records = [
        (
            point.label,
            {
                "seed": point.seed,
                "step": f"{point.trained_at:,}",
                "gap (nats/token)": EMPTY if point.gap is None else f"{point.gap:+.3f}",
                **{m.name: change(point.before[m.name], point.numbers[m.name]) for m in MEASURES},
            },
        )
        for point in points
    ]
    note = "untrained → trained; - where the method has no frequencies, or was not measured"
    return table_of_records("Spectra and generalization gap, a run a row", "variant", records, note)


def correlation_table(points: Sequence[Point]) -> Table:

    def signed(value: float) -> str:
        return EMPTY if math.isnan(value) else f"{value:+.2f}"

    def between(low: float, high: float) -> str:
        return EMPTY if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"

    table = Table(
        "Correlation with the generalization gap, over runs",
        "number",
        ["Pearson's r", "95% interval", "Spearman's rho", "95% interval", "runs", "variants"],
        note=f"intervals: bootstrap over variants, from {LEAST_VARIANTS} variants on",
    )
    for measure in MEASURES:
        cells = [EMPTY] * 4 + ["0", "0"]
        if pairs := _pairs(points, measure.name):
            measured, x, gaps = zip(*pairs, strict=True)
            result = correlate(x, gaps, [point.label for point in measured])
            pearson_cells = [signed(result.pearson), between(*result.pearson_interval)]
            spearman_cells = [signed(result.spearman), between(*result.spearman_interval)]
            cells = [*pearson_cells, *spearman_cells, str(result.runs), str(result.variants)]
        table.rows.append((measure.name, cells))
    return table


def correlation_figure(points: Sequence[Point], styles: dict[str, Style]) -> Figure:
    figure, panels = new_figure(10.0, 7.4, 2, 2, sharey=True)
    gaps = [point.gap for point in points if point.gap is not None]
    # A failed run would squeeze the others into a line, so it is named in the title.
    limit = 5 * float(np.median(np.abs(gaps))) if len(gaps) > 3 else math.inf
    handles: dict[str, Any] = {}
    for axes, measure in zip(panels, MEASURES, strict=True):
        above = []
        for point, x, gap in _pairs(points, measure.name):
            color, marker, _ = styles[point.label]
            (handles[point.label],) = axes.plot(
                x, gap, linestyle="none", marker=marker, color=color, markersize=7
            )
            if gap > limit:
                above.append(f"{point.label} {gap:+.2g}")
        if above:
            axes.set_title("above: " + ", ".join(above), fontsize=8, loc="right")
        axes.axhline(0, color="#999999", linewidth=1, zorder=0)
        axes.set_xlabel(measure.name)
    for axes in panels[::2]:
        axes.set_ylabel("loss at the longest context\n- at the training length (nats/token)")
    drawn = [gap for gap in gaps if gap <= limit]
    if len(drawn) < len(gaps):
        room = 0.06 * (max(drawn) - min(drawn))
        panels[0].set_ylim(min(drawn) - room, max(drawn) + 2 * room)
    names = [label for label in styles if label in handles]
    legend_below(figure, [handles[label] for label in names], names)
    return figure
