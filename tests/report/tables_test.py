"""Tables: the numbers in them, in text and in HTML."""

import math
from html.parser import HTMLParser

from fope_jax.report import tables
from fope_jax.report.comparison import comparisons
from fope_jax.report.html import write_page
from fope_jax.report.rows import read_runs
from fope_jax.report.sums import spread
from fope_jax.report.tables import (
    Table,
    as_text,
    depth_table,
    document_table,
    format_number,
    format_spread,
    perplexity_tables,
    position_tables,
    retrieval_tables,
    text_tables,
)
from fope_jax.report.tasks import task_tables


def cells(table):
    """The numbers, without the intervals below them."""
    return {
        head: {
            column: value.split("\n")[0]
            for column, value in zip(table.columns, values, strict=True)
        }
        for head, values in table.rows
    }


def test_perplexity_ratio_and_bits_of_every_variant_and_context(synthetic, four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    perplexity, ratio, bits = map(cells, perplexity_tables(comparison))
    assert list(perplexity) == list(synthetic.LOSSES)
    for variant, losses in synthetic.LOSSES.items():
        for context, loss in zip(synthetic.CONTEXTS, losses, strict=True):
            column = f"{context:,}"
            assert perplexity[variant][column] == format_number(math.exp(loss))
            assert ratio[variant][column] == format_number(math.exp(loss - losses[0]))
            assert bits[variant][column] == f"{loss / math.log(2) / 3:.3f}"


def test_passkeys_are_counted_over_depths(synthetic, four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "passkey")
    found, loss = map(cells, retrieval_tables(comparison))
    for variant, shares in synthetic.ACCURACY.items():
        for context, share in zip(synthetic.CONTEXTS, shares, strict=True):
            right = sum(
                round(20 * min(1, share * (0.7 + 0.6 * depth))) for depth in synthetic.DEPTHS
            )
            assert found[variant][f"{context:,}"] == f"{right}/100 ({right}%)"
            assert loss[variant][f"{context:,}"] == f"{2.5 - 2 * share:.3f}"
    assert len(depth_table(comparison).rows) == 4 * len(synthetic.CONTEXTS) * len(synthetic.DEPTHS)


def test_positions_are_rows(four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "position")
    table, bits = map(cells, position_tables(comparison))
    assert list(table)[:2] == ["0 to 3", "4 to 7"]
    assert list(table)[-1] == "1,024 to 2,047"
    assert table["0 to 3"]["rope"] == f"{3.10 + 1:.3f}"
    assert table["0 to 3"]["tokens"] == "32"
    assert table["0 to 3"]["documents"] == "-"
    assert bits["0 to 3"]["rope"] == f"{4.10 * 32 / math.log(2) / 100:.3f}"


def test_every_document_has_its_row(synthetic, four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    table = document_table(comparison)
    assert len(table.rows) == 4 * len(synthetic.CONTEXTS) * 2
    assert (
        "rope",
        [
            "0",
            "1000",
            "Emma",
            "128",
            "100",
            "6,400",
            "19,200",
            "19,840.00",
            "3.100",
            "22.20",
            "1.491",
            "25.0%",
        ],
    ) in table.rows


def test_terminal_tables_align_and_name_what_is_missing(four_runs, make_run):
    rows = [{"kind": "train", "step": 1, "tokens_seen": 10, "loss": 3.0}]
    text = text_tables(read_runs([*four_runs, make_run("rope", name="young", rows=rows)]))
    first = text.split("\n\n")[0].splitlines()
    assert first[:3] == [
        "Perplexity (protocol same-tokens, validation split, trained on 128 tokens)",
        "the same 9,600 tokens of 2 documents in 150 windows at every context; no BOS token is "
        "added; 1 seed",
        "context (tokens)    128    256     512   1,024   2,048",
    ]
    assert len({len(line) for line in first[2:]}) == 1
    assert "22.20" in first[4]
    assert text.count("no BOS token is added") == 1  # what was scored is said once
    assert "93/100 (93%)" in text
    assert "No intervals over 2 documents: below 10 they hold less often than they say" in text
    assert "not evaluated yet" in text.splitlines()[-1]
    assert text.splitlines()[-1].endswith("young")


def test_intervals_stand_below_the_numbers_where_documents_are_enough(make_run, synthetic):
    text = text_tables(read_runs([make_run("rope", tokens=synthetic.TEN_BOOKS)]))
    lines = text.splitlines()
    assert lines[2] == "seed; in brackets: 95% interval over documents"
    assert "[22.20, 22.20]" in lines[6]
    assert "No intervals" not in text


def test_a_task_that_no_variant_solves_is_one_line(make_run, synthetic):
    rows = synthetic.rows_of("rope", 0)
    for row in rows:
        if row["kind"] == "passkey":
            row["correct"] = 0
    text = text_tables(read_runs([make_run("rope", rows=rows)]))
    assert (
        "Compact template: no passkeys found by any variant, in 100 trials at each of 5 lengths "
        "from 128 to 2,048 tokens."
    ) in text
    assert "Passkeys found" not in text
    longer = [row | {"variant": "nope"} for row in rows if row.get("context", 0) > 128]
    runs = [make_run("rope", name="all", rows=rows), make_run("nope", rows=longer)]
    assert "lengths from 128 to 2,048 tokens that it was asked at." in text_tables(read_runs(runs))


def test_resets_are_compared_within_each_seed(make_run, synthetic):
    """Whatever seeds were scored with and without; only those with both count."""
    runs = []
    for seed, protocols in enumerate((["document-resets"], ["no-resets", "document-resets"])):
        rows = [row for row in synthetic.rows_of("rope", seed) if row["kind"] == "perplexity"]
        rows = [row | {"protocol": name} for name in protocols for row in rows]
        for row in rows:
            row["nats"] += seed * row["tokens"]
        runs.append(make_run("rope", seed, rows=rows))
    found = {c.protocol: c for c in comparisons(read_runs(runs), "perplexity")}
    table = tables.reset_table(found["document-resets"], found["no-resets"])
    ((_, cells),) = table.rows
    assert set(cells) == {"1.000"}


def test_scores_of_several_seeds_have_their_deviation_and_of_one_the_error_over_items(make_run):
    """Of 10 items 5 and 7 are right: sqrt(0.02) over seeds; sqrt(0.25 / 9) over those of one."""
    ids = {"variant": "rope", "step": 1000, "training_length": 128, "truncated": 0}
    runs = []
    for seed, right in enumerate((5.0, 7.0)):
        row = {"kind": "task", "protocol": "file", "task": "own", **ids, "seed": seed}
        row |= {"total": 10, "scores": {"f1": [right, right]}, "multiples": [0, 1]}
        runs += read_runs([make_run("rope", seed, rows=[row])])
    (both,), (one,) = task_tables(runs), task_tables(runs[:1])
    assert both.rows == [("rope", ["60.00\n± 14.14, 10 items"])]
    assert both.note == "± is the deviation over seeds"
    assert one.rows == [("rope", ["50.00\n± 16.67, 10 items"])]
    assert one.note == "± is the standard error over items"


def test_the_items_of_a_seed_without_a_range_do_not_count_for_it(make_run):
    """Seed 1 has no item in the first range, and fewer seeds than the other method."""
    ids = {"step": 1000, "training_length": 128, "truncated": 0, "kind": "task", "task": "own"}
    ids |= {"protocol": "file"}
    runs = []
    for variant, seed, of_ranges in (("a", 0, (6, 4)), ("a", 1, (0, 10)), ("b", 0, (5, 5))):
        rows = [
            {**ids, "variant": variant, "seed": seed, "multiples": [k, k + 1], "total": count}
            | {"scores": {"f1": [count / 2, count / 2]}}
            for k, count in enumerate(of_ranges)
            if count
        ]
        runs += read_runs([make_run(variant, seed, rows=rows)])
    (table,) = task_tables(runs)
    assert table.rows[0][1][0].endswith("6 items")
    assert table.note == (
        "± is the deviation over seeds, with one seed the standard error over items"
    )


def test_too_many_rows_are_cut_with_a_word(four_runs, monkeypatch):
    monkeypatch.setattr(tables, "MOST_ROWS", 7)
    (comparison,) = comparisons(read_runs(four_runs), "perplexity")
    table = document_table(comparison)
    assert len(table.rows) == 7
    assert table.note == "the first 7 of 40 rows; all are in metrics.jsonl"


def test_spread_shows_only_over_seeds():
    assert format_spread(spread([2.0])) == "2.00"
    assert format_spread(spread([2.0, 4.0])) == "3.00 ± 1.41"
    assert format_spread(spread([2.0, 2.0 + 1e-12])) == "2.00 ± <0.01"
    assert format_spread(None) == "-"


class Outline(HTMLParser):
    """Start tags with attributes, checking that every one is closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_tables_escape_and_name_the_scope_of_their_headers(tmp_path):
    table = Table("a < b", "variant", ["1 & 2"], [("<script>", ["3\n[<2, 4]"])], note="x > y")
    html = write_page(tmp_path, "A table", [table]).read_text()
    assert "<script>" not in html
    assert "a &lt; b" in html
    assert "<td>3<br><small>[&lt;2, 4]</small></td>" in html
    outline = Outline()
    outline.feed(html)
    assert not outline.open
    heads = [attrs for tag, attrs in outline.tags if tag == "th"]
    assert [attrs["scope"] for attrs in heads] == ["col", "col", "row"]
    text = as_text(table).splitlines()
    assert text[:2] == ["a < b", "x > y"]
    assert [line.split() for line in text[-2:]] == [["<script>", "3"], ["[<2,", "4]"]]
