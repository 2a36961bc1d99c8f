"""Scores in ranges of length: every trial and every token in exactly one range."""

import pytest

from fope_jax.main import main
from fope_jax.report.length_buckets import bucket_names, bucket_tables, parse_edges
from fope_jax.report.page import write_report
from fope_jax.report.rows import ReportError, read_run, read_runs

pytestmark = pytest.mark.usefixtures("undrawn")


def cells(table):
    return {head: dict(zip(table.columns, row, strict=True)) for head, row in table.rows}


@pytest.fixture
def runs(make_run):
    return [make_run(name, seed) for name in ("rope", "fope") for seed in (0, 1)]


def test_trials_fall_into_the_range_of_their_window(runs, synthetic):
    """A window as long as an edge belongs to the range that ends there."""
    table = bucket_tables(read_runs(runs), (256, 1024))[0]
    assert table.title == "Right answers by length (compact template, trained on 128 tokens)"
    assert table.note == "windows of 128, 256, 512, 1,024, 2,048 tokens"
    rows = [row for path in runs for row in read_run(path).of("passkey")]
    ranges = {"0-256": (128, 256), "256-1k": (512, 1024), "1k+": (2048,)}
    for name, contexts in ranges.items():
        own = [r for r in rows if r["variant"] == "rope" and r["context"] in contexts]
        right, total = (sum(row[part] for row in own) for part in ("correct", "total"))
        assert total == 2 * len(contexts) * len(synthetic.DEPTHS) * 20
        assert cells(table)["rope"][name] == f"{right}/{total} ({100 * right / total:.0f}%)"


def test_a_range_without_windows_is_empty(runs):
    table = bucket_tables(read_runs(runs), (4096, 8192))[0]
    assert cells(table)["fope"]["4k-8k"] == cells(table)["fope"]["8k+"] == "-"


def answers(task, total, correct):
    """Rows of a task with the right answers of ``total`` at each context."""
    ids = {"variant": "rope", "seed": 0, "step": 1, "training_length": 64, "depth": None}
    shared = {
        "kind": "retrieval",
        "protocol": "retrieval",
        "task": task,
        **ids,
        "nats": 1.0,
        "found": 0,
        "asked": 0,
        "first": 0,
        "rank_sum": 0,
        "candidates": 10,
    }
    return [
        {**shared, "context": context, "tokens": total, "total": total, "correct": right}
        for context, right in correct.items()
    ]


def test_each_task_counts_alike_in_the_mean(make_run):
    recall = answers("recall", 10, {64: 10, 4096: 5, 8192: 0})
    rows = [*recall, *answers("copy", 1000, {64: 0, 4096: 0, 8192: 500})]
    run = read_run(make_run("rope", rows=rows))
    copy, recall, mean = bucket_tables([run], parse_edges("4k,8k"))
    assert mean.title == "Right answers by length, mean over tasks"
    assert cells(recall)["rope"] == {"0-4k": "15/20 (75%)", "4k-8k": "0/10 (0%)", "8k+": "-"}
    assert cells(copy)["rope"] == {"0-4k": "0/2000 (0%)", "4k-8k": "500/1000 (50%)", "8k+": "-"}
    assert cells(mean)["rope"] == {"0-4k": "38%", "4k-8k": "25%", "8k+": "-"}


def test_a_range_that_one_task_lacks_has_no_mean_over_tasks(make_run):
    recall = answers("recall", 10, {64: 9, 8192: 6, 16384: 4})
    rows = [*recall, *answers("copy", 10, {64: 2, 8192: 3})]
    run = read_run(make_run("rope", rows=rows))
    _, recall, mean = bucket_tables([run], parse_edges("4k,8k"))
    assert cells(recall)["rope"]["8k+"] == "4/10 (40%)"
    assert cells(mean)["rope"] == {"0-4k": "55%", "4k-8k": "45%", "8k+": "-"}


def test_losses_by_position_are_pooled_over_tokens(runs):
    losses = bucket_tables(read_runs(runs), (512,))[-1]
    rows = [row for row in read_run(runs[0]).of("position") if row["bucket"][1] <= 512]
    assert sum(row["tokens"] for row in rows) == 8 * 512
    expected = sum(row["nats"] for row in rows) / (8 * 512)
    assert cells(losses)["rope"]["0-512"] == f"{expected:.3f} ± 0.000"


def test_positions_on_both_sides_of_an_edge_are_refused(runs):
    told = "one number for positions 512 to 1,023, .* both sides of 1,000; an edge at 512 or 1,024"
    with pytest.raises(ReportError, match=told):
        bucket_tables(read_runs(runs), (1000,))


@pytest.mark.parametrize("text", ["", "8k,4k", "4k,4096", "4K", "0,8k", "-1", "4k;8k"])
def test_edges_are_rising_lengths(text):
    with pytest.raises(ReportError, match="accepted: rising lengths in tokens, such as 4k,8k"):
        parse_edges(text)


def test_names_are_exact():
    assert bucket_names((100, 2048)) == ["0-100", "100-2k", "2k+"]


@pytest.mark.slow
def test_the_report_shows_them_where_they_are_asked_for(runs, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["report", *map(str, runs), "-o", str(out)]
    assert main([*command, "--buckets", "256,1k"]) == 0
    assert "Right answers by length (compact template" in capsys.readouterr().out
    assert 'id="ranges-of-length"' in (out / "index.html").read_text()
    assert 'id="ranges-of-length"' not in write_report(runs, out).read_text()
    assert main([*command, "--buckets", "9,1"]) == 2
    assert "--buckets 9,1; accepted" in capsys.readouterr().err


@pytest.mark.parametrize("edges", [(1024, 256), (0,), (-5,), (256, 256), (1.5,), (True,)])
def test_edges_from_python_are_checked_as_well(edges):
    with pytest.raises(ReportError, match="accepted: rising lengths in tokens, such as 4k,8k or"):
        bucket_tables([], edges)
