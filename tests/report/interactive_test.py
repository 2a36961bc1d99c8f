"""Live charts: the specification holds the chart's numbers, and Vega can draw it."""

import dataclasses
import json
import math
import re

import pytest
import vl_convert

from fope_jax.report import charts, interactive
from fope_jax.report.bootstrap import Interval
from fope_jax.report.styles import method_styles

CURVES = {
    "rope": charts.Curve([128, 256], [3.0, 9.0], [Interval(2.9, 3.1), Interval(8.0, 10.0)]),
    "fope": charts.Curve([128, 256], [3.1, math.inf]),
    "lost": charts.Curve([128, 256], [3.2, 1e6], band=[Interval(3.0, 4.0), Interval(1.0, 2e6)]),
}
CHART = charts.Chart(
    title="t",
    subtitle="s",
    x_label="context length (tokens)",
    y_label="loss",
    curves=CURVES,
    coloured=["rope", "lost"],
    ticks=[128, 256],
    lengths=[128],
    level=1.0,
    outside={"lost": 1e6},
)
STYLES = method_styles(CURVES)


def test_every_finite_point_is_there_with_its_interval():
    values = interactive.vega_lite(CHART, STYLES)["data"]["values"]
    assert [(v["label"], v["x"], v["y"]) for v in values] == [
        ("rope", 128, 3.0),
        ("rope", 256, 9.0),
        ("fope", 128, 3.1),
        ("lost", 128, 3.2),
        ("lost", 256, 1e6),
    ]
    assert (values[1]["w0"], values[1]["w1"], values[1]["value"]) == (
        8.0,
        10.0,
        "9.00 (8.00 to 10.00)",
    )
    assert (values[3]["b0"], values[3]["b1"]) == (3.0, 4.0)
    assert "w0" not in values[2]


def test_the_curves_of_the_picture_are_on_at_first_and_each_has_a_key():
    specification = interactive.vega_lite(CHART, STYLES)
    assert specification["params"] == [
        {"name": "show_0", "value": True},
        {"name": "show_1", "value": False},  # grey in the picture
        {"name": "show_2", "value": False},  # far above all others
    ]
    keys = interactive.keys(CHART, STYLES)
    assert [(key.text, key.is_shown) for key in keys] == [
        ("rope", True),
        ("fope", False),
        ("lost (up to 1.00e+06)", False),
    ]
    assert {key.color for key in keys} == {style.color for style in STYLES.values()}


def test_a_list_selects_the_context():
    short = dataclasses.replace(CHART, curves={"rope": charts.Curve([1], [2.0])})
    specification = interactive.vega_lite_by_context({128: short, 256: CHART}, STYLES)
    select = specification["params"][-1]
    assert (select["name"], select["value"], select["bind"]["options"]) == (
        "context",
        256,
        [128, 256],
    )
    values = [(v["context"], v["label"], v["y"]) for v in specification["data"]["values"]]
    assert values[:2] == [(128, "rope", 2.0), (256, "rope", 3.0)]
    assert {"filter": "datum.context == context"} in specification["transform"]


def test_a_name_cannot_end_the_script():
    chart = dataclasses.replace(CHART, y_label="</script><b>")
    text = interactive.as_json(interactive.vega_lite(chart, STYLES))
    assert "<" not in text
    assert json.loads(text) == interactive.vega_lite(chart, STYLES)


def test_vega_draws_the_curves_that_are_on():
    specification = interactive.vega_lite(CHART, STYLES) | {"width": 400}
    svg = vl_convert.vegalite_to_svg(specification)
    described = re.findall(r'aria-label="context length \(tokens\): ([^"]*)"', svg)
    assert any("label: rope" in text for text in described)
    assert not any("label: fope" in text for text in described)
    assert "training length 128" in svg
    for style in STYLES.values():
        assert (style.color.lower() in svg.lower()) == (style == STYLES["rope"])


@pytest.mark.parametrize("is_writable", [True, False])
def test_the_library_is_bundled_once_and_kept(is_writable, monkeypatch, tmp_path):
    bundled = []

    def bundle():
        bundled.append(1)
        return "window.vegaEmbed"

    place = tmp_path / "cache"
    if not is_writable:
        place.write_text("no directory")
    monkeypatch.setenv("FOPE_CACHE", str(place))
    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    assert interactive.library() == interactive.library() == "window.vegaEmbed"
    assert len(bundled) == (1 if is_writable else 2)
