"""Charts that answer to the mouse: Vega-Lite specifications, and the library for the page.

A curve is switched by a checkbox of the page, hence also from the keyboard; the y axis follows. The
nearest point says its numbers. Without scripts the page shows the picture of the same chart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fope_jax.extras import require
from fope_jax.report.charts import Chart, Curve
from fope_jax.report.plots import DARK_GREY, DASHES, GREY
from fope_jax.report.styles import Style
from fope_jax.storage.files import write_text
from fope_jax.storage.paths import user_cache_dir

HEIGHT = 320  # pixels
# Markers as paths between -1 and 1, for Vega and for the keys beside the checkboxes.
PATHS = {
    "o": "M-.9,0A.9,.9 0 1 1 .9,0A.9,.9 0 1 1 -.9,0Z",
    "s": "M-.8,-.8H.8V.8H-.8Z",
    "^": "M0,-1L1,.8H-1Z",
    "v": "M0,1L1,-.8H-1Z",
    "<": "M-1,0L.8,-1V1Z",
    ">": "M1,0L-.8,-1V1Z",
    "D": "M0,-1L1,0L0,1L-1,0Z",
    "P": "M-.35,-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
    "X": "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z",
    "*": "M0,-1L.25,-.3H1L.4,.15L.6,.9L0,.45L-.6,.9L-.4,.15L-1,-.3H-.25Z",
}
CONFIG = {
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#ddd",
    }
}
DASH_PATTERNS = {"-": [], "--": [7, 3], "-.": [8, 2, 2, 2], ":": [2, 2]}


class Key(NamedTuple):
    """A checkbox of the page: a curve, how it looks, and whether it is shown at first."""

    text: str
    color: str
    path: str
    dashes: str
    is_shown: bool


def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script; made once and kept in the user's cache."""
    vl_convert = require("vl_convert", "train")
    path = user_cache_dir() / f"vega-{vl_convert.__version__}.js"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    script = vl_convert.javascript_bundle()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, script)
    except OSError:  # it is made anew next time
        pass
    return script


def keys(chart: Chart, styles: Mapping[str, Style]) -> list[Key]:
    """The checkboxes, in the order of the curves."""
    return [
        Key(
            f"{label} (up to {chart.show(chart.outside[label])})"
            if label in chart.outside
            else label,
            styles[label].color,
            PATHS[styles[label].marker],
            " ".join(map(str, _dashes(styles[label]))),
            is_shown(chart, label),
        )
        for label in chart.curves
    ]


def is_shown(chart: Chart, label: str) -> bool:
    """Whether a curve is there at first: those that the picture has in colour and inside."""
    return label in chart.coloured and label not in chart.outside


def as_json(specification: Mapping[str, Any]) -> str:
    """The specification as text that may stand inside a script element."""
    return json.dumps(specification, separators=(",", ":")).replace("<", "\\u003c")


def vega_lite(chart: Chart, styles: Mapping[str, Style]) -> dict[str, Any]:
    """The chart as a Vega-Lite specification; parameter ``show_i`` switches curve i."""
    shown = [
        {"name": f"show_{i}", "value": is_shown(chart, label)}
        for i, label in enumerate(chart.curves)
    ]
    switches = ",".join(param["name"] for param in shown)
    return {
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": "white",
        "params": shown,
        "data": {"values": _values(chart)},
        "transform": [{"filter": f"[{switches}][datum.n]"}],
        "layer": [
            *_rules(chart),
            *_intervals(chart, styles),
            _lines(chart, styles),
            _points(chart, styles),
        ],
        "config": CONFIG,
    }


def vega_lite_by_context(
    charts: Mapping[int, Chart], styles: Mapping[str, Style]
) -> dict[str, Any]:
    """Charts of the same curves, one a context length, of which a list selects one."""
    longest = max(charts)
    specification = vega_lite(charts[longest], styles)
    select = {"input": "select", "options": list(charts), "name": "context length (tokens) "}
    specification["params"].append({"name": "context", "value": longest, "bind": select})
    specification["transform"].append({"filter": "datum.context == context"})
    specification["data"]["values"] = [
        record | {"context": context}
        for context, chart in charts.items()
        for record in _values(chart)
    ]
    return specification


def _values(chart: Chart) -> list[dict[str, Any]]:
    """A record a point; ``n`` is the number of its curve."""
    records = []
    for n, (label, curve) in enumerate(chart.curves.items()):
        for i, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
            if not math.isfinite(y):
                continue
            record = {"n": n, "label": label, "x": _short(x), "y": _short(y)}
            record["value"] = _in_words(chart, curve, i)
            for name, ends in (("w", curve.whiskers), ("b", curve.band)):
                if ends is not None and all(map(math.isfinite, ends[i])):
                    low, high = ends[i]
                    record |= {f"{name}0": _short(low), f"{name}1": _short(high)}
            records.append(record)
    return records


def _short(value: float) -> float:
    """Six significant digits: a page has thousands of numbers."""
    return float(f"{value:.6g}")


def _in_words(chart: Chart, curve: Curve, i: int) -> str:
    ends = curve.whiskers or curve.band
    text = chart.show(curve.y[i])
    return (
        text
        if ends is None
        else f"{text} ({chart.show(ends[i].low)} to {chart.show(ends[i].high)})"
    )


def _x(chart: Chart) -> dict[str, Any]:
    scale: dict[str, Any] = {"nice": False, "padding": 12}  # pixels, for the markers at the ends
    if chart.is_linear:
        scale |= {"type": "linear", "zero": False}
    else:
        scale |= {"type": "log", "base": 2 if chart.ticks else 10}
    axis: dict[str, Any] = {"format": "~s", "grid": False, "labelOverlap": True, "tickCount": 6}
    if chart.ticks:
        axis |= {"values": chart.ticks, "format": ",d"}
    return {
        "field": "x",
        "type": "quantitative",
        "title": chart.x_label,
        "scale": scale,
        "axis": axis,
    }


def _y(chart: Chart) -> dict[str, Any]:
    scale: dict[str, Any] = {"type": "log" if chart.is_log else "linear", "zero": False}
    axis: dict[str, Any] = {"tickCount": 6}
    if chart.is_log:
        scale |= {"nice": False, "padding": 8}
        axis = {"values": _log_ticks(chart), "format": ",~r"}
    if chart.limits and not chart.outside:
        scale |= {"domain": list(chart.limits), "nice": False}
    return {
        "field": "y",
        "type": "quantitative",
        "title": chart.y_label,
        "scale": scale,
        "axis": axis,
    }


def _dashes(style: Style) -> list[float]:
    line = style.linestyle
    return DASH_PATTERNS[line] if isinstance(line, str) else [2 * length for length in line[1]]


def _log_ticks(chart: Chart) -> list[float]:
    """1, 2 and 5 times the powers of ten about the curves; powers alone where they span many."""
    values = [y for curve in chart.curves.values() for y in curve.y if 0 < y < math.inf]
    low, high = (math.floor(math.log10(end)) for end in (min(values), max(values)))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    return [_short(step * 10.0**power) for power in range(low, high + 1) for step in steps]


def _by_label(chart: Chart, of_label: Mapping[str, Any]) -> dict[str, Any]:
    scale = {"domain": list(chart.curves), "range": [of_label[name] for name in chart.curves]}
    return {"field": "label", "type": "nominal", "scale": scale, "legend": None}


def _colours(chart: Chart, styles: Mapping[str, Style]) -> dict[str, Any]:
    return _by_label(chart, {label: styles[label].color for label in chart.curves})


def _rules(chart: Chart) -> list[dict[str, Any]]:
    """Training lengths, and the level."""
    marks = []
    for length in chart.lengths:
        data, x = {"values": [{"x": length}]}, {"field": "x", "type": "quantitative"}
        rule = {"type": "rule", "strokeDash": list(DASHES[1]), "color": GREY}
        one = len(chart.lengths) == 1
        text = f"training length {length:,}" if one else f"L = {length:,}"
        label = {"type": "text", "align": "left" if one else "center", "baseline": "bottom"}
        marks += [
            {"data": data, "mark": rule, "encoding": {"x": x}},
            {
                "data": data,
                "mark": label | {"text": text, "color": DARK_GREY},
                "encoding": {"x": x, "y": {"value": -3}},
            },
        ]
    if chart.level is not None:
        level = {"type": "rule", "color": GREY, "strokeWidth": 0.8}
        marks.append(
            {
                "data": {"values": [{"y": chart.level}]},
                "mark": level,
                "encoding": {"y": {"field": "y", "type": "quantitative"}},
            }
        )
    return marks


def _intervals(chart: Chart, styles: Mapping[str, Style]) -> list[dict[str, Any]]:
    """Bands (b0 to b1) and whiskers (w0 to w1), where the chart has them."""
    curves, layers = chart.curves.values(), []
    for name, mark, is_drawn in (
        (
            "b",
            {"type": "area", "opacity": 0.12, "clip": True},
            any(c.band is not None for c in curves),
        ),
        ("w", {"type": "rule", "clip": True}, any(c.whiskers is not None for c in curves)),
    ):
        if is_drawn:
            encoding = {
                "x": _x(chart),
                "y": _y(chart) | {"field": f"{name}0"},
                "y2": {"field": f"{name}1"},
                "color": _colours(chart, styles),
            }
            there = [{"filter": f"isValid(datum.{name}0)"}]
            layers.append({"transform": there, "mark": mark, "encoding": encoding})
    return layers


def _lines(chart: Chart, styles: Mapping[str, Style]) -> dict[str, Any]:
    dashes = {label: _dashes(styles[label]) or [1, 0] for label in chart.curves}
    return {
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {
            "x": _x(chart),
            "y": _y(chart),
            "color": _colours(chart, styles),
            "strokeDash": _by_label(chart, dashes),
        },
    }


def _points(chart: Chart, styles: Mapping[str, Style]) -> dict[str, Any]:
    """Markers; where points are dense, only that under the mouse."""
    hovered = {"param": "hovered", "empty": False}
    paths = {label: PATHS[styles[label].marker] for label in chart.curves}
    point = "(datum.datum || datum)"  # of the cell under the mouse, whose own text fields are empty
    x_title, y_title = json.dumps(chart.x_label.split(" (k:")[0]), json.dumps(chart.y_label)
    tip = (
        f"{{curve: {point}.label, {x_title}: format({point}.x, ',.0f'), {y_title}: {point}.value}}"
    )
    return {
        "params": [
            {
                "name": "hovered",
                "select": {
                    "type": "point",
                    "on": "pointerover",
                    "clear": "pointerout",
                    "nearest": True,
                },
            }
        ],
        "mark": {"type": "point", "filled": True, "tooltip": {"expr": tip}},
        "encoding": {
            "x": _x(chart),
            "y": _y(chart),
            "color": _colours(chart, styles),
            "shape": _by_label(chart, paths),
            "size": {"condition": hovered | {"value": 150}, "value": 55},
            "opacity": {"condition": hovered | {"value": 1}, "value": 0 if chart.is_dense else 1},
        },
    }
