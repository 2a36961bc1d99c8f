"""Figures of the rows: `python -m experiments.pretrained figures`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pretrained.tables import Results, loss_by_position
from experiments.pretrained.units import LABELS, LENGTH, METHODS, TRAINED_AT, UPDATES
from fope_jax.report.charts import Curve
from fope_jax.report.plots import end_labels, legend_below, mark_length, new_figure, save_figure
from fope_jax.report.styles import KNOWN, method_styles

STRETCH = 2048  # targets of one point
TOP = 7.5  # nats; curves that break leave the picture
READS_ON = 4.0  # nats
LABEL_GAP = 0.05  # of the height of the axes
NEAR = 4.3  # nats of held-out text; trainings that begin below have a panel of their own
# In the order of the panels: the floors, the series with it, the larger changes, the controls.
TRAINED = ("clip-2048", "clip-4096", "clip", "fope-2048", "fope", "fope-official-2048", "drope")
TRAINED = (*TRAINED, "rope", "yarn")
COMPARED = {"clip-2048": "2,048", "clip-4096": "4,096", "clip": "8,192"}  # labels at their ends
COMPARED |= {"rope": "RoPE", "yarn": "YaRN"}
STYLES = method_styles([*METHODS, *TRAINED])


def _positions(values: np.ndarray) -> np.ndarray:
    return STRETCH * (np.arange(len(values)) + 0.5)


def _token_axis(axes: Any) -> None:
    ticks = range(0, 2 * LENGTH + 1, 2 * STRETCH)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(0, 2 * LENGTH)


def _draw_curves(
    panels: list[Any], curves: dict[str, Curve], near: set[str], top: float | None = None
) -> None:
    """All curves left, up to ``top``, ``near`` right as well; each is named in one panel alone."""
    for method, curve in curves.items():
        for axes in panels if method in near else panels[:1]:
            axes.plot(curve.x, curve.y, markersize=5, **STYLES[method]._asdict())
    panels[0].set_title("all; names of the lowest: right panel", fontsize=10)
    panels[0].set_ylim(top=top)
    for axes, methods in zip(panels, (curves.keys() - near, near), strict=True):
        named = {LABELS[m]: curve for m, curve in curves.items() if m in methods}
        end_labels(axes, named, {LABELS[m]: STYLES[m] for m in methods}, LABEL_GAP)


def loss_figure(results: Results) -> Any:
    """Loss by position in one window, each method as it is, without training.

    The right panel has those that read on to its end, which the left one cannot tell apart.
    """
    curves = {}
    for method in METHODS:
        rows = results.of("loss", method=method, text="books", context=2 * LENGTH, updates=0)
        if rows:
            values = np.mean([loss_by_position(row, STRETCH) for row in rows], axis=0)
            curves[method] = Curve([*_positions(values)], [*values])
    figure, panels = new_figure(12, 4.4, 1, 2)
    for axes in panels:
        mark_length(axes, LENGTH, xytext=(4, -10))
        _token_axis(axes)
        axes.set_xlabel("position of the token in the window (tokens)")
    panels[0].set_ylabel("loss (nats per token)")
    panels[1].set_title(f"those that stay below {READS_ON} nats", fontsize=10)
    near = {method for method, curve in curves.items() if max(curve.y) < READS_ON}
    _draw_curves(panels, curves, near, TOP)
    return figure


def training_figure(results: Results) -> Any:
    """Loss by position before and after each short training; the floors after it, together."""
    names = [m for m in TRAINED if results.of("training", method=m, updates=UPDATES)]
    count = len(names) + 1
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, panels = new_figure(3.2 * columns, 2.8 * rows, rows, columns, sharex=True, sharey=True)
    control, stretched = (
        results.of("loss", method=method, text="books", context=2 * LENGTH, updates=0)
        for method in ("rope", "yarn")
    )
    handles: dict[str, Any] = {}
    for axes in panels:
        for length in (TRAINED_AT, LENGTH):
            axes.axvline(length, color="#999999", linewidth=1, linestyle="--", zorder=0)
        _token_axis(axes)
        axes.set_xlabel("position in the window (tokens)")
        axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    for axes, method in zip(panels, names, strict=False):
        curves: dict[str, tuple[Any, dict[str, Any]]] = {
            "RoPE as it was": (control, {"color": KNOWN["rope"].color, "linestyle": ":"}),
            "YaRN, factor 2, without training": (
                stretched,
                {"color": KNOWN["yarn"].color, "linestyle": "-.", "linewidth": 1},
            ),
            "changed, before training": (
                results.of("loss", method=method, text="books", context=2 * LENGTH, updates=0),
                {"color": "#777777", "linestyle": "--", "marker": "s"},
            ),
            "after training": (
                results.of("loss", method=method, context=2 * LENGTH, window=0, updates=UPDATES),
                {"color": "black", "linestyle": "-", "marker": "o"},
            ),
        }
        for label, (measured, style) in curves.items():
            for row in measured[:1] if label != "after training" else measured:
                values = loss_by_position(row, STRETCH)
                (handles[label],) = axes.plot(_positions(values), values, markersize=4, **style)
        axes.set_title(LABELS[method], fontsize=10)
    _compare_trained(panels[len(names)], results)
    panels[0].set_ylim(top=TOP)
    for axes in panels[::columns]:
        axes.set_ylabel("loss (nats per token)")
    for axes in panels[count:]:
        axes.set_visible(False)
    legend_below(figure, list(handles.values()), list(handles))
    return figure


def _compare_trained(axes: Any, results: Results) -> None:
    """The floors alone, RoPE and YaRN after the training, each named where its curve ends."""
    for method, label in COMPARED.items():
        for row in results.of("loss", method=method, context=2 * LENGTH, updates=UPDATES)[:1]:
            values = loss_by_position(row, STRETCH)
            axes.plot(_positions(values), values, **STYLES[method]._replace(marker="")._asdict())
            end = (_positions(values)[-1], values[-1])
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, end, fontsize=8, **place)
    axes.set_title("all trained: floors alone, RoPE, YaRN", fontsize=10)


def updates_figure(results: Results) -> Any:
    """Loss on held-out windows of 2,048 tokens, before the first update and after each tenth.

    The right panel has those near the parent's loss, which the left one cannot tell apart.
    """
    curves = {}
    for method in TRAINED:
        for row in results.of("training", method=method, seed=0, updates=UPDATES):
            updates, losses = zip(*row["held_out_loss"], strict=True)
            curves[method] = Curve([*updates], [*losses])
    figure, panels = new_figure(12, 4.4, 1, 2)
    for axes in panels:
        axes.set_xlabel(f"updates of one window of {TRAINED_AT:,} tokens")
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[1].set_title(f"those that begin below {NEAR} nats", fontsize=10)
    _draw_curves(panels, curves, {m for m, curve in curves.items() if curve.y[0] < NEAR})
    return figure


def sizes_figure(results: Results) -> Any:
    """Mean size of q and k by frequency and layer, as the paper's figure 7."""
    (row, *_) = results.of("heads", method="rope", updates=0, context=LENGTH)
    figure, panels = new_figure(9, 4.2, 1, 2, sharey=True)
    theta, pairs = row["position"]["theta"], len(row["q_size"][0])
    undertrained = sum(2 * math.pi * theta ** (i / pairs) > LENGTH for i in range(pairs))
    for axes, name in zip(panels, ("q_size", "k_size"), strict=True):
        sizes = np.asarray(row[name])
        image = axes.imshow(sizes, origin="lower", aspect="auto", cmap="viridis", vmin=0)
        axes.axvline(pairs - undertrained - 0.5, color="white", linewidth=1.5, linestyle="--")
        axes.text(pairs - 0.7, 0, "less than a turn", color="white", fontsize=9, ha="right")
        axes.grid(False)
        axes.set_title(f"|{name[0]}|, mean over tokens and heads", fontsize=10)
        axes.set_xlabel("pair of dimensions, 0 turns fastest")
        figure.colorbar(image, ax=axes, label="length of the pair")
    panels[0].set_ylabel("layer")
    return figure


def heads_figure(results: Results) -> Any:
    """Every head at both lengths: attention on the first token, its distance, and on the needle."""
    rows = {
        (row["method"], row["context"]): row for row in results.of("heads", updates=0, window=0)
    }
    before = rows["rope", LENGTH]
    after = {
        "RoPE": (rows.get(("rope", 2 * LENGTH)), KNOWN["rope"]),
        "YaRN, factor 2": (rows.get(("yarn", 2 * LENGTH)), KNOWN["yarn"]),
    }
    figure, panels = new_figure(11, 4, 1, 3)
    titles = {
        "first": "share of attention on the first token",
        "distance": "mean distance attended to, of the length",
        "needle": "share on the needle when it is asked for",
    }
    handles: dict[str, Any] = {}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        scale = (lambda x, n: x / n) if name == "distance" else (lambda x, n: x)
        x = scale(_of_heads(before, name), LENGTH)
        for label, (row, style) in after.items():
            if row:
                y = scale(_of_heads(row, name), 2 * LENGTH)
                look: dict[str, Any] = {"marker": style.marker, "facecolors": "none"}
                look |= {"edgecolors": style.color, "linewidths": 0.8, "rasterized": True}
                handles[label] = axes.scatter(x, y, s=18, **look)
        axes.axline((0, 0), slope=1, color="#999999", linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=10)
        edge = max(axes.get_xlim()[1], axes.get_ylim()[1])  # one scale on both axes
        axes.set(xlim=(-0.02 * edge, edge), ylim=(-0.02 * edge, edge))
        axes.set_xlabel(f"RoPE at {LENGTH:,} tokens")
        axes.set_ylabel(f"at {2 * LENGTH:,} tokens")
    legend_below(figure, list(handles.values()), list(handles))
    return figure


def _of_heads(row: dict[str, Any], name: str) -> np.ndarray:
    values = np.asarray(row[name])
    return (values.mean(axis=-1) if values.ndim == 3 else values).ravel()


def write_figures(results: Results, directory: Path) -> list[Path]:
    """Writes the figures whose rows are there."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, make, kind in (
        ("loss", loss_figure, "loss"),
        ("training", training_figure, "training"),
        ("updates", updates_figure, "training"),
        ("sizes", sizes_figure, "heads"),
        ("heads", heads_figure, "heads"),
    ):
        if results.of(kind):
            written += save_figure(make(results), directory, name)
    return written
