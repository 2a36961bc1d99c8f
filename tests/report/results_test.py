"""A run's results in one file say what its directory says, without the machine's names."""

import json

import pytest

from fope_jax.report.comparison import Comparison, check_comparable, comparisons
from fope_jax.report.page import write_report
from fope_jax.report.results import add_up_documents, write_results
from fope_jax.report.rows import ReportError, read_run, read_with_variants, results_file
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


def test_what_a_run_is_without_training_has_a_file_of_its_own(synthetic, make_run, tmp_path):
    rows = synthetic.rows_of("rope", 0)
    scored = [row | {"as": "yarn:factor=2", "variant": "rope as yarn:factor=2"} for row in rows]
    variant = read_with_variants(make_run("rope", rows=[*rows, *scored]))[1]
    path = tmp_path / results_file(variant.path.name)
    assert path.name == "rope-0_as_yarn_factor_2.jsonl"
    write_results(variant, path)
    kept = read_run(path)
    assert (kept.variant, kept.step) == ("rope as yarn:factor=2", variant.step)
    assert kept.info["as"] == variant.info["as"] and kept.info["as"]["run"] == "rope"
    assert list(kept.rows) == [row for row in variant.rows if row["kind"] != "time"]


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


def of_other_pages(rows):
    return [
        row | {"document": f"other {row['document']}"} if "document" in row else row for row in rows
    ]


@pytest.fixture(params=["directories", "files", "a directory and a file"])
def runs_of_many_pages(request, make_run, synthetic, tmp_path):
    """Three runs scored on 30 documents of equal counts, the last on others than the first two."""

    def read(variant, change=lambda rows: rows):
        rows = change(synthetic.rows_of(variant, 0, tokens={f"page {i}": 64 for i in range(30)}))
        run = read_run(make_run(variant, rows=rows))
        in_file = {"directories": [], "files": ["rope", "alibi", "fope"]}
        if variant not in in_file.get(request.param, ["alibi"]):
            return run
        write_results(run, tmp_path / f"{variant}.jsonl")
        return read_run(tmp_path / f"{variant}.jsonl")

    return [read("rope"), read("alibi"), read("fope", of_other_pages)]


def test_runs_scored_on_other_documents_are_apart_however_many_these_are(runs_of_many_pages):
    found = comparisons(runs_of_many_pages, "perplexity")
    assert sorted(tuple(one.curves) for one in found) == [("fope",), ("rope", "alibi")]
    one, other = (next(c for c in found if name in c.curves) for name in ("rope", "fope"))
    mixed = Comparison("perplexity", one.name, one.curves | other.curves, {})
    with pytest.raises(ReportError, match="'rope' and 'fope' were scored on different things"):
        check_comparable(mixed)


def test_documents_of_one_name_with_other_tokens_are_others(make_run):
    """Lines of two files of one name: file.jsonl:1, file.jsonl:2, .."""
    one, other = ({f"file:{i}": 64 * (1 + (i + k) % 30) for i in range(30)} for k in range(2))
    runs = [make_run("rope", tokens=one), make_run("fope", tokens=other)]
    found = comparisons(list(map(read_run, runs)), "perplexity")
    assert sorted(tuple(comparison.curves) for comparison in found) == [("fope",), ("rope",)]


def test_chunks_of_other_documents_are_apart(make_run, synthetic):
    """They have as many tokens wherever they come from."""

    def in_chunks(rows):
        return [
            row | {"protocol": "chunks"} if row["kind"] == "perplexity" else row for row in rows
        ]

    one = make_run("rope", rows=in_chunks(synthetic.rows_of("rope", 0)))
    other = make_run("fope", rows=in_chunks(of_other_pages(synthetic.rows_of("fope", 0))))
    found = comparisons([read_run(one), read_run(other)], "perplexity")
    assert sorted(tuple(comparison.curves) for comparison in found) == [("fope",), ("rope",)]


def test_files_without_the_digest_are_compared_by_counts(make_run, synthetic, tmp_path):
    """Those of earlier versions: with each other, and with all others if these agree."""
    paths = {}
    for variant, change in (("rope", list), ("alibi", list), ("nope", of_other_pages)):
        rows = change(synthetic.rows_of(variant, 0, tokens={f"page {i}": 64 for i in range(30)}))
        paths[variant] = tmp_path / f"{variant}.jsonl"
        write_results(read_run(make_run(variant, rows=rows)), paths[variant])
        if variant != "alibi":
            lines = map(json.loads, paths[variant].read_text().splitlines())
            old = [{k: v for k, v in row.items() if k != "documents_digest"} for row in lines]
            paths[variant].write_text("".join(json.dumps(row) + "\n" for row in old))
    runs = [read_run(path) for path in paths.values()]
    (comparison,) = comparisons(runs, "perplexity")
    assert list(comparison.curves) == ["rope", "alibi", "nope"]
    check_comparable(comparison)
    rows = of_other_pages(synthetic.rows_of("fope", 0, tokens={f"page {i}": 64 for i in range(30)}))
    found = comparisons([*runs, read_run(make_run("fope", rows=rows))], "perplexity")
    by_documents = [("alibi",), ("fope",), ("rope", "nope")]
    assert sorted(tuple(one.curves) for one in found) == by_documents


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
