"""A run's results in one file say what its directory says, without the machine's names."""

import json

import pytest

from fope_jax.report.comparison import comparisons
from fope_jax.report.page import write_report
from fope_jax.report.results import add_up_documents, write_results
from fope_jax.report.rows import ReportError, read_run
from fope_jax.report.sums import add_up

pytestmark = pytest.mark.usefixtures("undrawn")


def test_the_file_stands_for_the_directory(make_run, tmp_path):
    directory = make_run("rope", seed=2)
    run = read_run(directory)
    write_results(run, tmp_path / "kept" / "rope_2.jsonl")
    kept = read_run(tmp_path / "kept" / "rope_2.jsonl")
    assert (kept.variant, kept.seed, kept.step) == ("rope", 2, 1000)
    assert kept.config == run.config
    assert list(kept.rows) == [row for row in run.rows if row["kind"] != "time"]
    assert kept.info["commit"] == "0123abc"
    text = (tmp_path / "kept" / "rope_2.jsonl").read_text()
    assert "box" not in text  # the host
    assert '"command"' not in text
    page = write_report([tmp_path / "kept" / "rope_2.jsonl"], tmp_path / "out")
    assert "0123abc" in page.read_text()


def test_parents_are_found_among_files(make_run, tmp_path):
    from fope_jax.report.lineage import parent_of

    parent, child = make_run("rope"), make_run("fope", name="child")
    lineage = {
        "parent": {"run": str(parent), "tokens_seen": 5},
        "request": {"parent": str(parent), "step": 3},
    }
    (child / "lineage.json").write_text(json.dumps(lineage))
    for directory in (parent, child):
        write_results(read_run(directory), tmp_path / "kept" / f"{directory.name}.jsonl")
    assert str(tmp_path) not in (tmp_path / "kept" / "child.jsonl").read_text()
    runs = [read_run(tmp_path / "kept" / f"{name}.jsonl") for name in ("rope-0", "child")]
    assert parent_of(runs[1], runs) is runs[0]


def test_many_documents_are_added_up_and_few_are_kept(synthetic, make_run):
    few = [row for row in synthetic.rows_of("rope", 0) if row["kind"] == "perplexity"]
    assert add_up_documents(few) == few
    many = synthetic.rows_of("rope", 0, tokens={f"page {i}": 64 * (i + 1) for i in range(30)})
    kept = add_up_documents(many)
    pages = [row for row in kept if row["kind"] == "perplexity"]
    assert [row["context"] for row in pages] == list(synthetic.CONTEXTS)
    assert {(row["document"], row["documents"]) for row in pages} == {(None, 30)}
    assert len(kept) == len(many) - 5 * 29
    for row in pages:
        own = [r for r in many if r["kind"] == "perplexity" and r["context"] == row["context"]]
        assert add_up([row]) == add_up(own)
        assert row["windows"] == sum(r["windows"] for r in own)


def test_added_up_runs_are_compared_with_whole_ones(make_run, tmp_path):
    tokens = {f"page {i}": 64 for i in range(30)}
    whole, other = make_run("rope", tokens=tokens), make_run("fope", tokens=tokens)
    write_results(read_run(other), tmp_path / "fope.jsonl")
    found = comparisons([read_run(whole), read_run(tmp_path / "fope.jsonl")], "perplexity")
    assert [list(comparison.curves) for comparison in found] == [["rope", "fope"]]


HEAD = '{"kind": "run", "config": {}, "info": {}, "lineage": {}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no results file: its first line has no kind 'run'"),
        ('{"kind": "time", "phase": "a", "seconds": 1}\n', "is no results file"),
        ("{\n", "line 1 is no JSON object"),
        (HEAD, "the last line was cut off"),
        (HEAD + '\n{"kind": "perpl', "the last line was cut off"),
        ('{"kind": "run", "config": 3}\n', "line 1: 'config' of a 'run' row is 3"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ReportError, match=message):
        read_run(tmp_path / "x.jsonl")
