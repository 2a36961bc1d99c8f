"""Figures of a report: matplotlib, one function a figure, readable without colour.

A label has one colour, marker and line style in all figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fope_jax.extras import require
from fope_jax.report.bootstrap import Interval
from fope_jax.report.comparison import TASK_FIELD, Comparison, check_comparable, run_labels
from fope_jax.report.lineage import tokens_before
from fope_jax.report.protocols import describe, has_bands, protocol_caption
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import Spread, Sums, add_up, group
from fope_jax.report.tables import format_number, format_percent, retrieval_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe palette, without the yellow that is invisible on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
DASHES = (0, (2, 2))  # marks of the training length
GREY, DARK_GREY = "#555555", "#444444"  # marks, and their labels
WIDTH, HEIGHT = 7.0, 4.3  # inches
LEGEND_LINE = 0.21  # inches
TITLE_PAD = 20  # points: room for the label of the training length

Curves = dict[str, dict[Any, Spread]]  # label -> x -> y
Bands = dict[str, dict[Any, Interval]]


class Style(NamedTuple):
    color: str
    marker: str
    linestyle: Any


def line_styles(names: Iterable[str]) -> dict[str, Style]:
    return {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its styled panels; ``settings`` go to `Figure.subplots`."""
    matplotlib = require("matplotlib.figure", "train")
    figure = matplotlib.Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **settings).flat)
    for axes in panels:
        style_axes(axes)
    return figure, panels


def style_axes(axes: Axes) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def mark_length(
    axes: Axes, length: int, text: str = "", xytext: tuple[float, float] = (-3, 3), ha: str = "left"
) -> None:
    """A dashed line at the training length, labelled ``xytext`` points from its upper end."""
    axes.axvline(length, color=GREY, linewidth=1.2, linestyle=DASHES, zorder=0)
    axes.annotate(
        text or f"training length {length:,}",
        (length, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=xytext,
        textcoords="offset points",
        ha=ha,
        va="bottom",
        fontsize=8.5,
        color=DARK_GREY,
    )


def save_figure(figure: Figure, directory: Path, stem: str) -> tuple[Path, Path]:
    """Writes ``stem.png`` and ``stem.svg``; the same figure gives the same bytes."""
    matplotlib = require("matplotlib", "train")
    png, svg = directory / f"{stem}.png", directory / f"{stem}.svg"
    with matplotlib.rc_context({"svg.hashsalt": "fope"}):
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


# ---------------------------------------------------------------------------- curves


def perplexity_figure(
    comparison: Comparison, styles: dict[str, Style], relative: bool = False
) -> Figure:
    """Perplexity by context, with bits per byte; ``relative``: over that at the training length."""
    check_comparable(comparison)
    figure, (axes,) = new_figure(WIDTH, HEIGHT)
    curves = comparison.spreads(Sums.perplexity, relative=relative)
    bands = {}
    if has_bands(comparison):
        bands = comparison.intervals(Sums.perplexity, relative=relative)
    _draw_bands(axes, bands, styles)
    outside = _off_the_chart(curves)
    _draw_curves(axes, curves, styles, without_whiskers=outside)
    if relative:
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    description = describe(comparison)
    _length_axis(axes, comparison.contexts, description.x)
    _mark_training_lengths(axes, comparison)
    _perplexity_axis(axes, curves, bands, outside)
    if relative:
        axes.set_ylabel("perplexity / that at the training length")
        title = "Perplexity relative to the training length"
    else:
        axes.set_ylabel("perplexity (per token)")
        _bits_axis(axes, comparison)
        title = description.title
    _title(figure, axes, comparison, f"{title}, {comparison.name} split", outside)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def position_figure(comparison: Comparison, styles: dict[str, Style]) -> Figure:
    """Loss against position in a long window, or since the document's start."""
    check_comparable(comparison)
    figure, (axes,) = new_figure(WIDTH, HEIGHT)
    if has_bands(comparison):
        _draw_bands(axes, comparison.intervals(Sums.loss, _bucket_centre), styles)
    _draw_curves(axes, comparison.spreads(Sums.loss, _bucket_centre), styles)
    longest, description = max(comparison.contexts), describe(comparison)
    ticks = [longest // 2**k for k in range(10, -1, -1) if longest // 2**k >= 1]
    _length_axis(axes, ticks, description.x)
    _mark_training_lengths(axes, comparison)
    axes.set_ylabel("loss (nats per token)")
    where = f"window of {longest:,} tokens, {comparison.name} split"
    _title(figure, axes, comparison, f"{description.title}, {where}")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _bucket_centre(row: Row) -> float:
    start, stop = row["bucket"]
    return math.sqrt(max(start, stop / 2) * stop)


def accuracy_figure(comparison: Comparison, styles: dict[str, Style]) -> Figure:
    check_comparable(comparison)
    counted, name = retrieval_names(comparison)
    figure, (axes,) = new_figure(WIDTH, HEIGHT)
    _draw_curves(axes, comparison.spreads(Sums.accuracy), styles)
    _length_axis(axes, comparison.contexts, "context length (tokens)")
    axes.set_ylim(-4, 104)
    _mark_training_lengths(axes, comparison)
    axes.set_ylabel(f"{counted} (%)")
    title = f"{retrieval_title(comparison)} against context length, {name}"
    axes.set_title(title, pad=TITLE_PAD)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def training_figure(runs: Sequence[Run], styles: dict[str, Style]) -> Figure:
    """Training loss against tokens seen, the parent's included, one line a run."""
    figure, (axes,) = new_figure(WIDTH, HEIGHT)
    labels, seen = run_labels(runs), set()
    for run in runs:
        rows, label = run.of("train"), labels[run.path]
        if rows:
            axes.plot(
                [tokens_before(run) + row["tokens_seen"] for row in rows],
                [row["loss"] for row in rows],
                label=label if label not in seen else None,
                linewidth=1.3,
                markersize=5,
                markevery=max(1, len(rows) // 8),
                **styles[label]._asdict(),
            )
            seen.add(label)
    axes.set_xscale("log")
    ticker = require("matplotlib.ticker", "train")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    axes.minorticks_off()
    axes.set_xlabel("tokens seen (k: thousand, M: million, G: billion)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title("Training loss")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_bands(axes: Axes, bands: Bands, styles: dict[str, Style]) -> None:
    """Intervals as bands, edged in the curve's line style to differ without colour."""
    for label, band in bands.items():
        finite = {x: interval for x, interval in band.items() if all(map(math.isfinite, interval))}
        style = styles[label]
        axes.fill_between(
            list(finite),
            [interval.low for interval in finite.values()],
            [interval.high for interval in finite.values()],
            facecolor=(style.color, 0.10),
            edgecolor=(style.color, 0.45),
            linestyle=style.linestyle,
            linewidth=0.8,
            zorder=1,
        )


def _draw_curves(
    axes: Axes, curves: Curves, styles: dict[str, Style], without_whiskers: Iterable[str] = ()
) -> None:
    for label, values in curves.items():
        spreads = [math.nan if label in without_whiskers else v.deviation for v in values.values()]
        axes.errorbar(
            list(values),
            [value.mean for value in values.values()],
            yerr=None if any(map(math.isnan, spreads)) else spreads,
            capsize=3,
            label=label,
            linewidth=1.6,
            markersize=6,
            **styles[label]._asdict(),
        )


# ---------------------------------------------------------------------------- by depth


def retrieval_title(comparison: Comparison) -> str:
    return "Passkey retrieval" if comparison.kind == "passkey" else "Retrieval"


def has_depths(comparison: Comparison) -> bool:
    return all(row["depth"] is not None for _, row in comparison.labelled_rows())


def depth_figure(comparison: Comparison) -> Figure:
    check_comparable(comparison)
    counted, name = retrieval_names(comparison)
    contexts, columns = comparison.contexts, min(2, len(comparison.curves))
    rows = math.ceil(len(comparison.curves) / columns)
    matplotlib = require("matplotlib.figure", "train")
    size = (WIDTH if columns > 1 else 5.6, 1.2 + 2.5 * rows)
    figure = matplotlib.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels: list[Any] = list(grid.flat)
    for axes, (label, seeds) in zip(panels, comparison.curves.items(), strict=False):
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
        axes.set_title(label, fontsize=10)
    for axes in panels[len(comparison.curves) :]:
        axes.axis("off")
    figure.colorbar(image, ax=panels, label=f"{counted} (%)", shrink=0.8)
    figure.suptitle(
        f"{retrieval_title(comparison)} by length and depth, {name}\n"
        "left of the dashes: up to the training length",
        fontsize=11,
    )
    figure.supxlabel("context length (tokens)", fontsize=10)
    figure.supylabel("depth (0: beginning, 1: end)", fontsize=10)
    return figure


# ---------------------------------------------------------------------------- axes


def _title(
    figure: Figure,
    axes: Axes,
    comparison: Comparison,
    title: str,
    outside: Mapping[str, float] | None = None,
) -> None:
    """The title, and below it what was scored: figures get copied out of the page."""
    caption = f"protocol {comparison.protocol}: {protocol_caption(comparison, 'bands')}"
    if outside:
        tops = (f"{label} (up to {format_number(top)})" for label, top in outside.items())
        caption += f"; above the picture: {', '.join(tops)}"
    figure.suptitle(title, fontsize=11)
    axes.set_title(textwrap.fill(caption, 100), fontsize=7.5, color=DARK_GREY, pad=TITLE_PAD)


def _bits_axis(axes: Axes, comparison: Comparison) -> None:
    """Bits per byte, ``log2(perplexity) tokens / bytes``, if all contexts scored the same text."""
    sizes = {(sums.tokens, sums.bytes) for sums in comparison.sums_by_context.values()}
    tokens, bytes_ = sizes.pop()
    if sizes or not bytes_:
        return
    share = tokens / bytes_

    def bits(perplexity: Any) -> Any:
        return np.log2(np.maximum(perplexity, 1e-300)) * share  # matplotlib may pass values below 0

    def perplexity(bits: Any) -> Any:
        return 2.0 ** (np.asarray(bits) / share)

    right = axes.secondary_yaxis("right", functions=(bits, perplexity))
    ticker = require("matplotlib.ticker", "train")
    right.yaxis.set_major_locator(ticker.MaxNLocator(6))  # also on a logarithmic left axis
    right.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    right.yaxis.set_minor_locator(ticker.NullLocator())
    right.set_ylabel("bits per byte")


def _length_axis(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _perplexity_axis(
    axes: Axes, curves: Curves, bands: Bands, outside: Mapping[str, float]
) -> None:
    """Logarithmic beyond a factor of 3; spans a tenth at least, so that noise looks small."""
    inside = [values for label, values in curves.items() if label not in outside]
    spreads = [v for values in inside for v in values.values() if math.isfinite(v.mean)]
    if not spreads:
        return
    inside_bands = [values for label, values in bands.items() if label not in outside]
    ends = [end for values in inside_bands for band in values.values() for end in band]
    drawn = [*(v.mean for v in spreads), *filter(math.isfinite, ends)]
    low, high = min(drawn), max(drawn)
    is_noisy = any(v.deviation > 0.04 * v.mean for v in spreads)
    if high > 3 * low:
        ticker = require("matplotlib.ticker", "train")
        axes.set_yscale("log")
        subs = (1, 2, 5) if high < 300 * low else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif high < 1.1 * low and not is_noisy:
        middle = (low + high) / 2
        axes.set_ylim(0.94 * middle, 1.06 * middle)
    if outside:
        axes.set_ylim(low / 1.05, 1.08 * high)


def _off_the_chart(curves: Curves) -> dict[str, float]:
    """Labels, with their largest mean, whose curves would flatten all others at the bottom.

    >>> curve = lambda top: {128: Spread(90.0, 1.0, 3), 2048: Spread(top, 1.0, 3)}
    >>> _off_the_chart({"a": curve(90.0), "b": curve(99.0), "c": curve(120.0), "d": curve(9000.0)})
    {'d': 9000.0}
    >>> _off_the_chart({"a": curve(90.0), "d": curve(9000.0)})  # of two, both are looked at
    {}
    """
    tops = {label: max(v.mean for v in values.values()) for label, values in curves.items()}
    finite = [top for top in tops.values() if math.isfinite(top)]
    limit = 5 * float(np.median(finite)) if len(finite) > 3 else math.inf
    return {label: top for label, top in tops.items() if top > limit}


def _mark_training_lengths(axes: Axes, comparison: Comparison) -> None:
    lengths = sorted(set(comparison.training_lengths.values()))
    if len(lengths) == 1:
        mark_length(axes, lengths[0])
        return
    for length in lengths:  # full labels of neighbours would overlap
        mark_length(axes, length, f"L = {length:,}", xytext=(0, 3), ha="center")
    axes.set_xlabel(f"{axes.get_xlabel()}; L: training length")


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


def alt_text(comparison: Comparison, what: str) -> str:
    if comparison.kind in TASK_FIELD:
        curves, show = comparison.spreads(Sums.accuracy), format_percent
    elif comparison.kind == "position":
        curves, show = comparison.spreads(Sums.loss, _bucket_centre), format_number
    else:
        curves, show = comparison.spreads(Sums.perplexity), format_number
    texts = []
    for label, values in curves.items():
        (first, low), *_, (last, high) = [*values.items()] * 2
        ends = f"{show(low.mean)} at {first:,.0f} tokens, {show(high.mean)} at {last:,.0f}"
        texts.append(f"{label}: {ends}")
    return f"{what}. {'; '.join(texts)}."
