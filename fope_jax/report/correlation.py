"""Do the spectra of a run tell how it generalizes to longer contexts? Over all runs of a report.

Each run is a point: a number of its spectrum within or beyond the training length, and its
generalization gap

    gap = loss at the longest context - loss at the training length      (nats per token)

of the same tokens. Pearson's r and Spearman's rho come with 95% bootstrap intervals. Variants are
drawn again, each with all its seeds: seeds of one variant are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from fope_jax.extras import require
from fope_jax.report import plots
from fope_jax.report.comparison import context_of, run_labels
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import add_up, group
from fope_jax.report.tables import EMPTY, Table, three

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 10_000
LEAST_VARIANTS = 4  # with fewer, most draws hold the same one or two over and over
SEED = 0


class Measure(NamedTuple):
    """A number of a run's spectrum.

    Attributes:
      name: for axes and tables.
      fields: of the rows of kind "spectrum" that it is the mean of, over layers and heads.
      pooled: heads weigh as much as the energy of their logits' profile: ratios of energies are
        then those of all heads together, and a head that ignores distance says little.
      beyond: taken at the longest measured context, else at the training length.
    """

    name: str
    fields: tuple[str, ...]
    pooled: bool
    beyond: bool


MEASURES = (
    Measure("logits' leakage ratio", ("leakage",), True, False),
    Measure("leakage ratio of q and k", ("q_leakage", "k_leakage"), False, False),
    Measure("undertrained energy", ("undertrained_energy",), False, False),
    Measure("energy under the floor, longest context", ("floor_energy",), True, True),
)


class Point(NamedTuple):
    """One run.

    Attributes:
      label: of its variant.
      seed: of the run.
      gap: nats per token; None where its loss was not measured at two lengths.
      numbers: by ``Measure.name``, after training; None where the method has no frequencies.
      before: the same of the untrained parameters; None where they were not measured.
      trained_at: the step, 0 where only the untrained parameters were measured.
    """

    label: str
    seed: int
    gap: float | None
    numbers: dict[str, float | None]
    before: dict[str, float | None]
    trained_at: int


class Correlation(NamedTuple):
    """Of two numbers over runs; NaN where one of them does not vary, or there are too few runs."""

    pearson: float
    pearson_interval: tuple[float, float]
    spearman: float
    spearman_interval: tuple[float, float]
    runs: int
    variants: int


# ---------------------------------------------------------------------------- numbers


def spectrum_points(runs: Sequence[Run]) -> list[Point]:
    """The runs that have rows of kind "spectrum"; of several steps the newest counts."""
    names, found = run_labels(runs), []
    for run in runs:
        by_step = group(run.of("spectrum"), lambda row: row["step"])
        if not by_step:
            continue
        newest = max(by_step)
        empty: dict[str, float | None] = {measure.name: None for measure in MEASURES}
        numbers = _numbers(run, by_step[newest]) if newest else empty
        before = _numbers(run, by_step[0]) if 0 in by_step else empty
        gap = generalization_gap(run, by_step[newest][0]["split"])
        found.append(Point(names[run.path], run.seed, gap, numbers, before, newest))
    return found


def generalization_gap(run: Run, split: str) -> float | None:
    """Loss at the longest context minus that at the training length, None without both.

    Of the protocol that scores the same tokens at every context, on the split that the spectra are
    of.
    """
    rows = [
        row
        for row in run.of("perplexity")
        if (row["protocol"], row["split"]) == ("same-tokens", split)
    ]
    losses = {context: add_up(own).loss for context, own in group(rows, context_of).items()}
    longest = max(losses, default=0)
    if run.training_length not in losses or longest == run.training_length:
        return None
    return losses[longest] - losses[run.training_length]


def _numbers(run: Run, rows: Sequence[Row]) -> dict[str, float | None]:
    contexts = {row["context"] for row in rows}
    inside = run.training_length if run.training_length in contexts else min(contexts)
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        context = max(contexts) if measure.beyond else inside
        own = [row for row in rows if row["context"] == context]
        found[measure.name] = _mean(own, measure)
    return found


def _mean(rows: Sequence[Row], measure: Measure) -> float | None:
    total = weights = 0.0
    for row in rows:
        for name in measure.fields:
            if row[name] is None:
                continue
            values = row[name] if isinstance(row[name], list) else [row[name]]
            heads = row["profile_energy"] if measure.pooled else [1.0] * len(values)
            for value, weight in zip(values, heads, strict=True):
                if value is not None:
                    total, weights = total + weight * value, weights + weight
    return total / weights if weights else None


def correlate(x: Sequence[float], y: Sequence[float], variants: Sequence[str]) -> Correlation:
    """Both correlations of ``x`` and ``y``, with intervals from drawing variants again.

    Args:
      x: a number of each run.
      y: another.
      variants: whose seed each run is.

    Returns:
      Intervals from the draws of which the correlation is defined, 2.5% to 97.5%; NaN with fewer
      than ``LEAST_VARIANTS`` variants.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    names = sorted(set(variants))
    groups = [np.flatnonzero(np.asarray(variants) == name) for name in names]
    none = (math.nan, math.nan)
    intervals = [none, none]
    if len(names) >= LEAST_VARIANTS:
        rng = np.random.default_rng(SEED)
        drawn = [
            np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))])
            for _ in range(DRAWS)
        ]
        intervals = [
            _interval([own(xs[runs], ys[runs]) for runs in drawn]) for own in (pearson, spearman)
        ]
    return Correlation(
        pearson(xs, ys), intervals[0], spearman(xs, ys), intervals[1], len(xs), len(names)
    )


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN of fewer than three runs, or where one number does not vary.

    >>> round(pearson(np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0])), 6)
    1.0
    """
    x, y = x - x.mean(), y - y.mean()
    sizes = np.sqrt(np.sum(x**2) * np.sum(y**2))
    return float(np.sum(x * y) / sizes) if len(x) >= 3 and sizes > 0 else math.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho: Pearson's r of the ranks, ties sharing their mean.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])), 6)
    1.0
    """
    return pearson(rankdata(x), rankdata(y))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    known = np.asarray(values)[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _pairs(found: Sequence[Point], name: str) -> list[tuple[Point, float, float]]:
    """Points with a gap and this number."""
    pairs = ((point, point.numbers[name], point.gap) for point in found)
    return [(p, x, gap) for p, x, gap in pairs if x is not None and gap is not None]


# ---------------------------------------------------------------------------- shown


def run_table(found: Sequence[Point]) -> Table:
    """Each run's numbers, before and after training."""
    table = Table(
        "Spectra and generalization gap, a run a row",
        "variant",
        ["seed", "step", "gap (nats/token)", *(measure.name for measure in MEASURES)],
        note="untrained → trained; - where the method has no frequencies, or was not measured",
    )
    for point in found:
        cells = [_cell(point.before[m.name], point.numbers[m.name], three) for m in MEASURES]
        gap = EMPTY if point.gap is None else f"{point.gap:+.3f}"
        table.rows.append((point.label, [str(point.seed), f"{point.trained_at:,}", gap, *cells]))
    return table


def _cell(before: float | None, after: float | None, show: Callable[[float], str]) -> str:
    last = EMPTY if after is None else show(after)
    return last if before is None else f"{show(before)} → {last}"


def correlation_table(found: Sequence[Point]) -> Table:
    """Correlation of each number with the generalization gap."""
    table = Table(
        "Correlation with the generalization gap, over runs",
        "number",
        ["Pearson's r", "95% interval", "Spearman's rho", "95% interval", "runs", "variants"],
        note=f"intervals: bootstrap over variants, from {LEAST_VARIANTS} variants on",
    )
    for measure in MEASURES:
        pairs = _pairs(found, measure.name)
        if not pairs:
            table.rows.append((measure.name, [EMPTY] * 4 + ["0", "0"]))
            continue
        own = correlate(
            [x for _, x, _ in pairs], [y for *_, y in pairs], [p.label for p, *_ in pairs]
        )
        cells = [
            _signed(own.pearson),
            _between(own.pearson_interval),
            _signed(own.spearman),
            _between(own.spearman_interval),
            str(own.runs),
            str(own.variants),
        ]
        table.rows.append((measure.name, cells))
    return table


def _signed(value: float) -> str:
    return EMPTY if math.isnan(value) else f"{value:+.2f}"


def _between(interval: tuple[float, float]) -> str:
    return EMPTY if math.isnan(interval[0]) else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def correlation_figure(found: Sequence[Point], styles: dict[str, plots.Style]) -> Figure:
    """The generalization gap against each number, a point a run."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(10.0, 7.4), layout="constrained")
    shown: dict[str, Any] = {}
    grid = figure.subplots(2, 2, sharey=True)
    gaps = [point.gap for point in found if point.gap is not None]
    limit = _off_the_chart(gaps)
    for axes, measure in zip(grid.flat, MEASURES, strict=True):
        for point, x, gap in _pairs(found, measure.name):
            look = styles[point.label]
            (shown[point.label],) = axes.plot(
                x, gap, linestyle="none", marker=look.marker, color=look.color, markersize=7
            )
        above = [
            f"{p.label} {gap:+.2g}" for p, _, gap in _pairs(found, measure.name) if gap > limit
        ]
        if above:
            axes.set_title("above: " + ", ".join(above), fontsize=8, loc="right")
        axes.axhline(0, color="#999999", linewidth=1, zorder=0)
        axes.set_xlabel(measure.name)
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss at the longest context\n- at the training length (nats/token)")
    drawn = [gap for gap in gaps if gap <= limit]
    if len(drawn) < len(gaps):
        room = 0.06 * (max(drawn) - min(drawn))
        grid[0, 0].set_ylim(min(drawn) - room, max(drawn) + 2 * room)
    named = [label for label in styles if label in shown]
    plots.legend_below(figure, [shown[label] for label in named], named)
    return figure


def _off_the_chart(gaps: Sequence[float]) -> float:
    """The gap above which a run is named in words: five times the usual one. One run that fails
    would press all others into a line.

    >>> _off_the_chart([0.1, 0.2, 0.3, 4.6])
    1.25
    """
    return 5 * float(np.median(np.abs(gaps))) if len(gaps) > 3 else math.inf
