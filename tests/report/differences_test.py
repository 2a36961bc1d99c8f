"""Differences are paired by seed, with intervals that hold as often as they say."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from fope_jax.report import page, ranking
from fope_jax.report.comparison import comparisons
from fope_jax.report.differences import (
    Difference,
    all_differences,
    config_differences,
    holm,
    paired_difference,
    ranks,
)
from fope_jax.report.page import write_report
from fope_jax.report.ranking import (
    difference_table,
    has_statements,
    is_heatmap,
    is_ranked,
    matched_note,
    ranking_summary,
    ranking_table,
    shown_contexts,
)
from fope_jax.report.rows import read_runs

pytestmark = pytest.mark.usefixtures("undrawn")


def test_the_interval_is_that_of_the_paired_t_test():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(2, 5))
    found = paired_difference(dict(enumerate(one)), dict(enumerate(other)))
    reference = stats.ttest_rel(one, other)
    low, high = reference.confidence_interval(0.95)
    np.testing.assert_allclose(found.mean - found.half_width, low, rtol=1e-12)
    np.testing.assert_allclose(found.mean + found.half_width, high, rtol=1e-12)
    np.testing.assert_allclose(found.p, reference.pvalue, rtol=1e-12)


def test_the_interval_holds_the_truth_in_95_of_100_experiments():
    draw, truth = np.random.default_rng(1), 0.3
    held = 0
    for _ in range(1000):
        noise = draw.normal(size=3)  # what seeds share does not count
        one = noise + truth + 0.1 * draw.normal(size=3)
        found = paired_difference(dict(enumerate(one)), dict(enumerate(noise)))
        held += abs(found.mean - truth) <= found.half_width
    assert 930 <= held <= 970


def test_only_shared_seeds_are_paired():
    found = paired_difference({0: 1.0, 2: 5.0, 7: 1.0}, {2: 1.0, 0: 0.0, 9: 4.0})
    assert (found.mean, found.seeds) == (2.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 1.0}, {0: 0.5})
    assert math.isnan(single.half_width)
    assert not single.is_significant
    equal = paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert not equal.is_significant


@pytest.mark.parametrize(
    ("seeds", "text", "is_significant"),
    [
        (1, "+0.300", False),
        (2, "+0.300", False),
        (3, "+0.300 ± 0.100 °", False),
        (4, "+0.300 ± 0.100 °", False),
        (5, "+0.300 ± 0.100 *", True),
    ],
)
def test_few_seeds_are_not_called_significant(seeds, text, is_significant):
    found = Difference(0.3, 0.1, 0.01, seeds)
    assert (found.text(), found.is_significant) == (text, is_significant)
    assert Difference(0.05, 0.1, 0.5, seeds).mark == ""


def test_holm_allows_less_than_each_pair_alone():
    found = {(str(i), "x"): Difference(1.0, 0.1, p, 5) for i, p in enumerate((0.012, 0.02, 0.03))}
    assert holm(found) == {("0", "x"), ("1", "x"), ("2", "x")}
    found["3", "x"] = Difference(1.0, 2.0, 0.9, 5)
    assert holm(found) == {("0", "x")}  # 0.02 > 0.05 / 3 stops it, and with it 0.03
    found["4", "x"] = Difference(1.0, math.nan, math.nan, 1)
    assert holm(found) == set()
    few = {("a", "x"): Difference(1.0, 0.1, 0.001, 4)}
    assert holm(few) == set()


def test_a_number_that_is_not_finite_is_not_significant():
    found = {("a", "b"): Difference(1.0, 0.1, 1e-6, 5)}
    found["a", "c"] = Difference(math.nan, math.nan, math.nan, 5)
    assert holm(found) == {("a", "b")}


def test_ranks_are_means_over_shared_seeds():
    numbers = {"a": {0: 1.0, 1: 3.0, 2: 0.0}, "b": {0: 2.0, 1: 2.0}, "c": {0: 2.0, 1: 9.0}}
    assert ranks(numbers) == {"a": 1.5, "b": 1.75, "c": 2.75}
    assert all(math.isnan(rank) for rank in ranks({"a": {0: 1.0}, "b": {1: 1.0}}).values())


# fope is better by the same amount in each seed; alibi by an amount that varies with it
SHIFTS = {
    "rope": (0.0, 0.1, 0.2, 0.1, 0.0),
    "fope": (0.001, 0.1, 0.201, 0.101, 0.0),
    "alibi": (2.5, 3.5, 1.0, 4.5, -2.0),
}


@pytest.fixture
def make_seeds(make_run):
    def make(seeds):
        return read_runs(
            make_run(variant, seed, shift=own[seed])
            for variant, own in SHIFTS.items()
            for seed in range(seeds)
        )

    return make


def test_the_tables_show_what_was_put_in(make_seeds, synthetic):
    (comparison,) = comparisons(make_seeds(5), "perplexity")
    assert is_ranked(comparison)
    table = ranking_table(comparison)
    assert [label for label, _ in table.rows] == ["fope", "alibi", "rope"]  # at 2,048 tokens
    mean = synthetic.LOSSES["fope"][-1] + 0.403 / 5
    assert dict(table.rows)["fope"][-1].startswith(f"{mean:.3f} ± ")
    assert dict(table.rows)["fope"][-1].endswith("(1.2)")
    cells = dict(difference_table(comparison, [2048]).rows)
    assert cells["rope"][0].startswith("+2.139 ± 0.001 **")
    assert cells["alibi"][1] == ""
    assert not cells["alibi"][0].endswith("*")
    text = ranking_summary(comparison, [2048])
    assert text.startswith(
        "At 2,048 tokens 1 of 3 differences between two variants are significant at 95% over 5 "
        "seeds, 1 with all pairs taken together."
    )
    assert "(the interval holds 0): fope and alibi; alibi and rope" in text
    assert all_differences({"a": {0: 1.0}, "b": {1: 1.0}}) == {}


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (2, "At 2,048 tokens: 2 seeds, so no statement about differences."),
        (
            3,
            "At 2,048 tokens the 95% interval over 3 seeds leaves out 0 for 1 of 3 differences "
            "between two variants. That is little to rest on: with fewer than 5 seeds none is "
            "called significant. Neighbours in the ranking whose difference is not resolved (the "
            "interval holds 0): fope and alibi; alibi and rope.",
        ),
    ],
)
def test_the_summary_says_how_little_few_seeds_bear(make_seeds, seeds, said):
    (comparison,) = comparisons(make_seeds(seeds), "perplexity")
    assert ranking_summary(comparison, [2048]) == said
    assert has_statements(comparison, [2048]) == (seeds > 2)
    table = difference_table(comparison, [2048])
    assert dict(table.rows)["rope"][0].endswith("+2.139" if seeds == 2 else "± 0.001 °")
    assert "* significant" not in table.note


def test_an_easier_seed_that_one_variant_has_alone_decides_no_order(make_run):
    """FoPE's mean is lower by its third seed; in the two that both have ALiBi is better."""
    runs = [make_run("fope", seed, shift=shift) for seed, shift in enumerate((0.0, 0.2, -1.6))]
    runs += [make_run("alibi", seed, shift=shift) for seed, shift in enumerate((0.1, 0.3))]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    (first, alibi), (second, fope) = ranking_table(comparison).rows
    assert (first, second) == ("alibi", "fope")
    assert (alibi[0], alibi[-1]) == ("2", "3.320 ± 0.100 (1.0)")
    assert fope[0] == "3" and fope[-1].startswith("3.003 ±") and fope[-1].endswith("(2.0)")
    assert difference_table(comparison, [2048]).rows == [("fope", ["+0.250"])]


def test_variants_are_compared_where_all_were_scored(synthetic, make_run):
    rows = synthetic.rows_of("fope", 0, length=256)
    later = [row for row in rows if row.get("context", 256) >= 256]
    runs = [make_run("rope"), make_run("fope", rows=later, length=256)]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    assert comparison.contexts[0] == 128
    assert shown_contexts(comparison) == [(2048,), (256,)]


def test_answers_beyond_the_training_length_are_compared_together(synthetic, make_run):
    def make(variant, seed, found):
        rows = synthetic.rows_of(variant, seed)
        for row in rows:
            if row["kind"] == "passkey":
                row["correct"] = found if row["context"] > 128 else 20
        return make_run(variant, seed, rows=rows)

    runs = [make("rope", 0, 3), make("rope", 1, 5), make("fope", 0, 13), make("fope", 1, 15)]
    (comparison,) = comparisons(read_runs(runs), "passkey")
    (contexts,) = shown_contexts(comparison)
    assert contexts == tuple(c for c in synthetic.CONTEXTS if c > 128)
    assert [label for label, _ in ranking_table(comparison).rows] == ["fope", "rope"]
    assert dict(ranking_table(comparison).rows)["fope"][1:3] == [
        "0.0 ± 0.0 (1.5)",
        "30.0 ± 5.0 (1.0)",
    ]
    cells = dict(difference_table(comparison, contexts).rows)
    assert cells["rope"] == ["+50.0"]  # of two seeds
    same = [
        make_run(v, seed, name=f"{v}{seed}", rows=synthetic.rows_of("rope", seed))
        for v in ("rope", "fope")
        for seed in (0, 1)
    ]
    (comparison,) = comparisons(read_runs(same), "passkey")
    assert not is_ranked(comparison)


def test_what_is_not_matched_is_told(make_run):
    matched = read_runs([make_run("rope"), make_run("fope")])
    assert config_differences(matched) == {}
    assert "differ in their position embedding alone" in matched_note(matched)
    longer = read_runs([make_run("rope", name="a"), make_run("fope", name="b", length=256)])
    assert config_differences(longer) == {"train.length": ["128", "256"]}
    assert "more than their position embedding: train.length (128, 256)" in matched_note(longer)
    changes = {"model": {"d_model": 64, "num_layers": 4, "attention": "chunked"}}
    ours = make_run("rope", name="ours")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | changes | {"data": {"added": 1}}))
    # How numbers are computed, and what an older run lacks, is no other training.
    assert config_differences(read_runs([ours, make_run("fope", name="theirs")])) == {}
    seeds = read_runs([make_run("alibi", name="c"), make_run("alibi", 1, name="d", length=256)])
    assert config_differences(seeds) == {}  # runs of different seeds need not be


def test_many_variants_have_a_heatmap_of_their_differences(make_seeds, monkeypatch):
    (comparison,) = comparisons(make_seeds(3), "perplexity")
    assert not is_heatmap(comparison)
    monkeypatch.setattr(ranking, "is_heatmap", lambda _: True)
    topic = page._ranking(page.Named(comparison, "validation", "validation"), [])
    stems = [part.stem for part in topic.figures.parts if hasattr(part, "stem")]
    assert stems == ["differences-validation-2048", "differences-validation-128"]
    (axes, _) = topic.figures.parts[2].figure.axes
    assert [text.get_text() for text in axes.texts] == ["1.88", "2.14°", "0.26"]


@pytest.mark.slow
def test_the_page_ranks_where_seeds_are_shared(make_seeds, make_run, tmp_path):
    text = write_report([run.path for run in make_seeds(3)], tmp_path / "out").read_text()
    assert "Differences between variants (validation)" in text
    table = text.index("Paired differences of loss at 2,048 tokens")
    assert text.index("At 2,048 tokens the 95% interval") < table < text.index("<h2>Numbers")
    alone = write_report([make_run("rope", name="x")], tmp_path / "alone").read_text()
    assert "Differences between variants" not in alone
