"""Figures of spectra: the theory's demo, and the checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fope_jax.report.plots import DASHES, Grid, draw_grid, mark, mark_length, new_figure
from fope_jax.report.styles import COLOURS, Style, line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measured = dict[str, Any]  # what ``measure_run`` returns
DECADES = 4  # range of a heatmap below its largest energy
SIGNALS = {
    "logits_power": "logits, over distance",
    "q_power": "q, over position",
    "k_power": "k, over position",
    "hidden_power": "hidden states, over position",
}
FREQUENCY = "frequency (radians per token)"


def _panels(rows: int, columns: int, width: float, height: float, **settings: Any) -> Any:
    """A figure and its axes ``[rows, columns]``, without a grid yet."""
    figure, panels = new_figure(width, height, rows, columns, grid="", **settings)
    return figure, np.array(panels, object).reshape(rows, columns)


def style_axes(
    axes: Axes,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    *,
    grid: Grid = "both",
    legend: dict[str, Any] | None = None,
    **title_settings: Any,
) -> None:
    """Sets labels, title, grid ("both", "y" or "") and, with ``legend`` settings, a legend."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, fontsize=10, **title_settings)
    draw_grid(axes, grid)
    if legend is not None:
        axes.legend(**{"frameon": False, "fontsize": 8.5} | legend)


def _line(look: Style) -> dict[str, Any]:
    return look._asdict() | {"marker": None, "linewidth": 1.3}


def _crosses(axes: Axes, x: Any, y: Any, size: float, **settings: Any) -> None:
    axes.plot(x, y, linestyle="none", marker="x", color="black", markersize=size, **settings)


# ---------------------------------------------------------------------------- theory


def damage_figure(demo: dict[str, Any]) -> Figure:
    """Spectra of a tone, after a linear layer, after an activation, and cut off by a window."""
    figure, panels = _panels(2, 2, 10.0, 7.0)
    damage, truncation = demo["damage"], demo["truncation"]
    titles = {
        "before": "One tone in each dimension: dimension 1",
        "linear": "After a linear layer: both tones leak in (Eq. 7)",
        "activation": "After GELU: harmonics and products (Eq. 8)",
    }
    for axes, (name, title) in zip(panels.flat, titles.items(), strict=False):
        axes.plot(damage["at"], damage[name], color=COLOURS[0], linewidth=1.2)
        if f"{name}_lines" in damage:
            lines = damage[f"{name}_lines"]
            heights = np.array(lines["predicted"])
            shown = heights > 1e-4
            _crosses(axes, np.array(lines["at"])[shown], heights[shown], 7, label="predicted")
            axes.legend(frameon=False, fontsize=9)
        axes.set(yscale="log", ylim=(1e-4, 2), xlim=(-0.05, 2))
        style_axes(axes, FREQUENCY, "amplitude of the cosine", title, grid="")
        for k, tone in enumerate(damage["tones"]):
            side, align = (1, "left") if tone == max(damage["tones"]) else (-1, "right")
            mark(axes, tone, f"w{k + 1}", (4 * side, -2), va="top", ha=align)
    axes = panels[1, 1]
    looks = line_styles(f"period {row['period']:g} tokens" for row in truncation["tones"])
    for row, (label, look) in zip(truncation["tones"], looks.items(), strict=True):
        label += f", {row['whole']} whole in {truncation['length']}"
        axes.plot(truncation["at"], row["numeric"], label=label, **_line(look))
        _crosses(axes, truncation["at"][::12], row["analytic"][::12], 4)
    mark(axes, truncation["floor"], "floor 2 pi / N", (3, -2))
    axes.set_ylim(-0.03, 1.3)
    title = f"Seen for {truncation['length']} tokens (Eq. 9-10); crosses: analytic"
    style_axes(axes, FREQUENCY, "|X| / N", title, legend={"loc": "upper right"}, pad=14)
    return figure


def extension_figure(demo: dict[str, Any]) -> Figure:
    """Fits within the training length and their extension beyond it, by sets of frequencies."""
    extension = demo["extension"]
    figure, panels = _panels(2, 1, 9.0, 6.4, sharex=True)
    titles = ("Dimension 1 after a linear layer", "Dimension 1 after a linear layer and GELU")
    looks = line_styles(["RoPE", "FoPE", "frequency-matched"])
    legend = {"frameon": True, "loc": "upper right", "fontsize": 8, "ncols": 2, "handlelength": 3}
    cases = extension["cases"].values()
    for axes, case, title in zip(panels[:, 0], cases, titles, strict=True):
        axes.plot(case["truth"], color="#999999", linewidth=3.5, label="truth", zorder=1)
        for label, look in looks.items():
            within, beyond = case["errors"][label]
            text = f"{label}: error {within:.2f}, beyond {beyond:.2f}"
            axes.plot(case["lines"][label], label=text, zorder=2, **_line(look))
        mark_length(axes, extension["length"], (3, 3), y=0)
        low, high = min(case["truth"]), max(case["truth"])
        axes.set_ylim(low - 0.5 * (high - low), high + 0.65 * (high - low))
        style_axes(axes, "", "value", title, grid="", legend=legend, loc="left")
    panels[-1, 0].set_xlabel("position (tokens)")
    return figure


def decay_figure(demo: dict[str, Any]) -> Figure:
    """The decay of q.k with distance under RoPE, by the mean of the entries."""
    decay = demo["decay"]
    figure, panels = _panels(1, len(decay["rows"]), 11.0, 3.6)
    for axes, row in zip(panels[0], decay["rows"], strict=True):
        expected, error = np.array(row["expected"]), 2 * row["error"]
        axes.fill_between(
            decay["distances"],
            expected - error,
            expected + error,
            color="#bbbbbb",
            alpha=0.6,
            linewidth=0,
            label="expected ± 2 standard errors",
        )
        drawn = {"color": COLOURS[0], "label": f"mean of {decay['samples']:,} draws"}
        axes.plot(decay["distances"], row["measured"], linewidth=1.0, **drawn)
        axes.plot(decay["distances"], expected, "k--", linewidth=1.0, label="expected")
        style_axes(axes, "distance (tokens)", "", f"entries of q and k from N({row['mean']:g}, 1)")
    panels[0, 0].set_ylabel(f"q.k, head of {decay['head_dim']} dimensions")
    panels[0, -1].legend(frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------------- a run


def energy_figure(measured: Measured) -> Figure:
    """Energy by layer and frequency: left the shortest context, right the longest."""
    contexts = sorted({row["context"] for row in measured["rows"]})
    ends = list(dict.fromkeys([contexts[0], contexts[-1]]))
    layers = len({row["layer"] for row in measured["rows"]})
    height = 4 * (0.95 + 0.16 * layers) + 1.6
    figure, panels = _panels(4, len(ends), 5.4 * len(ends), height, sharey=True)
    length = measured["training_length"]
    for column, context in enumerate(ends):
        curves = _curves(measured, context)
        for axes, (key, name) in zip(panels[:, column], SIGNALS.items(), strict=True):
            image = _heatmap(axes, np.array([curve[key] for curve in curves]), context)
            floor = 2 * math.pi / length
            axes.axvline(floor, color="white", linewidth=2.4)
            axes.axvline(floor, color="black", linewidth=1.2, linestyle=DASHES)
            for layer, curve in enumerate(curves):
                visible = [w for w in curve["own"] or () if w > math.pi / context]
                for color, size, width in (("white", 9, 2.6), ("black", 8, 1.1)):
                    bars = {"color": color, "markersize": size, "markeredgewidth": width}
                    axes.plot(visible, [layer] * len(visible), linestyle="none", marker="|", **bars)
            axes.set_title(f"{name}, windows of {context:,} tokens", fontsize=9, loc="left")
            if column == 0:
                axes.set_ylabel("layer", fontsize=9)
        panels[-1, column].set_xlabel(FREQUENCY)
    label = "log10 of the energy per radian, largest of a row 0"
    figure.colorbar(image, ax=panels, shrink=0.6, label=label)
    note = f"bars: own frequencies; dashes: floor 2 pi / {length:,}"
    figure.suptitle(f"{_title(measured)}\n{note}", fontsize=11)
    return figure


def _heatmap(axes: Axes, powers: np.ndarray, context: int) -> Any:
    """Relative energy, one row a layer; frequency 0 has no place on the logarithmic axis."""
    layers, bins = powers.shape
    relative = powers[:, 1:] / np.maximum(powers[:, 1:].max(axis=1, keepdims=True), 1e-300)
    values = np.maximum(np.log10(np.maximum(relative, 1e-300)), -DECADES)
    edges = (np.arange(1, bins + 1) - 0.5) * 2 * math.pi / context
    rows = np.arange(layers + 1) - 0.5
    scale = {"cmap": "cividis", "vmin": -DECADES, "vmax": 0}
    image = axes.pcolormesh(edges, rows, values, rasterized=True, **scale)
    axes.set_xscale("log")
    axes.set_yticks(range(layers))
    return image


def profile_figure(measured: Measured) -> Figure:
    """Mean logit at each distance in the longest windows, one line a layer."""
    figure, panels = _panels(1, 1, 8.0, 3.8)
    axes = panels[0, 0]
    context = max(row["context"] for row in measured["rows"])
    curves = _curves(measured, context)
    looks = line_styles(f"layer {layer}" for layer in range(len(curves)))
    for (label, look), curve in zip(looks.items(), curves, strict=True):
        far = int(0.95 * context)  # the last distances are means over few pairs
        axes.plot(curve["profile"][:far], label=label, **_line(look))
    mark_length(axes, measured["training_length"], (3, 3), y=0)
    legend = {"ncols": 4, "handlelength": 3}
    x, y = "distance from query to key (tokens)", "mean logit, heads' mean"
    style_axes(axes, x, y, _title(measured), legend=legend, loc="left")
    return figure


def sizes_figure(states: Sequence[Measured]) -> Figure:
    """Mean |q| and |k| by dimension of a head; undertrained dimensions are shaded."""
    figure, panels = _panels(1, 2, 10.0, 3.8, sharey=True)
    looks = line_styles(state_name(measured) for measured in states)
    slow = [d for p in states[-1]["pairs"] if p["undertrained"] for d in p["dims"]]
    for axes, key, name in zip(panels[0], ("q_size", "k_size"), ("|q|", "|k|"), strict=True):
        for measured in states:
            sizes = np.array([row[key] for row in _rows(measured, measured["training_length"])])
            dims, look = range(sizes.shape[1]), looks[state_name(measured)]
            low, high = sizes.min(axis=0), sizes.max(axis=0)
            axes.fill_between(dims, low, high, color=look.color, alpha=0.15, linewidth=0)
            style = look._asdict() | {"linewidth": 1.2, "markersize": 3.5}
            axes.plot(dims, sizes.mean(axis=0), label=state_name(measured), **style)
        for dim in slow:
            axes.axvspan(dim - 0.5, dim + 0.5, color="#e6e6e6", zorder=0, linewidth=0)
        style_axes(axes, "dimension of the head", f"mean {name}, before the rotation", grid="y")
    panels[0, 1].legend(frameon=False, fontsize=8.5)
    note = "grey: undertrained dimensions" if slow else "no dimension is undertrained"
    figure.suptitle(f"{_title(states[-1])}: mean and range over layers; {note}", fontsize=10)
    return figure


def attention_figure(states: Sequence[Measured]) -> Figure:
    """Entropy and mean distance of attention by context length, range over layers and heads."""
    figure, panels = _panels(1, 2, 10.0, 3.8)
    looks = line_styles([*(state_name(measured) for measured in states), "all keys alike"])
    names = {
        "entropy": "entropy of attention (nats)",
        "distance": "mean distance of attention (tokens)",
    }
    for axes, (key, name) in zip(panels[0], names.items(), strict=True):
        for measured in states:
            contexts = sorted({row["context"] for row in measured["rows"]})
            heads = [np.concatenate([r[key] for r in _rows(measured, c)]) for c in contexts]
            means = np.array([x.mean() for x in heads])
            around = [means - [x.min() for x in heads], [x.max() for x in heads] - means]
            look = looks[state_name(measured)]._asdict() | {"linewidth": 1.5, "markersize": 5}
            label = state_name(measured)
            axes.errorbar(contexts, means, yerr=around, capsize=3, label=label, **look)
        keys = [c - np.arange(states[0]["rows"][0]["last"]) for c in contexts]
        even = [(np.log(n) if key == "entropy" else (n - 1) / 2).mean() for n in keys]
        axes.plot(contexts, even, "k:", linewidth=1, label="all keys alike")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axes.minorticks_off()
        style_axes(axes, "context length (tokens)", name)
    panels[0, 1].set_yscale("log", base=2)
    panels[0, 1].yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panels[0, 0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(f"{_title(states[-1])}: mean and range over layers and heads", fontsize=10)
    return figure


def _rows(measured: Measured, context: int) -> list[dict[str, Any]]:
    """The rows of ``context`` or, if it was not measured, of the shortest context."""
    contexts = {row["context"] for row in measured["rows"]}
    context = context if context in contexts else min(contexts)
    return [row for row in measured["rows"] if row["context"] == context]


def _curves(measured: Measured, context: int) -> list[dict[str, Any]]:
    pairs = zip(measured["rows"], measured["curves"], strict=True)
    return [curve for row, curve in pairs if row["context"] == context]


def state_name(measured: Measured) -> str:
    return f"step {measured['step']:,}" if measured["step"] else "untrained"


def _title(measured: Measured) -> str:
    return f"{measured['variant']}, seed {measured['seed']}, {state_name(measured)}"
