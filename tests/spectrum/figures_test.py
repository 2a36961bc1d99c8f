"""Pages of spectra, and their correlation with length generalization over runs."""

import json
import math

import numpy as np
import pytest

from fope_jax.report import correlation
from fope_jax.report.correlation import (
    correlate,
    correlation_table,
    generalization_gap,
    run_table,
    spectrum_points,
)
from fope_jax.report.page import write_report
from fope_jax.report.rows import ReportError, read_runs
from fope_jax.spectrum.tables import check_spectra, head_mean, write_demo, write_spectrum


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals take fewer draws to be tested than to be published."""
    monkeypatch.setattr(correlation, "DRAWS", 1_000)


LEAKAGE = {"rope": 0.4, "fope": 0.1}  # of the head that distance moves; the other has 0.9


def spectrum_row(variant, seed, step, context, layer):
    own = LEAKAGE.get(variant)
    share = [0.2, 0.6] if step else [0.5, 0.5]
    return {
        "kind": "spectrum",
        "variant": variant,
        "seed": seed,
        "step": step,
        "training_length": 128,
        "split": "validation",
        "context": context,
        "windows": 4,
        "last": 64,
        "layer": layer,
        "leakage": own and [own + 0.1 * layer, 0.9],
        "leakage_null": own and 0.95,
        "floor_energy": [0.3 if context > 128 else 0.1, None],
        "floor_null": 0.01,
        "profile_energy": [1.0, 0.0],
        "profile_share": [0.5, 0.0],
        "noise_share": [0.1, None],
        "undertrained_energy": own and share,
        "undertrained_null": own and 0.6,
        "q_leakage": own and 0.5,
        "k_leakage": own and 0.7,
        "pair_null": own and 0.98,
        "hidden_leakage": own and 0.9,
        "hidden_null": own and 0.9,
        "hidden_locked": 0.0,
        "entropy": [3.0, 4.0],
        "distance": [10.0, 20.0],
        "q_size": [0.1, 0.2, 0.3, 0.4],
        "k_size": [0.4, 0.3, 0.2, 0.1],
    }


def spectrum_rows(variant, seed, step):
    return [spectrum_row(variant, seed, step, c, layer) for c in (128, 512) for layer in (0, 1)]


@pytest.fixture
def runs(make_run, synthetic):
    """RoPE and FoPE with spectra before and after training, ALiBi after, NoPE without."""
    paths = []
    for variant in ("rope", "fope", "alibi", "nope"):
        rows = synthetic.rows_of(variant, 0)
        if variant != "nope":
            rows += spectrum_rows(variant, 0, 1000)
        if variant in LEAKAGE:
            rows += spectrum_rows(variant, 0, 0)
        paths.append(make_run(variant, rows=rows))
    return paths


def test_points_hold_a_runs_numbers_before_and_after(runs, synthetic):
    found = {point.label: point for point in spectrum_points(read_runs(runs))}
    assert set(found) == {"rope", "fope", "alibi"}
    rope = found["rope"]
    assert rope.trained_at == 1000
    losses = synthetic.LOSSES["rope"]
    assert rope.gap == pytest.approx(losses[-1] - losses[0])
    # The head that distance does not move has no weight; layers are averaged.
    assert rope.numbers["logits' leakage ratio"] == pytest.approx(0.45)
    assert rope.numbers["leakage ratio of q and k"] == pytest.approx(0.6)
    assert rope.numbers["undertrained energy"] == pytest.approx(0.4)
    assert rope.before["undertrained energy"] == pytest.approx(0.5)
    assert rope.numbers["energy under the floor, longest context"] == pytest.approx(0.3)
    alibi = found["alibi"]
    assert alibi.numbers["logits' leakage ratio"] is None
    assert alibi.numbers["energy under the floor, longest context"] == pytest.approx(0.3)
    assert set(alibi.before.values()) == {None}


def test_a_gap_takes_both_lengths(make_run, synthetic):
    rows = [r for r in synthetic.rows_of("rope", 0) if r.get("context") in (None, 256, 512)]
    (run,) = read_runs([make_run("rope", rows=rows)])
    assert generalization_gap(run, "validation") is None


def test_a_gap_is_of_the_same_tokens(make_run, synthetic):
    rows = synthetic.rows_of("rope", 0)
    chunks = [
        row | {"protocol": "chunks", "nats": 9 * row["nats"]}
        for row in rows
        if row["kind"] == "perplexity" and row["context"] == 2048
    ]
    news = [row | {"split": "news"} for row in rows if row["kind"] == "perplexity"]
    news = [row | {"nats": row["context"] * row["nats"]} for row in news]
    (run,) = read_runs([make_run("rope", rows=rows + chunks + news)])
    assert generalization_gap(run, "validation") == pytest.approx(5.61 - 3.10)
    assert generalization_gap(run, "news") == pytest.approx(2048 * 5.61 - 128 * 3.10)


def test_tables_say_what_was_measured(runs):
    found = spectrum_points(read_runs(runs))
    rows = dict(run_table(found).rows)
    assert rows["rope"][:4] == ["0", "1,000", "+2.510", "0.450 → 0.450"]
    assert rows["rope"][5] == "0.500 → 0.400"
    assert rows["alibi"][3:6] == ["-", "-", "-"]
    table = dict(correlation_table(found).rows)
    assert table["logits' leakage ratio"] == ["-"] * 4 + ["2", "2"]
    assert table["energy under the floor, longest context"][-2:] == ["3", "3"]


def test_correlations_of_known_numbers():
    x = np.arange(12.0)
    variants = [f"method {k // 2}" for k in range(12)]
    own = correlate(x, np.exp(x), variants)
    assert own.spearman == pytest.approx(1) and own.spearman_interval == pytest.approx((1, 1))
    assert 0 < own.pearson < 0.8
    assert own.pearson_interval[0] < own.pearson < own.pearson_interval[1]
    assert (own.runs, own.variants) == (12, 6)
    assert correlate(x, -2 * x, variants).pearson == pytest.approx(-1)


def test_seeds_of_one_variant_are_no_independent_evidence():
    """Ten seeds of each of five methods: the interval is that of five, not of fifty."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5))
    once = correlate(x, y, [str(k) for k in range(5)])
    often = correlate(np.repeat(x, 10), np.repeat(y, 10), [str(k // 10) for k in range(50)])
    assert often.pearson == pytest.approx(once.pearson)
    np.testing.assert_allclose(often.pearson_interval, once.pearson_interval, atol=0.1)
    low, high = often.pearson_interval
    assert high - low > 1


def test_too_few_runs_have_no_correlation():
    two = correlate([1.0, 2.0], [1.0, 3.0], ["a", "b"])
    assert math.isnan(two.pearson) and math.isnan(two.spearman)
    three = correlate([1.0, 2.0, 3.0], [1.0, 3.0, 5.0], ["a", "b", "c"])
    assert three.pearson == pytest.approx(1)
    assert all(map(math.isnan, three.pearson_interval))  # three variants say nothing of others
    assert math.isnan(correlate([1.0] * 5, np.arange(5.0), list("abcde")).pearson)


@pytest.mark.slow
def test_the_report_has_a_section_where_runs_have_spectra(runs, tmp_path):
    page = write_report(runs, tmp_path / "with").read_text()
    assert "<h2>Spectra and length generalization</h2>" in page
    assert "+2.510" in page and (tmp_path / "with/spectra-correlation.png").is_file()


def measured(variant="rope", seed=0, step=1000):
    rows = spectrum_rows(variant, seed, step)
    power = {context: [1.0 / (k + 1) for k in range(context // 2 + 1)] for context in (128, 512)}
    curves = [
        {"own": [0.1, 1.0], "profile": [0.1] * row["context"]}
        | {f"{name}_power": power[row["context"]] for name in ("logits", "hidden", "q", "k")}
        for row in rows
    ]
    pairs = [
        {"dims": [0, 2], "frequency": 1.0, "period": 6.28, "turns": 20.4, "undertrained": False},
        {"dims": [1, 3], "frequency": 0.01, "period": 628.3, "turns": 0.2, "undertrained": True},
    ]
    ids = {"variant": variant, "seed": seed, "step": step, "training_length": 128}
    return {**ids, "rows": rows, "curves": curves, "pairs": pairs}


@pytest.mark.slow
def test_a_page_shows_a_run_before_and_after_training(tmp_path):
    (tmp_path / "spectrum-0.json").write_text(json.dumps(measured(step=0)))
    page = write_spectrum(measured(), tmp_path).read_text()
    for text in (
        "1 of 2 pairs of dimensions never turned fully",
        "untrained, 128, 0",
        "step 1,000, 512, 1",
        "Energy by frequency (step 1,000)",
        "Energy by frequency (untrained)",
    ):
        assert text in page
    assert page.count("<figure>") == 6
    assert json.loads((tmp_path / "spectrum-1000.json").read_text()) == measured()
    with pytest.raises(
        ReportError, match=r"holds spectra of rope \(seed 0\); give fope \(seed 2\)"
    ):
        write_spectrum(measured("fope", seed=2), tmp_path)
    (tmp_path / "spectrum-7.json").write_text('{"variant": "ro')
    with pytest.raises(ReportError, match="spectrum-7.json is no JSON: .*measure that step again"):
        check_spectra(tmp_path, "rope", 0)


def test_means_over_heads_leave_out_what_is_not_known():
    assert head_mean([1.0, None, 3.0]) == 2.0
    assert head_mean([None]) is None and head_mean(None) is None and head_mean(0.5) == 0.5


@pytest.mark.slow
def test_the_page_of_the_theory(demo_numbers, tmp_path):
    page = write_demo(demo_numbers, tmp_path).read_text()
    assert page.count("<figure>") == 3
    assert "FoPE, drawn" in page
    for stem in ("damage", "extension", "decay"):
        assert (tmp_path / f"{stem}.png").stat().st_size > 10_000
