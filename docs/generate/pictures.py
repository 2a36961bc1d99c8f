"""The pictures of the site, drawn when it is built."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

from docs.generate.links import ROOT
from fope_jax.gallery.curves import gallery_rows
from fope_jax.gallery.page import method_figure, overview_figure
from fope_jax.report.plots import new_figure
from fope_jax.report.rows import read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READ, SCORED, QUESTION = "#c9d7e8", "#0072B2", "#D55E00"
TEXT = {"fontsize": 8.5, "va": "center"}


def pictures() -> dict[str, bytes]:
    """``{file of the site: SVG}``."""
    rows = gallery_rows()
    figures = {f"methods/pictures/{row['label']}.svg": method_figure(row) for row in rows}
    figures["methods/pictures/overview.svg"] = overview_figure(rows)
    figures["concepts/pictures/protocols.svg"] = protocols_figure()
    figures["concepts/pictures/fingerprint.svg"] = fingerprint_figure()
    figures["concepts/pictures/lineage.svg"] = lineage_figure()
    return {name: as_svg(figure) for name, figure in figures.items()}


def as_svg(figure: Figure) -> bytes:
    """The same figure gives the same bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fope"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


# ---------------------------------------------------------------------------- protocols


def protocols_figure() -> Figure:
    """Which tokens each protocol scores, and which it lets the model see."""
    panels: dict[str, Callable[[Axes], None]] = {
        "same-tokens": _same_tokens,
        "sliding-window": _sliding_window,
        "chunks": _chunks,
        "no-resets and document-resets": _resets,
        "long-window": _long_window,
        "from-start": _from_start,
        "passkey and retrieval": _retrieval,
    }
    figure, axes = new_figure(9.0, 10.5, len(panels), 1)
    for panel, (title, draw) in zip(axes, panels.items(), strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        panel.axis("off")
        panel.set_xlim(0, 16.2)
        panel.set_ylim(-0.5, 3.2)
        draw(panel)
    return figure


def _bar(axes: Axes, row: float, start: float, stop: float, color: str = READ) -> None:
    axes.barh(row, stop - start, 0.62, start, color=color, edgecolor="white", linewidth=0.8)


def _say(axes: Axes, row: float, text: str, x: float = 10.0) -> None:
    axes.text(x, row, text, **TEXT)


def _same_tokens(axes: Axes) -> None:
    for row, length in enumerate((4, 2, 1)):
        _bar(axes, row, 8 - 2 * length, 8)
        _bar(axes, row, 7, 8, SCORED)
        _say(axes, row, f"context {length}L" if length > 1 else "context L, the training length")
    _say(axes, 2.8, "dark: scored; light: read before it. The same tokens are scored each time.", 0)


def _sliding_window(axes: Axes) -> None:
    for row in range(3):
        _bar(axes, 2 - row, row, row + 4)
        _bar(axes, 2 - row, row + 3, row + 4, SCORED)
    _say(axes, 1, "the window moves by evaluate.stride and scores what is new in it")


def _chunks(axes: Axes) -> None:
    for start in (0, 2, 4, 6):
        _bar(axes, 1, start, start + 2)
        _bar(axes, 1, start + 0.15, start + 2, SCORED)
    _say(axes, 1, "T tokens each, T - 1 scored: early ones see little")


def _resets(axes: Axes) -> None:
    documents = ((0, 3), (3, 5), (5, 8))
    for start, stop in documents:
        for row in (0, 2):
            _bar(axes, row, start, stop, SCORED)
        axes.plot([start, stop], [0.45, 0.45 + (stop - start) / 8], color=QUESTION, linewidth=1.5)
    axes.plot([0, 8], [2.45, 3.1], color=QUESTION, linewidth=1.5)
    _say(axes, 2, "no-resets: three documents joined; positions (line) count on")
    _say(axes, 0, "document-resets: they begin anew, and so does attention")


def _long_window(axes: Axes) -> None:
    for index in range(8):
        _bar(axes, 1, index, index + 1, ("#0072B2", "#3388bf")[index % 2])
    axes.axvline(0.5, 0.15, 0.75, color="#444444", linestyle=":")
    axes.text(0.55, 2.1, "L", **TEXT)
    _say(axes, 1, "one longest window; loss by position in it")


def _from_start(axes: Axes) -> None:
    for row, stop in ((2, 8), (1, 5), (0, 6.5)):
        _bar(axes, row, 0, stop, SCORED)
    _say(axes, 1, "each document from its start; loss by distance from there")


def _retrieval(axes: Axes) -> None:
    for row, (stop, key) in enumerate(((8, 1.4), (4, 2.8))):
        _bar(axes, row, 0, stop)
        _bar(axes, row, key, key + 0.35, QUESTION)
        _bar(axes, row, stop - 0.35, stop, SCORED)
    _say(axes, 0, "depth 0.2 of a long context")
    _say(axes, 1, "depth 0.7 of a short one")
    _say(axes, 2.3, "a key (orange) in filler, and the question (blue); the answer is scored", 0)


# ---------------------------------------------------------------------------- boxes and arrows


def _box(axes: Axes, x: float, y: float, text: str, color: str = READ) -> None:
    style = {"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "#8899aa"}
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, bbox=style, linespacing=1.4)


def _arrow(axes: Axes, start: Sequence[float], stop: Sequence[float], text: str = "") -> None:
    arrow = {"arrowstyle": "->", "color": "#444444", "shrinkA": 4, "shrinkB": 4}
    axes.annotate("", stop, start, arrowprops=arrow)
    if text:
        middle = [(a + b) / 2 for a, b in zip(start, stop, strict=True)]
        axes.text(*middle, text, fontsize=8, ha="center", va="center", backgroundcolor="white")


def _diagram(width: float, height: float) -> tuple[Figure, Axes]:
    figure, (axes,) = new_figure(width, height)
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure, axes


def fingerprint_figure() -> Figure:
    """What goes into a fingerprint, and who compares it."""
    figure, axes = _diagram(7.5, 2.8)
    inputs = ("method and every knob", "effective frequencies", "constants: FoPE's coefficients")
    for index, text in enumerate(inputs):
        y = 0.85 - 0.35 * index
        _box(axes, 0.17, y, text)
        _arrow(axes, (0.33, y), (0.44, 0.5))
    _box(axes, 0.54, 0.5, "fingerprint\nb5e2ac08ba2617f7", "#f6dcc8")
    for index, text in enumerate(("resuming a run", "evaluate", "extend", "export")):
        y = 0.92 - 0.28 * index
        _box(axes, 0.87, y, text)
        _arrow(axes, (0.64, 0.5), (0.79, y))
    return figure


def lineage_figure() -> Figure:
    """The runs of experiments/extrapolation that go on from RoPE, with what the change cost."""
    results = ROOT / "experiments/extrapolation/results"
    names = ("rope_same_0", "rope_yarn_0", "rope_fope_0")
    runs: Sequence[Any] = read_runs(results / f"{name}.jsonl" for name in names)
    figure, axes = _diagram(7.5, 3.2)
    before = runs[0].lineage["parent"]
    parent = f"{before['name']}\n{before['length']} tokens, step {before['step']:,}"
    _box(axes, 0.15, 0.5, parent, "#f6dcc8")
    for index, run in enumerate(runs):
        y, start = 0.86 - 0.36 * index, run.lineage["start"]
        child = run.lineage["child"]
        cost = f"{start['parent']:.3f} to {start['child']:.3f} nats"
        _arrow(axes, (0.29, 0.5), (0.74, y), cost)
        _box(axes, 0.84, y, f"{run.variant}\n{child['length']} tokens")
    return figure
