"""Figures of a report: matplotlib, one function a figure, readable without colour.

Every curve has a colour, a marker and a line style of its own; the same label has the same three
in every figure. Axes name their units and mark the training length.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fope_jax.extras import require
from fope_jax.report import protocols
from fope_jax.report.bootstrap import Interval
from fope_jax.report.comparison import PARTS, Comparison, check_comparable, context_of, run_labels
from fope_jax.report.lineage import tokens_before
from fope_jax.report.rows import Run
from fope_jax.report.sums import Spread, Sums, add_up, group
from fope_jax.report.tables import number, percent, retrieval_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, without the yellow that vanishes on white; tell apart with any eyesight.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
WIDTH, HEIGHT = 7.0, 4.3  # inches
LEGEND_LINE = 0.21  # inches
TITLE_PAD = 20  # points, room for the mark of the training length


class Style(NamedTuple):
    """How the curves of one label are drawn."""

    color: str
    marker: str
    linestyle: Any


def line_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each label, in the order given; repeats only after hundreds."""
    return {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def save(figure: Figure, directory: Path, stem: str) -> tuple[Path, Path]:
    """Writes ``stem.png`` and ``stem.svg``, the same bytes for the same figure."""
    matplotlib = require("matplotlib", "train")
    png, svg = directory / f"{stem}.png", directory / f"{stem}.svg"
    with matplotlib.rc_context({"svg.hashsalt": "fope"}):
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


# ---------------------------------------------------------------------------- curves


def perplexity_figure(comparison: Comparison, styles: dict[str, Style]) -> Figure:
    """Perplexity against context length, with bits per byte on the right."""
    check_comparable(comparison)
    figure, axes = _figure()
    curves = comparison.numbers(lambda sums: sums.perplexity)
    bands = _shown(comparison, comparison.intervals(lambda sums: sums.perplexity))
    _bands(axes, bands, styles)
    outside = _off_the_chart(curves)
    _curves(axes, curves, styles, without_whiskers=outside)
    words = protocols.words(comparison)
    _length_axis(axes, comparison.contexts, words.x)
    _mark_training_lengths(axes, comparison)
    _ratio_axis(axes, curves, bands, outside)
    axes.set_ylabel("perplexity (per token)")
    _bits_axis(axes, comparison)
    _title(figure, axes, comparison, f"{words.title}, {comparison.name} split", outside)
    _legend(figure, axes)
    return figure


def ratio_figure(comparison: Comparison, styles: dict[str, Style]) -> Figure:
    """Perplexity over that of the same seed, and the same documents, at the training length."""
    check_comparable(comparison)
    figure, axes = _figure()
    curves = comparison.ratios(lambda sums: sums.perplexity)
    bands = _shown(comparison, comparison.ratio_intervals(lambda sums: sums.perplexity))
    _bands(axes, bands, styles)
    outside = _off_the_chart(curves)
    _curves(axes, curves, styles, without_whiskers=outside)
    axes.axhline(1, color="#555555", linewidth=0.8, zorder=0)
    _length_axis(axes, comparison.contexts, protocols.words(comparison).x)
    _mark_training_lengths(axes, comparison)
    _ratio_axis(axes, curves, bands, outside)
    axes.set_ylabel("perplexity / that at the training length")
    title = f"Perplexity relative to the training length, {comparison.name} split"
    _title(figure, axes, comparison, title, outside)
    _legend(figure, axes)
    return figure


def position_figure(comparison: Comparison, styles: dict[str, Style]) -> Figure:
    """Loss against position inside a long window, or since the document's start."""
    check_comparable(comparison)
    figure, axes = _figure()
    curves = comparison.numbers(lambda sums: sums.loss, by=_bucket_centre)
    bands = _shown(comparison, comparison.intervals(lambda sums: sums.loss, by=_bucket_centre))
    _bands(axes, bands, styles)
    _curves(axes, curves, styles)
    longest, words = max(comparison.contexts), protocols.words(comparison)
    ticks = [longest // 2**k for k in range(10, -1, -1) if longest // 2**k >= 1]
    _length_axis(axes, ticks, words.x)
    _mark_training_lengths(axes, comparison)
    axes.set_ylabel("loss (nats per token)")
    where = f"window of {longest:,} tokens, {comparison.name} split"
    _title(figure, axes, comparison, f"{words.title}, {where}")
    _legend(figure, axes)
    return figure


def _bucket_centre(row: dict[str, Any]) -> float:
    start, stop = row["bucket"]
    return math.sqrt(max(start, stop / 2) * stop)


def accuracy_figure(comparison: Comparison, styles: dict[str, Style]) -> Figure:
    """Share of passkeys found or answers right, all depths, against context length."""
    counted, where = retrieval_names(comparison)
    check_comparable(comparison)
    figure, axes = _figure()
    curves = comparison.numbers(lambda sums: 100 * sums.accuracy)
    _curves(axes, curves, styles)
    _length_axis(axes, comparison.contexts, "context length (tokens)")
    axes.set_ylim(-4, 104)
    _mark_training_lengths(axes, comparison)
    axes.set_ylabel(f"{counted} (%)")
    axes.set_title(f"{_retrieval(comparison)} against context length, {where}", pad=TITLE_PAD)
    _legend(figure, axes)
    return figure


def training_figure(runs: Sequence[Run], styles: dict[str, Style]) -> Figure:
    """Training loss against tokens seen, those before the run included, one line a run."""
    figure, axes = _figure()
    names, seen = run_labels(runs), set()
    for run in runs:
        rows, label = run.of("train"), names[run.path]
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
    _legend(figure, axes)
    return figure


def _shown(comparison: Comparison, found: dict[str, dict[Any, Interval]]) -> dict[str, Any]:
    return found if protocols.has_bands(comparison) else {}


def _bands(axes: Axes, intervals: dict[str, dict[Any, Interval]], styles: dict[str, Style]) -> None:
    """The interval of each curve, edged in its line style so that bands differ without colour."""
    for label, found in intervals.items():
        drawn = {x: own for x, own in found.items() if all(map(math.isfinite, own))}
        look = styles[label]
        axes.fill_between(
            list(drawn),
            [own.low for own in drawn.values()],
            [own.high for own in drawn.values()],
            facecolor=(look.color, 0.10),
            edgecolor=(look.color, 0.45),
            linestyle=look.linestyle,
            linewidth=0.8,
            zorder=1,
        )


def _curves(
    axes: Axes,
    curves: dict[str, dict[Any, Spread]],
    styles: dict[str, Style],
    without_whiskers: Iterable[str] = (),
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


def _retrieval(comparison: Comparison) -> str:
    return "Passkey retrieval" if comparison.kind == "passkey" else "Retrieval"


def has_depths(comparison: Comparison) -> bool:
    """Whether what is asked for stands at a depth."""
    return all(row["depth"] is not None for own in comparison.curves.values() for row in own[0])


def depth_figure(comparison: Comparison) -> Figure:
    """Share of passkeys found or answers right by context length and depth, one panel a label."""
    counted, where = retrieval_names(comparison)
    check_comparable(comparison)
    count = len(comparison.curves)
    columns = min(2, count)
    lines = math.ceil(count / columns)
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(WIDTH if columns > 1 else 5.6, 1.2 + 2.5 * lines), layout="constrained"
    )
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(panels.flat)
    for panel, (label, seeds) in zip(panels, comparison.curves.items(), strict=False):
        rows = [row for own in seeds for row in own]
        cells = {k: add_up(v) for k, v in group(rows, _place).items()}
        image = _panel(panel, cells, comparison)
        length = comparison.training_lengths[label]
        inside = [context for context in comparison.contexts if context <= length]
        panel.axvline(len(inside) - 0.5, color="white", linewidth=3.5)
        panel.axvline(len(inside) - 0.5, color="black", linewidth=1.5, linestyle="--")
        panel.set_title(label, fontsize=10)
    for panel in panels[count:]:
        panel.axis("off")
    figure.colorbar(image, ax=panels, label=f"{counted} (%)", shrink=0.8)
    figure.suptitle(
        f"{_retrieval(comparison)} by length and depth, {where}\n"
        "left of the dashes: up to the training length",
        fontsize=11,
    )
    figure.supxlabel("context length (tokens)", fontsize=10)
    figure.supylabel("depth (0: beginning, 1: end)", fontsize=10)
    return figure


def _place(row: dict[str, Any]) -> tuple[int, float]:
    return row["context"], row["depth"]


def _panel(axes: Axes, cells: dict[tuple[int, float], Sums], comparison: Comparison) -> Any:
    contexts = comparison.contexts
    depths = sorted({depth for _, depth in cells})
    values = [
        [100 * cells[c, d].accuracy if (c, d) in cells else math.nan for c in contexts]
        for d in depths
    ]
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=8)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if value < 50 else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return image


# ---------------------------------------------------------------------------- axes


def _figure() -> tuple[Figure, Axes]:
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(WIDTH, HEIGHT), layout="constrained"
    )
    axes = figure.subplots()
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(
    figure: Figure,
    axes: Axes,
    comparison: Comparison,
    title: str,
    outside: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """The title and, smaller, what was scored: a picture is cut out of its page sooner or later."""
    brief = f"protocol {comparison.protocol}: {protocols.protocol_caption(comparison, 'bands')}"
    if outside:
        left = (f"{label} (up to {number(top)})" for label, top in outside.items())
        brief += f"; above the picture: {', '.join(left)}"
    figure.suptitle(title, fontsize=11)
    axes.set_title(textwrap.fill(brief, 100), fontsize=7.5, color="#444444", pad=TITLE_PAD)


def _bits_axis(axes: Axes, comparison: Comparison) -> None:
    """Bits per byte on the right, where all contexts have the same tokens and bytes.

    Bits per byte are then ``log2(perplexity) tokens / bytes`` for every point of the figure.
    """
    sums = [add_up([r for r in comparison.first if r["context"] == c]) for c in comparison.contexts]
    if len({(s.tokens, s.bytes) for s in sums}) > 1 or not sums[0].bytes:
        return
    share = sums[0].tokens / sums[0].bytes

    def bits(perplexity: Any) -> Any:
        return np.log2(np.maximum(perplexity, 1e-300)) * share  # an axis may ask below 0

    def perplexity(bits: Any) -> Any:
        return 2.0 ** (np.asarray(bits) / share)

    right = axes.secondary_yaxis("right", functions=(bits, perplexity))
    ticker = require("matplotlib.ticker", "train")
    right.yaxis.set_major_locator(ticker.MaxNLocator(6))  # also where perplexity is logarithmic
    right.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    right.yaxis.set_minor_locator(ticker.NullLocator())
    right.set_ylabel("bits per byte")


def _length_axis(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _ratio_axis(
    axes: Axes,
    curves: dict[str, dict[Any, Spread]],
    bands: dict[str, dict[Any, Interval]],
    outside: dict[str, float],
) -> None:
    """A y axis for perplexities: logarithmic where they differ by more than a factor of 3.

    Where they differ by less than a tenth the axis still spans a tenth, so that noise styles small.
    Curves ``outside`` leave it at the top.
    """
    spreads = [
        v
        for label, values in curves.items()
        for v in values.values()
        if label not in outside and math.isfinite(v.mean)
    ]
    if not spreads:
        return
    inside = [own for label, own in bands.items() if label not in outside]
    ends = [end for own in inside for band in own.values() for end in band]
    drawn = [*(v.mean for v in spreads), *filter(math.isfinite, ends)]
    low, high = min(drawn), max(drawn)
    noisy = any(v.deviation > 0.04 * v.mean for v in spreads)
    if high > 3 * low:
        ticker = require("matplotlib.ticker", "train")
        axes.set_yscale("log")
        subs = (1, 2, 5) if high < 300 * low else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif high < 1.1 * low and not noisy:
        middle = (low + high) / 2
        axes.set_ylim(0.94 * middle, 1.06 * middle)
    if outside:
        axes.set_ylim(low / 1.05, 1.08 * high)


def _off_the_chart(curves: dict[str, dict[Any, Spread]]) -> dict[str, float]:
    """Labels so far above most others that these would lie in one line at the bottom, each with its
    largest mean: more than five times the median of four or more.

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
    for length in lengths:
        axes.axvline(length, color="#555555", linewidth=1.2, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            f"training length {length:,}" if len(lengths) == 1 else f"L = {length:,}",
            (length, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-3, 3) if len(lengths) == 1 else (0, 3),
            textcoords="offset points",
            ha="left" if len(lengths) == 1 else "center",
            va="bottom",
            fontsize=8.5,
            color="#444444",
        )
    if len(lengths) > 1:  # whole words of neighbours would run into each other
        axes.set_xlabel(f"{axes.get_xlabel()}; L: training length")


def _legend(figure: Figure, axes: Axes) -> None:
    legend_below(figure, *axes.get_legend_handles_labels())


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend under the figure, which grows by the legend's lines beyond three: the curves keep
    their height.
    """
    if not handles:
        return
    width, height = figure.get_size_inches()
    fitting = int(11 * width) // (max(map(len, names)) + 11)  # characters of a line, of a handle
    columns = max(1, min(4, fitting, len(names)))
    lines = math.ceil(len(names) / columns)
    figure.set_size_inches(width, height + LEGEND_LINE * max(0, lines - 3))
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5
    )


# ---------------------------------------------------------------------------- in words


def alt_text(comparison: Comparison, what: str) -> str:
    """The text alternative of a figure of curves: the first and last number of each."""
    if comparison.kind in PARTS:
        curves, show = comparison.numbers(lambda sums: sums.accuracy), percent
    elif comparison.kind == "position":
        curves, show = comparison.numbers(lambda sums: sums.loss, by=_bucket_centre), number
    else:
        curves, show = comparison.numbers(lambda sums: sums.perplexity, by=context_of), number
    parts = []
    for label, values in curves.items():
        (first, low), (last, high) = list(values.items())[0], list(values.items())[-1]
        parts.append(
            f"{label}: {show(low.mean)} at {first:,.0f} tokens, {show(high.mean)} at {last:,.0f}"
        )
    return f"{what}. {'; '.join(parts)}."
