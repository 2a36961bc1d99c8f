"""Charts hold what was measured; at most nine curves are in colour."""

import functools
import math

import numpy as np
import pytest

from fope_jax.report import charts
from fope_jax.report.comparison import Comparison, comparisons
from fope_jax.report.rows import ReportError, read_runs

ratio_chart = functools.partial(charts.perplexity_chart, relative=True)


def test_perplexity_curves_are_the_numbers(synthetic, four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    chart = charts.perplexity_chart(comparison)
    assert list(chart.curves) == chart.coloured == list(synthetic.LOSSES)
    for variant, curve in chart.curves.items():
        assert curve.x == chart.ticks == list(synthetic.CONTEXTS)
        np.testing.assert_allclose(curve.y, np.exp(synthetic.LOSSES[variant]), rtol=1e-12)
    assert chart.is_log and chart.lengths == [128]
    assert (chart.x_label, chart.y_label) == ("context length (tokens)", "perplexity (per token)")
    assert charts.alt_text(chart).startswith(
        "Perplexity against context length, validation split. rope: 22.20 at 128 tokens, 273.14"
    )


def with_uneven_documents(synthetic, variant, shift):
    """One document of ten is harder, so that the interval has a width."""
    rows = synthetic.rows_of(variant, 0, tokens=synthetic.TEN_BOOKS, shift=shift)
    for row in rows:
        if row["kind"] == "perplexity" and row["document"] == "book 0":
            row["nats"] += 0.5 * row["tokens"]
    return rows


def test_bands_are_the_intervals_and_only_where_they_tell_curves_apart(synthetic, make_run):
    one = make_run("fope", rows=with_uneven_documents(synthetic, "fope", 0.0))
    (comparison,) = comparisons(read_runs([one]), "perplexity")
    low, high = charts.perplexity_chart(comparison).curves["fope"].band[0]
    assert (low, high) == pytest.approx((math.exp(3.09), math.exp(3.24)))  # 0 to 3 times in ten
    assert ratio_chart(comparison).curves["fope"].band[0] == pytest.approx((1.0, 1.0))
    near = make_run("alibi", rows=with_uneven_documents(synthetic, "alibi", -0.06))
    (comparison,) = comparisons(read_runs([one, near]), "perplexity")
    bands = comparison.intervals(charts.Sums.perplexity)
    at_128 = {label: {128: band[128]} for label, band in bands.items()}
    assert charts.useful_bands(at_128) == {}  # both cover all of it
    assert charts.useful_bands(bands)  # at 2,048 they do not
    many = {f"{label}-{i}": band for label, band in bands.items() for i in range(3)}
    assert charts.useful_bands(many) == {}


def test_differences_are_paired_with_the_baseline(make_run):
    shifts = {"rope": (0.0, 0.5, 1.0), "fope": (0.0, 0.5, 1.0), "alibi": (0.1, 0.9, 0.5)}
    runs = [
        make_run(variant, seed, shift=shift)
        for variant, own in shifts.items()
        for seed, shift in enumerate(own)
    ]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    chart = charts.difference_chart(comparison)
    assert list(chart.curves) == ["fope", "alibi"]
    assert chart.curves["fope"].y[-1] == pytest.approx(3.47 - 5.61)
    assert chart.curves["fope"].whiskers[-1] == pytest.approx((-2.14, -2.14))  # the same each seed
    low, high = chart.curves["alibi"].whiskers[0]
    assert low < 0.05 < high  # 0.1, 0.4 and -0.5 with the losses' difference of 0.05
    assert chart.note == (
        "Mean over 3 seeds, error bars: 95% interval over seeds; "
        "with fewer than 5 seeds none is called significant."
    )


def test_few_seeds_have_intervals_over_documents_or_none(synthetic, make_run):
    rows = [with_uneven_documents(synthetic, name, 0.0) for name in ("rope", "fope")]
    runs = [make_run(n, rows=own) for n, own in zip(("rope", "fope"), rows, strict=True)]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    chart = charts.difference_chart(comparison)
    assert chart.curves["fope"].whiskers[0] == pytest.approx((-0.01, -0.01))  # same documents
    assert "interval over documents, which tells nothing of seeds" in chart.note
    bare = [make_run(name, name=f"{name}-bare") for name in ("rope", "fope")]
    (comparison,) = comparisons(read_runs(bare), "perplexity")
    chart = charts.difference_chart(comparison)
    assert chart.curves["fope"].whiskers is None
    assert chart.note.startswith("1 seed: the differences as they are")
    (alone,) = comparisons(read_runs(bare[:1]), "perplexity")
    assert charts.difference_chart(alone) is None


def test_documents_are_of_the_seeds_that_both_have(synthetic, make_run):
    """The error bar is that of the point; seeds of one alone are in neither."""
    books = synthetic.TEN_BOOKS
    runs = [make_run("rope", seed, tokens=books, shift=0.05 * seed) for seed in range(3)]
    runs.append(make_run("fope", 0, tokens=books))
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    chart = charts.difference_chart(comparison)
    (difference,) = chart.curves.values()
    for y, (low, high) in zip(difference.y, difference.whiskers, strict=True):
        assert low - 1e-9 <= y <= high + 1e-9
    assert chart.note.startswith("1 seed, error bars: 95% interval over documents")


def test_of_many_curves_the_baseline_and_the_best_are_in_colour():
    curves = {name: charts.Curve([1.0], [float(i)]) for i, name in enumerate("abcdefghij")}
    curves["rope"] = charts.Curve([1.0], [99.0])
    assert charts.curves_in_colour(curves) == [*"abcdefgh", "rope"]
    assert charts.curves_in_colour(curves, higher_is_better=True) == [*"cdefghij", "rope"]
    few = dict(list(curves.items())[:9])
    assert charts.curves_in_colour(few) == list(few)


def test_a_curve_far_above_all_others_is_named_and_left_out(synthetic, make_run):
    names = ["alibi", "alibi-2", "alibi-3", "alibi-4", "lost"]
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
    for draw in (charts.perplexity_chart, ratio_chart, charts.difference_chart):
        chart = draw(comparison)
        assert list(chart.outside) == ["lost"]
        assert chart.limits[1] < max(chart.curves["lost"].y)


def test_near_curves_get_a_linear_axis(make_run):
    (comparison,) = comparisons(read_runs([make_run("alibi")]), "perplexity")
    chart = charts.perplexity_chart(comparison)
    low, high = chart.limits
    assert not chart.is_log
    assert high > 1.1 * low  # 3% between the contexts does not fill the axis


def test_positions_lie_inside_their_buckets(four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "position")
    edges = [0, *(2**k for k in range(2, 12))]
    x = charts.position_chart(comparison).curves["rope"].x
    assert all(start < at < stop for start, at, stop in zip(edges, x, edges[1:], strict=False))


@pytest.mark.parametrize(
    ("bucket", "centre"),
    [([32, 45], math.sqrt(32 * 45)), ([4, 8], math.sqrt(32)), ([0, 4], math.sqrt(8))],
)
def test_a_bucket_stands_at_the_geometric_mean_of_its_ends(bucket, centre):
    """Of one from 0 on the upper half is taken, as 0 has no place on a logarithmic axis."""
    assert charts.bucket_centre({"bucket": bucket}) == pytest.approx(centre, rel=1e-12)


def test_seeds_are_drawn_with_their_spread(make_run):
    runs = [make_run("fope", seed, shift=0.4 * seed) for seed in (0, 1)]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    chart = charts.perplexity_chart(comparison)
    low, high = chart.curves["fope"].whiskers[0]
    one, two = math.exp(3.09), math.exp(3.49)
    assert high - low == pytest.approx(2 * (two - one) / math.sqrt(2))
    assert chart.note == "Mean over 2 seeds, error bars ± standard deviation."
    runs += [make_run("rope", seed) for seed in (0, 1, 2)]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    assert charts.perplexity_chart(comparison).note.startswith("Mean over 2 to 3 seeds, error")


def test_training_curves_are_the_mean_over_seeds(make_run):
    runs = read_runs([make_run("fope", 0), make_run("fope", 1, shift=1.0), make_run("rope")])
    chart = charts.training_chart(runs)
    assert list(chart.curves) == ["fope", "rope"]
    assert chart.curves["fope"].x[-1] == 1000 * 4096
    assert chart.curves["fope"].y[-1] == pytest.approx(chart.curves["rope"].y[-1] + 0.5)
    assert chart.is_dense


def test_a_row_whose_steps_scored_no_token_is_no_point(synthetic, make_run):
    rows = synthetic.rows_of("rope", 0)
    rows[1]["loss"] = None
    (curve,) = charts.training_chart(read_runs([make_run("rope", rows=rows)])).curves.values()
    assert curve.x[:2] == [25 * 4096, 75 * 4096] and None not in curve.y


@pytest.mark.parametrize("kind", ["perplexity", "position"])
def test_rows_scored_on_different_things_are_refused_in_one_chart(synthetic, make_run, kind):
    draw = {"perplexity": charts.perplexity_chart, "position": charts.position_chart}[kind]
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
        draw(mixed)
