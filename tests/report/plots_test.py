"""Pictures: what is drawn is the chart, and grey print keeps the curves apart."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fope_jax.report import charts, plots
from fope_jax.report.comparison import comparisons
from fope_jax.report.rows import read_runs
from fope_jax.report.styles import (
    COLOURS,
    KNOWN,
    LINES,
    MARKERS,
    MORE_COLOURS,
    line_styles,
    method_styles,
    read_names,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def styles(synthetic):
    return method_styles(synthetic.LOSSES)


@pytest.fixture
def perplexity(four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    return charts.perplexity_chart(comparison)


def drawn(axes):
    """``{label: [x, y]}`` of the coloured curves."""
    return {
        bars.get_label(): np.asarray(bars.lines[0].get_data(), float) for bars in axes.containers
    }


def test_curves_are_those_of_the_chart(synthetic, perplexity, styles):
    figure = plots.chart_figure(perplexity, styles)
    (axes,) = figure.axes
    for label, (x, y) in drawn(axes).items():
        assert x.tolist() == perplexity.curves[label].x
        np.testing.assert_allclose(y, perplexity.curves[label].y, rtol=1e-12)
    assert list(drawn(axes)) == list(synthetic.LOSSES)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == [f"{c:,}" for c in synthetic.CONTEXTS]
    assert "training length 128" in [text.get_text() for text in axes.texts]
    assert any(list(line.get_xdata()) == [128, 128] for line in axes.lines)
    assert {"alibi", "fope", "nope", "rope"} <= {text.get_text() for text in axes.texts}
    assert "protocol same-tokens, 9,600 tokens. 1 seed" in axes.get_title()


def many(count):
    curves = {f"method {i}": charts.Curve([128, 2048], [3.0, 3.0 + i]) for i in range(count)}
    curves["lost"] = charts.Curve([128, 2048], [3.0, 9e9])
    coloured = charts.curves_in_colour(curves)
    axes = {"ticks": [128, 2048], "lengths": [128], "limits": (2.0, 20.0)}
    return charts.Chart("t", "s", "x", "y", curves, coloured, outside={"lost": 9e9}, **axes)


@pytest.mark.parametrize("count", [12, 40])
def test_every_curve_is_named_at_its_end_and_those_of_many_are_grey(count):
    chart = many(count)
    figure = plots.chart_figure(chart, method_styles(chart.curves))
    (axes,) = figure.axes
    assert set(drawn(axes)) == set(chart.coloured) and len(chart.coloured) == charts.MOST_CURVES
    grey = {line.get_gid(): line for line in axes.lines if line.get_color() == plots.PALE}
    assert {"method 9", "lost"} <= set(grey)
    texts = {text.get_text(): text for text in axes.texts}
    names = [name + " ↑" * (curve.y[-1] > chart.limits[1]) for name, curve in chart.curves.items()]
    figure.draw_without_rendering()
    boxes = sorted((texts[name].get_window_extent() for name in names), key=lambda box: box.y0)
    assert all(low.y1 < high.y0 + 1 for low, high in itertools.pairwise(boxes))  # no overlap
    assert "Above the picture: lost (up to 9.00e+09)" in axes.get_title()


@pytest.mark.parametrize("count", [1, 21, 60])
def test_a_long_legend_leaves_the_curves_their_height(count):
    figure, (axes,) = plots.new_figure(plots.WIDTH, plots.HEIGHT)
    for i in range(count):
        axes.plot([128, 2048], [3.0, 4.0], label=f"a-long-variant-{i}")
    plots.legend_below(figure, *axes.get_legend_handles_labels())
    figure.draw_without_rendering()
    height = axes.get_window_extent().height / figure.dpi
    assert 2.4 < height < plots.HEIGHT
    (legend,) = figure.legends
    assert len(legend.get_texts()) == count
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0


def test_a_method_looks_the_same_whatever_it_is_compared_with():
    alone = method_styles(["alibi", "my-method"])
    together = method_styles(["rope", "zeta", "my-method", "fope", "alibi"])
    for label in alone:
        assert alone[label] == together[label]
    lengths = method_styles(["rope (trained on 64)", "rope (trained on 128)"])
    assert {style.color for style in lengths.values()} == {KNOWN["rope"].color}


def test_a_list_of_names_keeps_their_look_in_other_company(tmp_path):
    path = tmp_path / "styles.txt"
    path.write_text("# of the paper\nours\nours-small  # half the width\n\nrope\n")
    names = read_names(path)
    assert names == ["ours", "ours-small", "rope"]
    one = method_styles(["ours-small", "rope", "zeta", "eta"], names)
    other = method_styles(["theta", "ours-small", "ours"], [*names, "added"])
    assert one["ours-small"] == other["ours-small"] != other["ours"]
    assert one["rope"] == KNOWN["rope"]
    path.write_text("ours\n\nours\n")
    with pytest.raises(ValueError, match=r"styles.txt:3: 'ours' stands there twice"):
        read_names(path)
    for other in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(ValueError, match=f"{other} is no text file with a variant's name in"):
            read_names(other)


def test_curves_differ_without_colour():
    free = len(MARKERS) * len(LINES) - len(KNOWN)
    for looks in (
        line_styles(f"variant {i}" for i in range(12)),
        method_styles([*KNOWN, *(f"variant {i}" for i in range(free))]),
    ):
        pairs = {(style.marker, str(style.linestyle)) for style in looks.values()}
        assert len(pairs) == len(looks)
    greys = [
        int(c[1:3], 16) * 0.3 + int(c[3:5], 16) * 0.59 + int(c[5:], 16) * 0.11
        for c in COLOURS + MORE_COLOURS
    ]
    assert max(greys) < 200  # none vanishes on white paper


def experiment_labels():
    """``{experiment: labels}`` of the committed rows."""
    labels = {}
    for path in sorted(ROOT.glob("experiments/*/results/*.jsonl")):
        with path.open() as file:
            row = json.loads(file.readline())
        if row.get("kind") == "run":
            labels.setdefault(path.parts[-3], {})[row["config"]["name"]] = None
    return labels


def test_no_look_comes_twice_in_a_figure_nor_changes_between_the_experiments():
    looks = {}
    names = read_names(ROOT / "experiments/styles.txt")
    for experiment, labels in experiment_labels().items():
        styles = method_styles(labels, names)
        assert len({style[:2] for style in styles.values()}) == len(labels), experiment
        assert len({str(style[1:]) for style in styles.values()}) == len(labels), experiment
        for label, style in styles.items():
            assert looks.setdefault(label, style) == style, f"styles.txt lacks {label}"
            assert (style.color == KNOWN["fope"].color) == (label in ("fope", "fope-qk-norm"))
            assert (style.color == KNOWN["rope"].color) == (label in ("rope", "rope-qk-norm"))
    assert len({style[:2] for style in KNOWN.values()}) == len(KNOWN)


def test_error_bars_of_accuracies_are_drawn_within_0_and_100(synthetic, make_run, styles):
    one, other = (synthetic.rows_of("rope", seed) for seed in range(2))
    for row in other:
        if row["kind"] == "passkey":
            row["correct"] = {256: 20, 512: 5}.get(row["context"], row["correct"])
    runs = [make_run("rope", seed, rows=rows) for seed, rows in enumerate((one, other))]
    (comparison,) = comparisons(read_runs(runs), "passkey")
    spreads = comparison.spreads(charts.Sums.accuracy)["rope"]
    assert spreads[256].mean + spreads[256].deviation > 100  # else nothing is tested
    assert spreads[512].mean - spreads[512].deviation < 0
    (axes,) = plots.chart_figure(charts.accuracy_chart(comparison), styles).axes
    (bars,) = axes.containers[0].lines[2]
    ends = [y for segment in bars.get_segments() for _, y in segment]
    assert (min(ends), max(ends)) == (0, 100)


def test_depth_panels_hold_the_accuracies(synthetic, four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "passkey")
    figure = plots.depth_figure(comparison)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == list(synthetic.LOSSES)
    values = panels["fope"].images[0].get_array()
    assert values.shape == (len(synthetic.DEPTHS), len(synthetic.CONTEXTS))
    assert values[0, 2] == 100 * round(20 * 0.9 * 0.76) / 20
    assert values[-1, 0] == 100


def test_a_variant_without_a_right_answer_is_named_in_place_of_a_panel(synthetic, make_run):
    rows = synthetic.rows_of("rope", 0)
    for row in rows:
        row["correct"] = 0
    runs = [make_run("rope", rows=rows), make_run("fope")]
    (comparison,) = comparisons(read_runs(runs), "passkey")
    figure = plots.depth_figure(comparison)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["fope"]
    assert "no passkeys found at any length: rope" in figure.get_supxlabel()


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (3, 2, 2), (5, 2, 4)])
def test_any_number_of_panels_fits(synthetic, make_run, count, rows, columns):
    few = [row for row in synthetic.rows_of("fope", 0) if row.get("context") in (128, 2048)]
    (one,) = comparisons(read_runs([make_run("fope", rows=few)]), "passkey")
    labels = [f"a-long-variant-{i}" for i in range(count)]
    lengths = dict.fromkeys(labels, 128)
    many = dict.fromkeys(labels, one.curves["fope"])
    figure = plots.depth_figure(replace(one, curves=many, training_lengths=lengths))
    figure.get_layout_engine().execute(figure)
    *places, bar = figure.axes
    panels = places[:count]
    assert [axes.get_title() for axes in panels] == labels
    assert [axes.axison for axes in places] == [True] * count + [False] * (rows * columns - count)
    assert places[0].get_gridspec().get_geometry() == (rows, columns)
    # Each column ends with lengths, above empty places as well; nothing covers anything else.
    named = [axes for axes in panels if axes.xaxis.get_tick_params()["labelbottom"]]
    assert named == panels[-columns:]
    boxes = [axes.get_tightbbox() for axes in (*panels, bar)]
    boxes += [text.get_window_extent() for text in figure.texts]  # the title and the axes' names
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    low, high = figure.bbox.get_points()
    assert all((low <= box.min).all() and (box.max <= high).all() for box in boxes)
    assert min(axes.get_window_extent().height for axes in panels) > 1.5 * figure.dpi


def test_a_cell_that_was_not_run_stays_empty(synthetic, make_run):
    rows = [
        row
        for row in synthetic.rows_of("rope", 0)
        if (row.get("context"), row.get("depth")) != (512, 0.5)
    ]
    (comparison,) = comparisons(read_runs([make_run("rope", rows=rows)]), "passkey")
    values = plots.depth_figure(comparison).axes[0].images[0].get_array()
    assert np.ma.getmaskarray(values).sum() == 1
    assert np.ma.is_masked(values[2, 2])


def test_what_is_not_finite_leaves_a_gap(styles):
    curve = charts.Curve([1, 2, 3], [1.0, math.inf, 2.0])
    chart = charts.Chart("t", "s", "x", "y", {"rope": curve}, ["rope"], [1, 2, 3], is_log=True)
    (axes,) = plots.chart_figure(chart, styles).axes
    assert axes.get_ylim()[1] < 10


def test_files_are_the_same_bytes_each_time(perplexity, styles, tmp_path):
    first, second = (
        [path.read_bytes() for path in plots.save_figure(figure, tmp_path, name)]
        for name, figure in (
            ("a", plots.chart_figure(perplexity, styles)),
            ("b", plots.chart_figure(perplexity, styles)),
        )
    )
    assert first == second
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
