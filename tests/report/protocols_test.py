"""Protocols in words: each says what was scored, what stands first, and how sure it is."""

import pytest

from fope_jax.report import protocols
from fope_jax.report.comparison import comparisons
from fope_jax.report.rows import read_runs
from fope_jax.report.tables import as_text, perplexity_tables, position_tables, reset_table

FIRST = "no BOS token is added; the first token of a window is read and not scored"


@pytest.fixture
def all_protocols(synthetic, make_run):
    """A run with rows of every protocol, two documents each."""
    rows = synthetic.rows_of("rope", 0)
    ids = {
        "split": "validation",
        "variant": "rope",
        "seed": 0,
        "step": 1000,
        "training_length": 128,
    }
    sums = {"nats": 1.0, "bytes": 300, "correct": 10}
    for name, share in (
        ("sliding-window", 1),
        ("chunks", 1),
        ("document-resets", 1),
        ("no-resets", 2),
    ):
        for context in (128, 2048):
            for document, tokens in (("Emma", 100), ("Moby Dick", 200)):
                less = tokens - 128 * (name == "chunks") // context
                rows.append(
                    {
                        "kind": "perplexity",
                        "protocol": name,
                        **ids,
                        "context": context,
                        "scored_per_window": 64,
                        "windows": 1,
                        **sums,
                        "nats": share * 3.0 * less,
                        "tokens": less,
                        "document": document,
                    }
                )
    for name in ("from-start",):
        for bucket, names in (([0, 128], ("Emma", "Moby Dick")), ([128, 2048], ("Emma",))):
            rows += [
                {
                    "kind": "position",
                    "protocol": name,
                    **ids,
                    "context": 2048,
                    "bucket": bucket,
                    "windows": 1,
                    **sums,
                    "nats": 300.0,
                    "tokens": 100,
                    "document": document,
                }
                for document in names
            ]
    rows += [
        {"kind": "protocol", "protocol": name, **ids, "settings": {}, "windows": 3, "bos": FIRST}
        for name in protocols.DESCRIPTIONS
        if name != "same-tokens"
    ]
    return make_run("rope", rows=rows)


def found(run):
    runs = read_runs([run])
    both = [*comparisons(runs, "perplexity"), *comparisons(runs, "position")]
    return {comparison.protocol: comparison for comparison in both}


def test_every_protocol_is_a_comparison_of_its_own_in_one_order(all_protocols):
    assert tuple(found(all_protocols)) == tuple(protocols.DESCRIPTIONS)


def test_every_table_names_its_protocol(all_protocols):
    for name, comparison in found(all_protocols).items():
        tables = perplexity_tables if comparison.kind == "perplexity" else position_tables
        for table in tables(comparison):
            text = " ".join(as_text(table).split())
            assert f"protocol {name}" in text
            assert "tokens" in text
            assert any("bits per byte" in t.title.lower() for t in tables(comparison))


def test_what_was_scored_is_said(all_protocols):
    own = found(all_protocols)
    text = {name: protocols.protocol_paragraph(comparison) for name, comparison in own.items()}
    assert "3 stretches of 2,048 tokens is scored once: 300 tokens" in text["sliding-window"]
    assert "298 tokens, 600 bytes of text at 128" in text["chunks"]
    assert "among those in which documents meet" in text["no-resets"]
    assert "among those" not in text["chunks"]
    assert "3 documents are read from their first token, at most 2,048" in text["from-start"]
    assert all(FIRST[1:] in value for name, value in text.items() if name != "same-tokens")
    assert text["same-tokens"].endswith("No BOS token is added.")  # rows that do not say


def test_captions_tell_contexts_that_differ_from_those_that_do_not(all_protocols):
    own = found(all_protocols)
    assert protocols.protocol_caption(own["chunks"]).startswith(
        "298 to 300 tokens of 2 documents in 3 bl"
    )
    assert protocols.protocol_caption(own["no-resets"]) == (
        f"the same 300 tokens of 2 documents in 3 blocks at every context; {FIRST}"
    )
    assert protocols.spread_caption(own["no-resets"]) == "1 seed"
    assert protocols.protocol_caption(own["from-start"]).startswith(
        "300 tokens of 2 documents; no BOS"
    )


def test_how_sure_says_why_there_is_no_interval(all_protocols):
    own = found(all_protocols)
    assert protocols.interval_note(own["chunks"]) == ""
    assert protocols.few_documents_note(own.values()).startswith(
        "No intervals over 2 documents: below 10"
    )
    assert protocols.few_documents_note([own["long-window"]]) == ""
    assert protocols.interval_note(own["long-window"]) == (
        "No intervals: these rows do not tell documents apart."
    )


def test_intervals_are_explained_where_there_are_any(make_run, synthetic):
    run = make_run("rope", tokens=synthetic.TEN_BOOKS)
    (comparison,) = comparisons(read_runs([run]), "perplexity")
    note = protocols.interval_note(comparison)
    assert "10 documents drawn with replacement 1,000 times (seed 0)" in note
    assert "they are rough" in note
    assert protocols.protocol_paragraph(comparison).endswith(note)
    assert protocols.few_documents_note([comparison]) == ""


def test_a_bucket_counts_its_documents_and_has_no_interval_of_few(all_protocols):
    loss, bits = position_tables(found(all_protocols)["from-start"])
    assert loss.columns == ["tokens", "documents", "rope"]
    assert loss.rows == [
        ("0 to 127", ["200", "2", "3.000"]),
        ("128 to 2,047", ["100", "1", "3.000"]),
    ]
    assert bits.rows[1][1][2] == "1.443"


def test_resets_are_compared_with_none_on_the_same_tokens(all_protocols):
    own = found(all_protocols)
    table = reset_table(own["document-resets"], own["no-resets"])
    assert table.rows == [("rope", ["0.050", "0.050"])]  # exp(3 - 6)
