"""Figures of spectra: the theory on signals made for it, and what a run's checkpoint does.

Rows and curves come from ``fope_jax.spectrum``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fope_jax.extras import require
from fope_jax.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measured = dict[str, Any]
LIMIT = "#555555"  # of marks at the training length and the floor
FLOOR = (0, (2, 2))
DECADES = 4  # of energy that a heatmap spans below its largest
SIGNALS = {
    "logits_power": "logits, over distance",
    "q_power": "q, over position",
    "k_power": "k, over position",
    "hidden_power": "hidden states, over position",
}


def _figure(rows: int, columns: int, width: float, height: float, **settings: Any) -> Any:
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(width, height), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, **settings)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _grid(axes: Axes) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------- theory


def damage_figure(demo: dict[str, Any]) -> Figure:
    """A tone, after a linear layer, after an activation and cut off: spectra with predictions."""
    figure, panels = _figure(2, 2, 10.0, 7.0)
    damage, cut = demo["damage"], demo["truncation"]
    (before, linear), (activation, truncated) = panels
    titles = (
        (before, "before", "One tone in each dimension: dimension 1"),
        (linear, "linear", "After a linear layer: both tones leak in (Eq. 7)"),
        (activation, "activation", "After GELU: harmonics and products (Eq. 8)"),
    )
    for axes, name, title in titles:
        axes.plot(damage["at"], damage[name], color=plots.COLOURS[0], linewidth=1.2)
        if f"{name}_lines" in damage:
            lines = damage[f"{name}_lines"]
            seen = [k for k, height in enumerate(lines["predicted"]) if height > 1e-4]
            axes.plot(
                [lines["at"][k] for k in seen],
                [lines["predicted"][k] for k in seen],
                linestyle="none",
                marker="x",
                color="black",
                markersize=7,
                label="predicted",
            )
            axes.legend(frameon=False, fontsize=9)
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 2)
        axes.set_xlim(-0.05, 2)
        axes.set_xlabel("frequency (radians per token)")
        axes.set_ylabel("amplitude of the cosine")
        axes.set_title(title, fontsize=10)
        for k, tone in enumerate(damage["tones"]):
            axes.axvline(tone, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
            side = 1 if tone == max(damage["tones"]) else -1
            axes.annotate(
                f"w{k + 1}",
                (tone, 1),
                xycoords=axes.get_xaxis_transform(),
                fontsize=8.5,
                xytext=(4 * side, -2),
                textcoords="offset points",
                va="top",
                ha="left" if side > 0 else "right",
            )
    looks = plots.line_styles(f"period {row['period']:g} tokens" for row in cut["tones"])
    for row, (label, look) in zip(cut["tones"], looks.items(), strict=True):
        style = look._asdict() | {"marker": None}
        label += f", {row['whole']} whole in {cut['length']}"
        truncated.plot(cut["at"], row["numeric"], label=label, linewidth=1.4, **style)
        truncated.plot(
            cut["at"][::12],
            row["analytic"][::12],
            linestyle="none",
            marker="x",
            color="black",
            markersize=4,
        )
    truncated.axvline(cut["floor"], color=LIMIT, linewidth=1.2, linestyle=FLOOR, zorder=0)
    truncated.annotate(
        "floor 2 pi / N",
        (cut["floor"], 1),
        xycoords=truncated.get_xaxis_transform(),
        xytext=(3, -2),
        textcoords="offset points",
        fontsize=8.5,
        va="bottom",
        color="#444444",
    )
    truncated.set_xlabel("frequency (radians per token)")
    truncated.set_ylabel("|X| / N")
    truncated.set_ylim(-0.03, 1.3)
    truncated.set_title(
        f"Seen for {cut['length']} tokens (Eq. 9-10); crosses: analytic", fontsize=10, pad=14
    )
    truncated.legend(frameon=False, fontsize=8.5, loc="upper right")
    _grid(truncated)
    return figure


def extension_figure(demo: dict[str, Any]) -> Figure:
    """What a dimension may carry, fitted within the training length and extended beyond it."""
    extension = demo["extension"]
    figure, panels = _figure(2, 1, 9.0, 6.4, sharex=True)
    titles = {
        "linear": "Dimension 1 after a linear layer",
        "activation": "Dimension 1 after a linear layer and GELU",
    }
    drawn = ("RoPE", "FoPE", "frequency-matched")
    looks = plots.line_styles(drawn)
    for axes, (name, case) in zip(panels[:, 0], extension["cases"].items(), strict=True):
        axes.plot(case["truth"], color="#999999", linewidth=3.5, label="truth", zorder=1)
        for label in drawn:
            style = looks[label]._asdict() | {"marker": None}
            within, beyond = case["errors"][label]
            axes.plot(
                case["lines"][label],
                linewidth=1.3,
                zorder=2,
                **style,
                label=f"{label}: error {within:.2f}, beyond {beyond:.2f}",
            )
        _mark_length(axes, extension["length"])
        axes.set_ylabel("value")
        axes.set_title(titles[name], fontsize=10, loc="left")
        axes.legend(loc="upper right", fontsize=8, ncols=2, framealpha=0.85, handlelength=3)
        low, high = min(case["truth"]), max(case["truth"])
        axes.set_ylim(low - 0.5 * (high - low), high + 0.65 * (high - low))
    panels[-1, 0].set_xlabel("position (tokens)")
    return figure


def decay_figure(demo: dict[str, Any]) -> Figure:
    """RoPE's decay with distance, which the mean of the entries makes."""
    decay = demo["decay"]
    figure, panels = _figure(1, len(decay["rows"]), 11.0, 3.6)
    for axes, row in zip(panels[0], decay["rows"], strict=True):
        expected, error = row["expected"], 2 * row["error"]
        axes.fill_between(
            decay["distances"],
            [x - error for x in expected],
            [x + error for x in expected],
            color="#bbbbbb",
            alpha=0.6,
            linewidth=0,
            label="expected ± 2 standard errors",
        )
        axes.plot(
            decay["distances"],
            row["measured"],
            color=plots.COLOURS[0],
            linewidth=1.0,
            label=f"mean of {decay['samples']:,} draws",
        )
        axes.plot(
            decay["distances"],
            expected,
            color="black",
            linestyle="--",
            linewidth=1.0,
            label="expected",
        )
        axes.set_title(f"entries of q and k from N({row['mean']:g}, 1)", fontsize=10)
        axes.set_xlabel("distance (tokens)")
        _grid(axes)
    panels[0, 0].set_ylabel(f"q.k, head of {decay['head_dim']} dimensions")
    panels[0, -1].legend(frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------------- a run


def energy_figure(measured: Measured) -> Figure:
    """Energy by layer and frequency: within the training length left, at the longest right."""
    contexts = sorted({row["context"] for row in measured["rows"]})
    ends = list(dict.fromkeys([contexts[0], contexts[-1]]))
    layers = len({row["layer"] for row in measured["rows"]})
    figure, panels = _figure(
        4, len(ends), 5.4 * len(ends), 4 * (0.95 + 0.16 * layers) + 1.6, sharey=True
    )
    floor = 2 * math.pi / measured["training_length"]
    for column, context in enumerate(ends):
        curves = _curves(measured, context)
        for line, (key, name) in enumerate(SIGNALS.items()):
            axes = panels[line, column]
            image = _heatmap(axes, [curve[key] for curve in curves], context)
            axes.axvline(floor, color="white", linewidth=2.4)
            axes.axvline(floor, color="black", linewidth=1.2, linestyle=FLOOR)
            for layer, curve in enumerate(curves):
                own = [w for w in curve["own"] or () if w > 2 * math.pi / context / 2]
                axes.plot(
                    own,
                    [layer] * len(own),
                    linestyle="none",
                    marker="|",
                    markersize=9,
                    color="white",
                    markeredgewidth=2.6,
                )
                axes.plot(
                    own,
                    [layer] * len(own),
                    linestyle="none",
                    marker="|",
                    markersize=8,
                    color="black",
                    markeredgewidth=1.1,
                )
            axes.set_title(f"{name}, windows of {context:,} tokens", fontsize=9, loc="left")
            if column == 0:
                axes.set_ylabel("layer", fontsize=9)
        panels[-1, column].set_xlabel("frequency (radians per token)")
    figure.colorbar(
        image, ax=panels, shrink=0.6, label="log10 of the energy per radian, largest of a row 0"
    )
    figure.suptitle(
        f"{_title(measured)}\nbars: own frequencies; dashes: floor 2 pi / "
        f"{measured['training_length']:,}",
        fontsize=11,
    )
    return figure


def _heatmap(axes: Axes, powers: Sequence[Sequence[float]], context: int) -> Any:
    """A row a layer, without the constant: a logarithmic axis has no place for frequency 0."""
    step = 2 * math.pi / context
    edges = [(k - 0.5) * step for k in range(1, len(powers[0]) + 1)]
    values = []
    for power in powers:
        top = max(max(power[1:]), 1e-300)
        values.append([max(-DECADES, math.log10(max(x / top, 1e-300))) for x in power[1:]])
    image = axes.pcolormesh(
        edges,
        [k - 0.5 for k in range(len(powers) + 1)],
        values,
        cmap="cividis",
        vmin=-DECADES,
        vmax=0,
        rasterized=True,
    )
    axes.set_xscale("log")
    axes.set_yticks(range(len(powers)))
    return image


def profile_figure(measured: Measured) -> Figure:
    """The mean logit at each distance, of the longest windows, one line a layer."""
    figure, panels = _figure(1, 1, 8.0, 3.8)
    axes = panels[0, 0]
    context = max(row["context"] for row in measured["rows"])
    curves = _curves(measured, context)
    looks = plots.line_styles(f"layer {layer}" for layer in range(len(curves)))
    for (label, look), curve in zip(looks.items(), curves, strict=True):
        far = int(0.95 * context)  # a mean over a few pairs at the very end
        axes.plot(
            curve["profile"][:far],
            label=label,
            linewidth=1.2,
            **(look._asdict() | {"marker": None}),
        )
    _mark_length(axes, measured["training_length"])
    axes.set_xlabel("distance from query to key (tokens)")
    axes.set_ylabel("mean logit, heads' mean")
    axes.set_title(_title(measured), fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8.5, ncols=4, handlelength=3)
    _grid(axes)
    return figure


def sizes_figure(states: Sequence[Measured]) -> Figure:
    """Mean |q| and |k| by dimension of a head; those that never turned fully are shaded."""
    figure, panels = _figure(1, 2, 10.0, 3.8, sharey=True)
    looks = plots.line_styles(_state(measured) for measured in states)
    for axes, key, name in zip(panels[0], ("q_size", "k_size"), ("|q|", "|k|"), strict=True):
        for measured in states:
            rows = [r[key] for r in _rows(measured, measured["training_length"])]
            across = list(zip(*rows, strict=True))
            dims = range(len(across))
            look = looks[_state(measured)]
            axes.fill_between(
                dims,
                [min(x) for x in across],
                [max(x) for x in across],
                color=look.color,
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(
                dims,
                [sum(x) / len(x) for x in across],
                label=_state(measured),
                linewidth=1.2,
                markersize=3.5,
                **look._asdict(),
            )
        slow = [d for p in states[-1]["pairs"] if p["undertrained"] for d in p["dims"]]
        for dim in slow:
            axes.axvspan(dim - 0.5, dim + 0.5, color="#e6e6e6", zorder=0, linewidth=0)
        axes.set_xlabel("dimension of the head")
        axes.set_ylabel(f"mean {name}, before the rotation")
        axes.grid(True, axis="y", color="#dddddd", linewidth=0.7)
    panels[0, 1].legend(frameon=False, fontsize=8.5)
    told = "; grey: undertrained dimensions" if slow else "; no dimension is undertrained"
    figure.suptitle(f"{_title(states[-1])}: mean and range over layers{told}", fontsize=10)
    return figure


def attention_figure(states: Sequence[Measured]) -> Figure:
    """Entropy and mean distance of attention by context length, range over layers and heads."""
    figure, panels = _figure(1, 2, 10.0, 3.8)
    looks = plots.line_styles([*(_state(measured) for measured in states), "all keys alike"])
    parts = (
        ("entropy", "entropy of attention (nats)"),
        ("distance", "mean distance of attention (tokens)"),
    )
    for axes, (key, name) in zip(panels[0], parts, strict=True):
        for measured in states:
            contexts = sorted({row["context"] for row in measured["rows"]})
            heads = [[x for r in _rows(measured, c) for x in r[key]] for c in contexts]
            means = [sum(x) / len(x) for x in heads]
            around = [
                [m - min(x) for m, x in zip(means, heads, strict=True)],
                [max(x) - m for m, x in zip(means, heads, strict=True)],
            ]
            axes.errorbar(
                contexts,
                means,
                yerr=around,
                capsize=3,
                linewidth=1.5,
                markersize=5,
                label=_state(measured),
                **looks[_state(measured)]._asdict(),
            )
        seen = [[c - j for j in range(states[0]["rows"][0]["last"])] for c in contexts]
        even = [
            sum(math.log(n) if key == "entropy" else (n - 1) / 2 for n in own) / len(own)
            for own in seen
        ]
        axes.plot(contexts, even, color="black", linewidth=1, linestyle=":", label="all keys alike")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axes.minorticks_off()
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel(name)
        _grid(axes)
    panels[0, 1].set_yscale("log", base=2)
    panels[0, 1].yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panels[0, 0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(f"{_title(states[-1])}: mean and range over layers and heads", fontsize=10)
    return figure


def _rows(measured: Measured, context: int) -> list[dict[str, Any]]:
    """The rows of a context, the shortest where it was not measured."""
    contexts = {row["context"] for row in measured["rows"]}
    context = context if context in contexts else min(contexts)
    return [row for row in measured["rows"] if row["context"] == context]


def _curves(measured: Measured, context: int) -> list[dict[str, Any]]:
    pairs = zip(measured["rows"], measured["curves"], strict=True)
    return [curve for row, curve in pairs if row["context"] == context]


def _state(measured: Measured) -> str:
    return f"step {measured['step']:,}" if measured["step"] else "untrained"


def _title(measured: Measured) -> str:
    return f"{measured['variant']}, seed {measured['seed']}, {_state(measured)}"


def _mark_length(axes: Axes, length: int) -> None:
    axes.axvline(length, color=LIMIT, linewidth=1.2, linestyle=FLOOR, zorder=0)
    axes.annotate(
        f"training length {length:,}",
        (length, 0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(3, 3),
        textcoords="offset points",
        va="bottom",
        fontsize=8.5,
        color="#444444",
    )
