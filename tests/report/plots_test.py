"""Figures: what is drawn is what was measured, and grey print keeps the curves apart."""

import functools
import math

import numpy as np
import pytest

from fope_jax.report import plots
from fope_jax.report.comparison import Comparison, comparisons, run_labels
from fope_jax.report.rows import ReportError, read_runs

ratio_figure = functools.partial(plots.perplexity_figure, relative=True)


@pytest.fixture
def styles(synthetic):
    return plots.line_styles(synthetic.LOSSES)


def drawn(axes):
    """``{label: [x, y]}`` of the curves."""
    return {
        bars.get_label(): np.asarray(bars.lines[0].get_data(), float) for bars in axes.containers
    }


def test_perplexity_curves_are_the_numbers(synthetic, four_runs, styles):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    (axes,) = plots.perplexity_figure(comparison, styles).axes
    curves = drawn(axes)
    assert list(curves) == list(synthetic.LOSSES)
    for variant, (x, y) in curves.items():
        assert x.tolist() == list(synthetic.CONTEXTS)
        np.testing.assert_allclose(y, np.exp(synthetic.LOSSES[variant]), rtol=1e-12)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        f"{c:,}" for c in synthetic.CONTEXTS
    ]
    assert axes.get_xlabel() == "context length (tokens)"
    assert axes.get_ylabel() == "perplexity (per token)"


def test_bits_per_byte_are_the_right_axis(four_runs, styles):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    figure = plots.perplexity_figure(comparison, styles)
    (right,) = figure.axes[0].child_axes
    figure.draw_without_rendering()
    assert right.get_ylabel() == "bits per byte"
    low, high = figure.axes[0].get_ylim()
    expected = np.log2([low, high]) / 3  # three bytes a token
    np.testing.assert_allclose(right.get_ylim(), expected, rtol=1e-6)


def test_bands_are_the_intervals(synthetic, make_run):
    rows = synthetic.rows_of("fope", 0)
    for row in rows:
        if row["kind"] == "perplexity" and row["document"] == "Emma":
            row["nats"] += 0.5 * row["tokens"]
    (comparison,) = comparisons(read_runs([make_run("fope", rows=rows)]), "perplexity")
    for draw, low, high in (
        (plots.perplexity_figure, math.exp(3.09), math.exp(3.59)),
        (ratio_figure, 1.0, 1.0),
    ):
        (axes,) = draw(comparison, plots.line_styles(["fope"])).axes
        (band,) = axes.collections[:1]
        corners = band.get_paths()[0].vertices
        at_128 = corners[corners[:, 0] == 128, 1]
        assert (at_128.min(), at_128.max()) == pytest.approx((low, high))
        bottom, top = axes.get_ylim()
        assert bottom < corners[:, 1].min()
        assert corners[:, 1].max() < top


@pytest.mark.parametrize("kind", ["perplexity", "position", "passkey"])
def test_the_training_length_is_marked(four_runs, styles, kind):
    draw = {
        "perplexity": plots.perplexity_figure,
        "position": plots.position_figure,
        "passkey": plots.accuracy_figure,
    }[kind]
    (comparison,) = comparisons(read_runs(four_runs), kind)
    (axes,) = draw(comparison, styles).axes
    assert "training length 128" in [text.get_text() for text in axes.texts]
    assert any(list(line.get_xdata()) == [128, 128] for line in axes.lines)


def test_a_curve_far_above_all_others_leaves_the_picture_in_words(synthetic, make_run):
    names = ["alibi", "alibi-2", "alibi-3", "lost"]
    runs = []
    for name in names:
        rows = synthetic.rows_of("alibi", 0)
        for row in rows:
            if row["kind"] == "perplexity" and name == "lost" and row["context"] > 128:
                row["nats"] += 4 * row["tokens"]
        runs.append(make_run("alibi", name=name, rows=rows))
        config = runs[-1] / "config.json"
        config.write_text(config.read_text().replace('"name": "alibi"', f'"name": "{name}"'))
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    for draw in (plots.perplexity_figure, ratio_figure):
        (axes,) = draw(comparison, plots.line_styles(names)).axes
        curves = drawn(axes)
        assert list(curves) == names
        _, top = axes.get_ylim()
        assert (
            curves["alibi"][1].max() < top < 2 * curves["alibi"][1].max() < curves["lost"][1].max()
        )
        assert "above the picture: lost (up to" in axes.get_title().replace("\n", " ")


@pytest.mark.parametrize("count", [1, 4, 21, 60])
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


def test_near_curves_get_a_linear_axis(make_run, styles):
    (comparison,) = comparisons(read_runs([make_run("alibi")]), "perplexity")
    (axes,) = plots.perplexity_figure(comparison, styles).axes
    assert axes.get_yscale() == "linear"
    low, high = axes.get_ylim()
    assert high > 1.1 * low  # 3% between the contexts does not fill the axis


def test_curves_differ_without_colour(styles):
    many = plots.line_styles(f"variant {i}" for i in range(12))
    assert len({(style.marker, str(style.linestyle)) for style in many.values()}) == 12
    assert len({style.color for style in styles.values()}) == 4
    greys = [
        int(c[1:3], 16) * 0.3 + int(c[3:5], 16) * 0.59 + int(c[5:], 16) * 0.11
        for c in plots.COLOURS
    ]
    assert max(greys) < 200  # none vanishes on white paper


def test_positions_lie_inside_their_buckets(four_runs, styles):
    (comparison,) = comparisons(read_runs(four_runs), "position")
    x, _ = drawn(plots.position_figure(comparison, styles).axes[0])["rope"]
    edges = [0, *(2**k for k in range(2, 12))]
    assert all(start < at < stop for start, at, stop in zip(edges, x, edges[1:], strict=False))


def test_seeds_are_drawn_with_their_spread(make_run):
    runs = read_runs([make_run("fope", seed, shift=0.4 * seed) for seed in (0, 1)])
    (comparison,) = comparisons(runs, "perplexity")
    figure = plots.perplexity_figure(comparison, plots.line_styles(["fope"]))
    (bars,) = figure.axes[0].containers
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    one, two = math.exp(3.09), math.exp(3.49)
    assert high - low == pytest.approx(2 * (two - one) / math.sqrt(2))


def test_depth_panels_hold_the_accuracies(synthetic, four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "passkey")
    figure = plots.depth_figure(comparison)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == list(synthetic.LOSSES)
    values = panels["fope"].images[0].get_array()
    assert values.shape == (len(synthetic.DEPTHS), len(synthetic.CONTEXTS))
    assert values[0, 2] == 100 * round(20 * 0.9 * 0.76) / 20
    assert values[-1, 0] == 100


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_panels_fits(four_runs, count, tmp_path):
    (comparison,) = comparisons(read_runs(four_runs[:count]), "passkey")
    plots.save_figure(plots.depth_figure(comparison), tmp_path, "depth")


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


def test_training_curves_are_one_line_a_run_and_one_label_a_variant(make_run):
    runs = read_runs([make_run("fope", 0), make_run("fope", 1), make_run("rope")])
    (axes,) = plots.training_figure(runs, plots.line_styles(run_labels(runs).values())).axes
    assert len(axes.lines) == 3
    assert axes.get_legend_handles_labels()[1] == ["fope", "rope"]
    assert axes.lines[0].get_xdata()[-1] == 1000 * 4096


@pytest.mark.parametrize("draw", [plots.perplexity_figure, plots.position_figure])
def test_rows_scored_on_different_things_are_refused_in_one_plot(synthetic, make_run, styles, draw):
    kind = "perplexity" if draw is plots.perplexity_figure else "position"
    (one,) = comparisons(read_runs([make_run("rope")]), kind)
    rows = synthetic.rows_of("alibi", 0)
    for row in rows:
        if row["kind"] == kind:
            row["split"] = "train"
    (other,) = comparisons(read_runs([make_run("alibi", rows=rows)]), kind)
    mixed = Comparison(
        kind, "validation", one.curves | other.curves, one.training_lengths | other.training_lengths
    )
    with pytest.raises(ReportError, match="'rope' and 'alibi' were scored on different things"):
        draw(mixed, styles)


def test_files_are_the_same_bytes_each_time(four_runs, styles, tmp_path):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    first, second = (
        [path.read_bytes() for path in plots.save_figure(figure, tmp_path, name)]
        for name, figure in (
            ("a", plots.perplexity_figure(comparison, styles)),
            ("b", plots.perplexity_figure(comparison, styles)),
        )
    )
    assert first == second
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
