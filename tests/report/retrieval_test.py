"""Retrieval tasks in the report: shares, parts, ranks, and a heatmap where there are depths."""

import pytest

from fope_jax.report import plots
from fope_jax.report.comparison import comparisons
from fope_jax.report.page import write_report
from fope_jax.report.rows import ReportError, read_run, read_runs
from fope_jax.report.tables import retrieval_tables, text_tables

pytestmark = pytest.mark.usefixtures("undrawn")

IDS = {"step": 1000, "training_length": 64}


def rows_of(variant, seed=0, right=(20, 5), ranks=True):
    """A task by depth and one without, at two lengths."""
    rows = []
    for context, correct in zip((64, 1024), right, strict=True):
        shared = {
            "kind": "retrieval",
            "protocol": "retrieval",
            "variant": variant,
            "seed": seed,
            **IDS,
            "context": context,
            "candidates": 10,
            "nats": 40.0,
        }
        for depth in (0.0, 1.0):
            rows.append(
                {
                    **shared,
                    "task": "recall",
                    "depth": depth,
                    "correct": correct,
                    "total": 20,
                    "found": 0,
                    "asked": 0,
                    "first": correct,
                    "rank_sum": 20 * 2 if ranks else 0,
                    "tokens": 20,
                }
            )
        rows.append(
            {
                **shared,
                "task": "multi_value",
                "depth": None,
                "correct": 2,
                "total": 40,
                "found": 4 * correct,
                "asked": 160,
                "first": 3,
                "rank_sum": 40 * 5,
                "tokens": 800,
            }
        )
    rows.append(
        {
            "kind": "protocol",
            "protocol": "retrieval",
            "task": "multi_value",
            "variant": variant,
            "seed": seed,
            **IDS,
            "settings": {"haystack": "validation"},
        }
    )
    return rows


@pytest.fixture
def runs(make_run):
    return [
        make_run("rope", rows=rows_of("rope")),
        make_run("fope", rows=rows_of("fope", right=(20, 15))),
    ]


def cells(table):
    return {head: dict(zip(table.columns, row, strict=True)) for head, row in table.rows}


def test_tables_count_answers_parts_and_ranks(runs):
    several, recall = comparisons(read_runs(runs), "retrieval")
    assert (several.name, recall.name) == ("multi_value", "recall")
    right, rank, loss = retrieval_tables(recall)
    assert right.title == "Right answers (recall, trained on 128 tokens)"
    assert cells(right)["fope"] == {"64": "40/40 (100%)", "1,024": "30/40 (75%)"}
    assert cells(rank)["rope"] == {"64": "2.00", "1,024": "2.00"}
    assert "among 10 answers; 1 is the best, 5.5 is chance" in rank.note
    assert cells(loss)["rope"]["64"] == "2.000"
    right, parts, *_ = retrieval_tables(several)
    assert cells(right)["rope"]["64"] == "2/40 (5%)"
    assert cells(parts)["fope"] == {"64": "80/160 (50%)", "1,024": "60/160 (38%)"}
    assert "Right answers (multi value" in text_tables(read_runs(runs))


def test_only_tasks_with_depths_have_a_heatmap(runs):
    several, recall = comparisons(read_runs(runs), "retrieval")
    assert plots.has_depths(recall) and not plots.has_depths(several)
    panels = plots.depth_figure(recall).axes
    assert panels[1].images[0].get_array()[0, 1] == 75


def test_the_page_shows_each_task_and_how_it_was_asked(runs, tmp_path):
    page = write_report(runs, tmp_path / "report").read_text()
    assert "<h2>Retrieval (multi value)</h2>" in page
    assert "The haystack is the validation text." in page
    assert "40 trials at each length, the same" in page
    assert "20 trials at each length and each of 2 depths" in page
    files = {path.name for path in (tmp_path / "report").glob("retrieval*.png")}
    assert files == {
        "retrieval-multi_value.png",
        "retrieval-recall.png",
        "retrieval-depth-recall.png",
    }


def test_a_row_without_its_rank_is_named(make_run):
    rows = rows_of("rope")
    del rows[0]["rank_sum"]
    with pytest.raises(ReportError, match="line 1: a 'retrieval' row has no 'rank_sum'"):
        read_run(make_run("rope", rows=rows))


def test_passkeys_have_ranks_where_they_were_taken(synthetic, make_run):
    """An older run's rows have none; its cells stay empty."""
    ranked = synthetic.rows_of("fope", 0)
    for row in ranked:
        if row["kind"] == "passkey":
            row |= {"candidates": 10, "rank_sum": 30, "first": 12, "found": 1, "asked": 20}
    runs = [make_run("alibi"), make_run("fope", rows=ranked)]
    (comparison,) = comparisons(read_runs(runs), "passkey")
    _, rank, _ = map(cells, retrieval_tables(comparison))
    assert (rank["fope"]["128"], rank["alibi"]["128"]) == ("1.50", "-")
    wrong = next(row for row in ranked if row["kind"] == "passkey")
    wrong["first"] = 1.5
    with pytest.raises(ReportError, match="'first' of a 'passkey' row is 1.5; accepted: int"):
        read_run(make_run("rope", rows=[wrong]))
