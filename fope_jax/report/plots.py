"""Figures of a report: charts and heatmaps drawn with matplotlib, readable without colour."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fope_jax.extras import require
from fope_jax.report.charts import Chart, Curve
from fope_jax.report.comparison import Comparison, check_comparable
from fope_jax.report.styles import Style
from fope_jax.report.sums import add_up, group
from fope_jax.report.tables import format_number, retrieval_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid = Literal["both", "x", "y", ""]
DASHES = (0, (2, 2))  # marks of the training length
GREY, DARK_GREY, PALE = "#555555", "#444444", "#b0b0b0"  # marks, their labels, curves behind
WIDTH, HEIGHT = 7.0, 4.3  # inches
DPI = 150
LEGEND_LINE = 0.21  # inches
TITLE_PAD = 20  # points: room for the label of the training length
END_LABEL = 8  # points
LABEL_LINE = 0.145  # inches, between labels at the ends of curves
AROUND = 1.3  # inches of a figure above and below its axes


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    grid: Grid = "both",
    **settings: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its styled panels; ``settings`` go to `Figure.subplots`."""
    matplotlib = require("matplotlib.figure", "train")
    figure = matplotlib.Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **settings).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        draw_grid(axes, grid)
    return figure, panels


def draw_grid(axes: Axes, grid: Grid) -> None:
    """A grid behind the curves, along "both" axes, "x" or "y", or none for ""."""
    if grid:
        axes.grid(True, axis=grid, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)


def mark(
    axes: Axes,
    x: float,
    text: str,
    xytext: tuple[float, float] = (-3, 3),
    *,
    y: float = 1,
    ha: str = "left",
    va: str = "bottom",
) -> None:
    """A dashed line at ``x``, labelled ``xytext`` points from the relative height ``y``."""
    axes.axvline(x, color=GREY, linewidth=1.2, linestyle=DASHES, zorder=0)
    axes.annotate(
        text,
        (x, y),
        xycoords=axes.get_xaxis_transform(),
        xytext=xytext,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=8.5,
        color=DARK_GREY,
    )


def mark_length(
    axes: Axes, length: int, xytext: tuple[float, float] = (-3, 3), y: float = 1
) -> None:
    """`mark` of the training length."""
    mark(axes, length, f"training length {length:,}", xytext, y=y)


def save_figure(figure: Figure, directory: Path, stem: str) -> tuple[Path, Path]:
    """Writes ``stem.png`` and ``stem.svg``; the same figure gives the same bytes."""
    matplotlib = require("matplotlib", "train")
    png, svg = directory / f"{stem}.png", directory / f"{stem}.svg"
    # Letters as text, and one name of their font, take a third of the bytes of letters as curves.
    small = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context({"svg.hashsalt": "fope", **small}):
        figure.savefig(png, dpi=DPI, metadata={"Software": None})
        figure.set_layout_engine("none")  # the layout stands, and takes half of the time
        figure.savefig(svg, dpi=DPI, metadata={"Date": None, "Creator": None})
    return png, svg


# ---------------------------------------------------------------------------- curves


def chart_figure(chart: Chart, styles: Mapping[str, Style]) -> Figure:
    """The chart as a picture: curves in colour or grey, each named at its end.

    It is as high as the names need.
    """
    height = max(HEIGHT, AROUND + LABEL_LINE * len(chart.curves))
    figure, (axes,) = new_figure(WIDTH, height)
    if chart.level is not None:
        axes.axhline(chart.level, color=GREY, linewidth=0.8, zorder=0)
    for label, curve in chart.curves.items():
        if label in chart.coloured:
            _draw_curve(axes, label, curve, styles[label], chart.is_dense)
        else:
            axes.plot(curve.x, curve.y, color=PALE, linewidth=1.0, zorder=1, gid=label)
    _x_axis(axes, chart)
    _y_axis(axes, chart)
    _title(figure, axes, chart)
    looks = {k: styles[k] if k in chart.coloured else None for k in chart.curves}
    end_labels(axes, chart.curves, looks, LABEL_LINE / (height - AROUND))
    return figure


def _draw_curve(axes: Axes, label: str, curve: Curve, style: Style, is_dense: bool) -> None:
    if curve.band is not None:  # edged in the curve's line style to differ without colour
        finite = [i for i, ends in enumerate(curve.band) if all(map(math.isfinite, ends))]
        axes.fill_between(
            [curve.x[i] for i in finite],
            [curve.band[i].low for i in finite],
            [curve.band[i].high for i in finite],
            facecolor=(style.color, 0.10),
            edgecolor=(style.color, 0.45),
            linestyle=style.linestyle,
            linewidth=0.8,
            zorder=1,
        )
    whiskers = None
    if curve.whiskers is not None:
        ends = zip(curve.y, curve.whiskers, strict=True)
        whiskers = np.asarray([(y - low, high - y) for y, (low, high) in ends]).T
    axes.errorbar(
        curve.x,
        curve.y,
        yerr=whiskers,
        capsize=3,
        label=label,
        linewidth=1.3 if is_dense else 1.6,
        markersize=5 if is_dense else 6,
        markevery=max(1, len(curve.x) // 8) if is_dense else None,
        **style._asdict(),
    )


def end_labels(
    axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Style | None], gap: float
) -> None:
    """Keys and names right of the axes, at the ends of the curves and at least ``gap`` apart."""
    axes.autoscale_view()  # sets the limits, which the transform needs
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {}
    for label, curve in curves.items():
        finite = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        if finite:
            ends[label] = to_axes.transform(finite[-1])
    heights = {label: min(max(float(y), 0.0), 1.0) for label, (_, y) in ends.items()}
    line: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for label, place in spread_out(heights, gap).items():
        (x, y), style = ends[label], looks[label]
        color = style.color if style else PALE
        axes.plot([x, 1.02], [heights[label], place], color=color, linewidth=0.6, **line)
        if style:
            axes.plot(
                [1.02, 1.055, 1.09],
                [place] * 3,
                markersize=5,
                markevery=[1],
                **style._asdict(),
                **line,
            )
        beyond = " ↑" if y > 1 else " ↓" if y < 0 else ""
        look = {"fontsize": END_LABEL, "color": "black" if style else GREY, "va": "center"}
        axes.text(1.1 if style else 1.025, place, no_math(label) + beyond, **look, **line)


def no_math(text: str) -> str:
    """Matplotlib takes what stands between two dollar signs for a formula.

    >>> no_math("a$b$")
    'a\\\\$b\\\\$'
    """
    return text.replace("$", "\\$")


def spread_out(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights from 0 to 1, moved so far that neighbours are ``gap`` apart, in the same order.

    >>> spread_out({"a": 0.5, "b": 0.5, "c": 1.0}, 0.25)
    {'a': 0.5, 'b': 0.75, 'c': 1.0}
    """
    labels = sorted(heights, key=lambda label: heights[label])
    places = [heights[label] for label in labels]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    top = max(1.0, gap * (len(places) - 1))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top - gap * (len(places) - 1 - i))
    return dict(zip(labels, places, strict=True))


# ---------------------------------------------------------------------------- by depth


def retrieval_title(comparison: Comparison) -> str:
    return "Passkey retrieval" if comparison.kind == "passkey" else "Retrieval"


def has_depths(comparison: Comparison) -> bool:
    return all(row["depth"] is not None for _, row in comparison.labelled_rows())


def depth_figure(comparison: Comparison) -> Figure:
    """A panel a variant; variants without one right answer are named below."""
    check_comparable(comparison)
    counted, name = retrieval_names(comparison)
    contexts = comparison.contexts
    solving = {
        label: seeds
        for label, seeds in comparison.curves.items()
        if any(row["correct"] for rows in seeds for row in rows)
    } or comparison.curves
    columns = min(4 if len(solving) > 4 else 2, len(solving))
    rows = math.ceil(len(solving) / columns)
    matplotlib = require("matplotlib.figure", "train")
    width, height = {1: (5.6, 2.5), 2: (WIDTH, 2.5)}.get(columns, (10.0, 2.0))
    figure = matplotlib.Figure(figsize=(width, 1.2 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels: list[Any] = list(grid.flat)
    for axes, (label, seeds) in zip(panels, solving.items(), strict=False):
        rows_of_label = (row for rows in seeds for row in rows)
        pools = group(rows_of_label, lambda row: (row["context"], row["depth"]))
        percent = {key: add_up(pool).accuracy() for key, pool in pools.items()}
        depths = sorted({depth for _, depth in percent})
        values = [[percent.get((c, d), math.nan) for c in contexts] for d in depths]
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=8)
        for y, x in np.argwhere(~np.isnan(values)):
            value = values[y][x]
            colour = "white" if value < 50 else "black"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        inside = sum(context <= comparison.training_lengths[label] for context in contexts)
        axes.axvline(inside - 0.5, color="white", linewidth=3.5)
        axes.axvline(inside - 0.5, color="black", linewidth=1.5, linestyle="--")
        axes.set_title(no_math(label), fontsize=10)
    for axes in panels[len(solving) :]:
        axes.axis("off")
    for axes in panels[len(solving) - columns : len(solving)]:  # the last of each column
        axes.tick_params(labelbottom=True)
    figure.colorbar(image, ax=panels, label=f"{counted} (%)", shrink=min(0.8, 1.6 / rows))
    figure.suptitle(
        f"{retrieval_title(comparison)} by length and depth, {name}\n"
        "left of the dashes: up to the training length",
        fontsize=11,
    )
    silent = [label for label in comparison.curves if label not in solving]
    none = f"\nno {counted} at any length: {', '.join(silent)}" if silent else ""
    figure.supxlabel(f"context length (tokens){none}", fontsize=10)
    figure.supylabel("depth (0: beginning, 1: end)", fontsize=10)
    return figure


# ---------------------------------------------------------------------------- axes


def _title(figure: Figure, axes: Axes, chart: Chart) -> None:
    """The title, and below it what was scored, what bars are and what is not in the picture."""
    captions = [chart.subtitle, chart.note.removesuffix(".")]
    if chart.outside:
        tops = (f"{label} (up to {format_number(top)})" for label, top in chart.outside.items())
        captions.append(f"Above the picture: {', '.join(tops)}")
    caption = ". ".join(filter(None, captions))
    figure.suptitle(no_math(chart.title), fontsize=11)
    axes.set_title(textwrap.fill(caption, 100), fontsize=7.5, color=DARK_GREY, pad=TITLE_PAD)


def _x_axis(axes: Axes, chart: Chart) -> None:
    """Logarithmic, with the training lengths marked."""
    axes.set_xlabel(chart.x_label)
    if not chart.ticks:
        axes.set_xscale("log")
        ticker = require("matplotlib.ticker", "train")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
        axes.minorticks_off()
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(chart.ticks, [f"{tick:,}" for tick in chart.ticks])
    axes.minorticks_off()
    if len(chart.lengths) == 1:
        mark_length(axes, chart.lengths[0])
        return
    for length in chart.lengths:  # full labels of neighbours would overlap
        mark(axes, length, f"{length:,}", (0, 3), ha="center")
    axes.set_xlabel(f"{chart.x_label}; dashed: training lengths")


def _y_axis(axes: Axes, chart: Chart) -> None:
    axes.set_ylabel(chart.y_label)
    if chart.is_log:
        values = [y for curve in chart.curves.values() for y in curve.y if math.isfinite(y)]
        ticker = require("matplotlib.ticker", "train")
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(values) < 300 * min(values) else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    if chart.limits:
        axes.set_ylim(*chart.limits)


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend under the figure, which grows with it so that the curves keep their height."""
    if not handles:
        return
    width, height = figure.get_size_inches()
    fitting = int(11 * width) // (max(map(len, names)) + 11)  # characters a line; 11 a handle
    columns = max(1, min(4, fitting, len(names)))
    lines = math.ceil(len(names) / columns)
    figure.set_size_inches(width, height + LEGEND_LINE * max(0, lines - 3))
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5
    )
