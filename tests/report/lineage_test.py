"""Runs that go on from others: told with both sides, drawn on one axis, one after the other."""

import json

import pytest

from fope_jax.report.charts import training_chart
from fope_jax.report.lineage import lineage_sentences, lineage_table, parent_of, tokens_before
from fope_jax.report.page import write_report
from fope_jax.report.rows import read_runs

pytestmark = pytest.mark.usefixtures("undrawn")

FREQUENCIES = "of 16 frequencies 9 kept, 7 divided by 1.2 to 2, 0 zeroed, 0 new"


def lineage(parent, **changes):
    """What `fope extend` writes, with numbers that are easy to find again."""
    return {
        "request": {"parent": str(parent.resolve()), "step": 1000, "optimizer": "keep"},
        "parent": {
            "run": str(parent.resolve()),
            "step": 1000,
            "name": "rope",
            "length": 128,
            "tokens_seen": 4_096_000,
            "position": {"hash": "0", "summary": "rope(before)"},
        },
        "child": {
            "name": "nope",
            "length": 256,
            "position": {"hash": "1", "summary": "rope(after)"},
        },
        "frequencies": {"text": FREQUENCIES},
        "arrays": "coefficients of 9 kept",
        "data": {"text": "8 rows an update in place of 16"},
        "start": {
            "parent": 3.125,
            "parent_at_new_length": 3.625,
            "child": 3.25,
            "ratio": 1.04,
            "warning": None,
        },
    } | changes


@pytest.fixture
def pair(make_run):
    """A parent at 128 tokens, and its child at 256."""
    parent = make_run("rope")
    child = make_run("nope", length=256)
    (child / "lineage.json").write_text(json.dumps(lineage(parent)))
    return parent, child


def test_both_sides_are_told(pair):
    runs = read_runs(pair)
    assert lineage_sentences(runs) == [
        f"nope goes on from rope, step 1,000, at 256 tokens in place of 128: {FREQUENCIES}; "
        "coefficients of 9 kept."
    ]
    table = lineage_table(runs)
    assert [name for name, _ in table.rows if name] == ["nope"]
    facts = {cells[1]: cells[2] for _, cells in table.rows}
    assert facts["training length"] == "128 tokens, then 256"
    assert (facts["position before"], facts["position after"]) == ("rope(before)", "rope(after)")
    assert facts["loss before the first update (nats/token)"] == (
        "3.125 as the parent at 128 tokens; 3.625 as the parent at 256; 3.250 as changed at 256, "
        "1.04 times the first"
    )
    assert "warning" not in facts and "parent" not in facts
    assert (parent_of(runs[1], runs), parent_of(runs[0], runs)) == (runs[0], None)


def test_the_childs_curve_begins_where_the_parents_ends(pair):
    runs = read_runs(pair)
    assert [tokens_before(run) for run in runs] == [0, 4_096_000]
    before, after = (curve.x for curve in training_chart(runs).curves.values())
    assert before[-1] == 1000 * 4096 == after[0] - 25 * 4096


def test_the_page_states_it_with_both_on_one_axis(pair, tmp_path):
    page = write_report(pair, tmp_path / "report").read_text()
    assert page.index("<h2>Lineage</h2>") < page.index("<h2>Perplexity against context length")
    assert FREQUENCIES in page and "8 rows an update in place of 16" in page
    assert page.count("<h2>Perplexity against") == 1
    assert page.count("<figure>") == 7


def test_a_parent_that_is_not_shown_and_a_loud_start(pair):
    parent, child = pair
    start = lineage(parent)["start"] | {"warning": "it broke", "parent_at_new_length": None}
    changed = lineage(parent, frequencies=None, arrays="table stretched", start=start)
    (child / "lineage.json").write_text(json.dumps(changed))
    runs = read_runs([child])
    assert lineage_sentences(runs) == [
        "nope goes on from rope, step 1,000 (not shown), at 256 tokens in place of 128: table "
        "stretched."
    ]
    facts = [cells for _, cells in lineage_table(runs).rows]
    assert facts[0] == ["rope, step 1,000", "warning", "it broke"]
    assert facts[-1] == ["", "parent", f"{parent.resolve()}, not in this report"]
    assert "- as the parent at 256" in str(facts)
    (child / "lineage.json").write_text(json.dumps(changed | {"arrays": ""}))
    assert lineage_sentences(read_runs([child]))[0].endswith("in place of 128.")


def test_seeds_of_a_variant_are_told_once_and_by_seed_where_they_differ(make_run):
    children = []
    for seed, loss in enumerate((3.25, 3.5)):
        parent = make_run("rope", seed)
        child = make_run("nope", seed, length=256)
        start = lineage(parent)["start"] | {"child": loss}
        (child / "lineage.json").write_text(json.dumps(lineage(parent, start=start)))
        children += [parent, child]
    runs = read_runs(children)
    assert len(lineage_sentences(runs)) == 1
    facts = {cells[1]: cells[2] for _, cells in lineage_table(runs).rows}
    assert facts["frequencies"] == FREQUENCIES
    one, other = facts["loss before the first update (nats/token)"].split("\n")
    assert one.startswith("seed 0: 3.125 as") and "3.250 as changed" in one
    assert other.startswith("seed 1: 3.125 as") and "3.500 as changed" in other


def test_runs_from_the_beginning_have_no_lineage(four_runs, tmp_path):
    runs = read_runs(four_runs)
    assert not lineage_table(runs).rows and not lineage_sentences(runs)
    assert "Lineage" not in write_report(four_runs, tmp_path / "report").read_text()
