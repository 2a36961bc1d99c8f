"""The gallery page: a figure of every position embedding, in one self-contained directory.

A figure's left panel shows the effect on attention against distance, the right one frequencies or
parameters.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fope_jax.extras import require
from fope_jax.report import plots
from fope_jax.report.html import (
    Details,
    Note,
    Part,
    Picture,
    Section,
    file_stem,
    make_output,
    write_page,
)
from fope_jax.report.styles import line_styles
from fope_jax.report.tables import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
INTRODUCTION = (
    "Every method and every scaling as it is before training, for a head of 64 dimensions. Left: "
    "what position alone does to attention, out to four times the training length (dashed line). "
    "For methods that turn q and k this is the expectation of q.k where all entries of q and k "
    "are independent with mean 1 and variance 1, for biases the bias itself, for vectors added to "
    "the token embeddings the cosine between two of them. Right: the period of each frequency in "
    "tokens, with the training length marked (a frequency above the line never completes a turn "
    "in training; a cross at the top marks one that never turns), or the numbers that each head "
    "owns."
)


def write_gallery(rows: Sequence[Row], out: str | Path) -> Path:
    """Writes index.html, figures and gallery.json into ``out``; returns the path of index.html.

    ``rows`` come from ``gallery.curves.gallery_row``. Raises ReportError if ``out`` is not
    writable.
    """
    out = make_output(out, "the gallery")
    (out / "gallery.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    overview = Picture(
        overview_figure(rows),
        "overview",
        "Small multiples of the curves that follow, one a method.",
        "All methods: attention against distance in tokens. Each panel has a vertical scale of "
        "its own.",
    )
    parts: list[Part] = [
        INTRODUCTION,
        Note("The numbers of all figures are in gallery.json."),
        Section("Overview", [overview]),
    ]
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        caption = f"{row['quantity']}, against distance in tokens{note}."
        picture = Picture(method_figure(row), file_stem(row["label"]), alt_text(row), caption)
        section: list[Part] = [Note(row["summary"]), picture]
        if row["others"]:
            section.append(Details("Further variables of the first layer", row["others"]))
        parts.append(Section(row["label"], section))
    return write_page(out, "Position embeddings: a gallery", parts)


def alt_text(row: Row) -> str:
    """The text alternative of a figure: each line at distance 0, L and the end."""
    length, lines = row["training_length"], []
    for line in row["lines"]:
        value = line["value"]
        at = [d for d in (0, length, len(value) - 1) if d < len(value)]
        ends = ", ".join(f"{format_number(value[d])} at {d:,}" for d in dict.fromkeys(at))
        lines.append(f"{line['label']}: {ends}")
    counts = [
        f"{sum(map(bool, s['values']))} frequencies ({s['label']}), {s['values'].count(0)} at zero"
        for s in row["frequencies"]
    ]
    return f"{row['quantity']}, by distance in tokens. {'; '.join([*lines, *counts])}."


# ---------------------------------------------------------------------------- figures


def method_figure(row: Row) -> Figure:
    figure, (left, right) = plots.new_figure(10.0, 4.2, 1, 2, width_ratios=[1.35, 1])
    _draw_curves(left, row)
    left.set_ylabel(row["quantity"])
    left.set_xlabel("distance from query to key (tokens)")
    plots.mark_length(left, row["training_length"])
    handles, labels = left.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 2 if len(labels) > 5 else 1
        left.legend(handles, labels, fontsize=8, handlelength=3.2, ncols=columns, framealpha=0.85)
    if row["frequencies"]:
        _draw_periods(right, row)
    else:
        _draw_parameters(right, row)
    figure.suptitle(row["label"], fontsize=12)
    return figure


def overview_figure(rows: Sequence[Row], columns: int = 4) -> Figure:
    """The left panels of all methods, as small multiples."""
    lines = math.ceil(len(rows) / columns)
    figure, panels = plots.new_figure(11.0, 0.6 + 1.75 * lines, lines, columns)
    for axes, row in zip(panels, rows, strict=False):
        axes.grid(False)
        _draw_curves(axes, row, is_small=True)
        length = row["training_length"]
        axes.axvline(length, color=plots.GREY, linewidth=1, linestyle=plots.DASHES, zorder=0)
        axes.set_title(row["label"], fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in panels[len(rows) :]:
        axes.axis("off")
    figure.supxlabel("distance from query to key (tokens); dashed: the training length", fontsize=9)
    figure.supylabel("E[q.k]/sqrt(H), bias or cosine, as in each method's own figure", fontsize=9)
    return figure


def _draw_curves(axes: Axes, row: Row, is_small: bool = False) -> None:
    lines, far = row["lines"], row["reach"] * row["training_length"]
    styles = line_styles(line["label"] for line in lines)
    for index, line in enumerate(lines):
        x = range(len(line["value"]))
        if "low" in line:
            grey = {"color": "#888888", "alpha": 0.3, "linewidth": 0}
            axes.fill_between(x, line["low"], line["high"], rasterized=True, **grey)
        style = styles[line["label"]]._asdict()
        if is_small or len(lines) == 1:
            style["marker"] = None
        start = index * len(x) // (10 * len(lines))  # stagger the markers of different lines
        axes.plot(
            x,
            line["value"],
            label=line["label"],
            linewidth=0.9 if is_small else 1.3,
            markersize=5,
            rasterized=True,  # vector curves of many points would bloat the page
            markevery=(start, max(1, len(x) // 10)),
            **style,
        )
    values = [value for line in lines for value in (*line["value"], *line.get("low", ()))]
    if max(values) - min(values) < 1e-3 * max(map(abs, values)):  # noise must not look like a curve
        axes.set_ylim(min(0, 1.5 * values[0]), max(0, 1.5 * values[0]))
    steps = [[abs(b - a) for a, b in itertools.pairwise(line["value"])] for line in lines]
    early = sum(sum(line_steps[: far // 10]) for line_steps in steps)
    if early > 0.95 * sum(map(sum, steps)) > 0:  # nearly all change in the first tenth
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks([0, *(2**k for k in range(0, far.bit_length(), 2))])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
    elif is_small:
        ticks = [0, row["training_length"], far]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(0, far)


def _draw_periods(axes: Axes, row: Row) -> None:
    length = row["training_length"]
    styles = line_styles(series["label"] for series in row["frequencies"])
    turning = [2 * math.pi / w for s in row["frequencies"] for w in s["values"] if w > 0]
    low, high = min(turning, default=1.0), max([*turning, length])
    top = high * (high / low) ** 0.12  # where zero frequencies, of infinite period, are drawn
    axes.set_yscale("log")
    axes.set_ylim(low / 1.6, top * 1.5)
    for series in row["frequencies"]:
        color, marker, _ = styles[series["label"]]
        periods = {i: 2 * math.pi / w for i, w in enumerate(series["values"]) if w > 0}
        still = [i for i, w in enumerate(series["values"]) if not w > 0]
        ends = [periods.get(i, top) for i in range(len(series["values"]))]
        axes.vlines(range(len(ends)), low / 1.6, ends, color="#bbbbbb", linewidth=0.8)
        style = {"linestyle": "none", "marker": marker, "color": color, "markersize": 4.5}
        axes.plot(list(periods), list(periods.values()), label=series["label"], **style)
        if still:
            style = {"linestyle": "none", "marker": "x", "color": "black", "markersize": 5}
            axes.plot(still, [top] * len(still), label=f"never turns ({len(still)})", **style)
    axes.axhline(length, color=plots.GREY, linewidth=1.2, linestyle=plots.DASHES)
    axes.annotate(
        f"training length {length:,}",
        (1, length),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=plots.DARK_GREY,
    )
    ticker = require("matplotlib.ticker", "train")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("index of the frequency")
    axes.set_ylabel("period (tokens)")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8, loc="lower right", framealpha=0.85)


def _draw_parameters(axes: Axes, row: Row) -> None:
    series = row["parameters"]
    if not series:
        axes.axis("off")
        text = "\n".join(row["others"]) or "no frequencies, no parameters"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=10)
        return
    styles = line_styles(line["label"] for line in series)
    heads = list(range(1, len(series[0]["values"]) + 1))
    for line in series:
        style = styles[line["label"]]._replace(linestyle=":")._asdict()
        axes.plot(heads, line["values"], label=line["label"], linewidth=0.9, **style)
    values = [value for line in series for value in line["values"]]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xticks(heads)
    axes.set_xlabel("head")
    axes.set_ylabel("parameters of the first layer")
    axes.legend(fontsize=8, framealpha=0.85)
