"""Figures of the rows: `python -m experiments.pretrained figures`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pretrained.tables import Results, loss_by_position
from experiments.pretrained.units import LABELS, LENGTH, METHODS, TRAINED_AT, UPDATES
from fope_jax.report.plots import legend_below, mark_length, new_figure
from fope_jax.report.styles import line_styles

STRETCH = 2048  # targets of one point
TOP = 7.5  # nats; curves that break leave the picture
READS_ON = 4.0  # nats
NEAR = 4.3  # nats of held-out text; trainings that begin below have a panel of their own
# In the order of the panels: the floors, the series with it, the larger changes, the controls.
TRAINED = ("clip-2048", "clip-4096", "clip", "fope-2048", "fope", "fope-official-2048", "drope")
TRAINED = (*TRAINED, "rope", "yarn")
COMPARED = {"clip-2048": "2,048", "clip-4096": "4,096", "clip": "8,192"}  # labels at their ends
COMPARED |= {"rope": "RoPE", "yarn": "YaRN"}


def _positions(values: np.ndarray) -> np.ndarray:
    return STRETCH * (np.arange(len(values)) + 0.5)


def _token_axis(axes: Any) -> None:
    ticks = range(0, 2 * LENGTH + 1, 2 * STRETCH)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(0, 2 * LENGTH)


def loss_figure(results: Results) -> Any:
    """Loss by position in one window, each method as it is, without training.

    The right panel has those that read on to its end, which the left one cannot tell apart.
    """
    figure, panels = new_figure(11, 5, 1, 2)
    rows = {
        m: results.of("loss", method=m, text="books", context=2 * LENGTH, updates=0)
        for m in METHODS
    }
    styles = line_styles(METHODS)
    handles = {}
    for method, of_method in rows.items():
        if of_method:
            values = np.mean([loss_by_position(row, STRETCH) for row in of_method], axis=0)
            for axes in panels if max(values) < READS_ON else panels[:1]:
                (handles[LABELS[method]],) = axes.plot(
                    _positions(values), values, **styles[method]._asdict()
                )
    for axes in panels:
        mark_length(axes, LENGTH, xytext=(4, -10))
        _token_axis(axes)
        axes.set_xlabel("position of the token in the window (tokens)")
    panels[0].set_title("all", fontsize=10)
    panels[1].set_title(f"those that stay below {READS_ON} nats", fontsize=10)
    panels[0].set_ylabel("loss (nats a token)")
    panels[0].set_ylim(top=TOP)
    legend_below(figure, list(handles.values()), list(handles))
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
            "RoPE as it was": (control, {"color": "#777777", "linestyle": ":"}),
            "YaRN, factor 2, without training": (
                stretched,
                {"color": "#777777", "linestyle": "-.", "linewidth": 1},
            ),
            "changed, before training": (
                results.of("loss", method=method, text="books", context=2 * LENGTH, updates=0),
                {"color": "#D55E00", "linestyle": "--", "marker": "s"},
            ),
            "after training": (
                results.of("loss", method=method, context=2 * LENGTH, window=0, updates=UPDATES),
                {"color": "#0072B2", "linestyle": "-", "marker": "o"},
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
        axes.set_ylabel("loss (nats a token)")
    for axes in panels[count:]:
        axes.set_visible(False)
    legend_below(figure, list(handles.values()), list(handles))
    return figure


def _compare_trained(axes: Any, results: Results) -> None:
    """The floors alone, RoPE and YaRN after the training, each named where its curve ends."""
    for method, label in COMPARED.items():
        for row in results.of("loss", method=method, context=2 * LENGTH, updates=UPDATES)[:1]:
            values = loss_by_position(row, STRETCH)
            style = {"color": "#777777", "linestyle": "-." if method == "yarn" else ":"}
            if label[0].isdigit():
                style = {"color": "#0072B2", "linestyle": "-"}
            axes.plot(_positions(values), values, **style)
            end = (_positions(values)[-1], values[-1])
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, end, fontsize=8, **place)
    axes.set_title("all trained: floors alone, RoPE, YaRN", fontsize=10)


def updates_figure(results: Results) -> Any:
    """Loss on held-out windows of 2,048 tokens, before the first update and after each tenth.

    The right panel has those near the parent's loss, which the left one cannot tell apart.
    """
    figure, panels = new_figure(10, 4.2, 1, 2)
    names = [m for m in TRAINED if results.of("training", method=m, seed=0, updates=UPDATES)]
    styles = line_styles(names)
    handles = {}
    for method in names:
        (row,) = results.of("training", method=method, seed=0, updates=UPDATES)
        updates, losses = zip(*row["held_out_loss"], strict=True)
        for axes in panels if losses[0] < NEAR else panels[:1]:
            (handles[LABELS[method]],) = axes.plot(updates, losses, **styles[method]._asdict())
    panels[0].set_title("all", fontsize=10)
    panels[1].set_title(f"those that begin below {NEAR} nats", fontsize=10)
    for axes in panels:
        axes.set_xlabel(f"updates of one window of {TRAINED_AT:,} tokens")
    panels[0].set_ylabel("held-out loss (nats a token)")
    legend_below(figure, list(handles.values()), list(handles))
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
    after: dict[str, tuple[Any, dict[str, Any]]] = {
        "RoPE": (rows.get(("rope", 2 * LENGTH)), {"marker": "o", "color": "#0072B2"}),
        "YaRN, factor 2": (rows.get(("yarn", 2 * LENGTH)), {"marker": "x", "color": "#D55E00"}),
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
                handles[label] = axes.scatter(x, y, s=18, linewidths=0.8, alpha=0.7, **style)
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
    written = []
    for name, make, kind in (
        ("loss", loss_figure, "loss"),
        ("training", training_figure, "training"),
        ("updates", updates_figure, "training"),
        ("sizes", sizes_figure, "heads"),
        ("heads", heads_figure, "heads"),
    ):
        if results.of(kind):
            path = directory / f"{name}.png"
            make(results).savefig(path, dpi=110, metadata={"Software": None})
            written.append(path)
    return written
