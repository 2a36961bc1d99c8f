"""One record for each protocol, text or task, and context: the numbers of the report's tables."""

import math

import pytest

from fope_jax.report.comparison import comparisons
from fope_jax.report.rows import read_run
from fope_jax.report.summary import summarize
from fope_jax.report.sums import Sums

METRICS = {"perplexity": Sums.perplexity, "loss": Sums.loss, "bits_per_byte": Sums.bits_per_byte}


@pytest.fixture
def run(make_run):
    return read_run(make_run("fope"))


def test_numbers_are_those_of_the_report(run):
    records = summarize(run.rows)
    (text,) = comparisons([run], "perplexity")
    seen = [record for record in records if record["protocol"] == "same-tokens"]
    assert [record["context"] for record in seen] == text.contexts
    for name, metric in METRICS.items():
        (numbers,) = text.numbers(metric)["fope"].values()
        assert {record["context"]: record[name] for record in seen} == pytest.approx(numbers)
    for passkeys in comparisons([run], "passkey"):
        (numbers,) = passkeys.numbers(Sums.accuracy)["fope"].values()
        found = {
            record["context"]: 100 * record["accuracy"]
            for record in records
            if (record["protocol"], record["data"]) == ("passkey", passkeys.name)
        }
        assert found == pytest.approx(numbers)


def test_every_scored_row_counts_once(run):
    records = summarize(run.rows)
    for kind, name in (("perplexity", "tokens"), ("passkey", "total"), ("position", "tokens")):
        rows = run.of(kind)
        protocols = {row.get("protocol", kind) for row in rows}
        counted = "trials" if name == "total" else name
        total = sum(r[counted] for r in records if r["protocol"] in protocols)
        assert total == sum(row[name] for row in rows) > 0
    buckets = [record["bucket"] for record in records if record["protocol"] == "long-window"]
    assert buckets == sorted(buckets) and buckets[0][0] == 0
    assert {r["bucket"] for r in records if r["protocol"] != "long-window"} == {None}
    assert {r["documents"] for r in records if r["protocol"] == "same-tokens"} == {2}


def test_what_does_not_apply_is_nan_or_zero():
    row = {"kind": "retrieval", "task": "copy", "context": 64, "training_length": 32}
    (record,) = summarize([row | {"nats": math.inf, "tokens": 8, "correct": 0, "total": 2}])
    assert math.isnan(record["bits_per_byte"]) and record["perplexity"] == math.inf
    assert (record["documents"], record["multiple"]) == (0, 2.0)
    assert summarize([{"kind": "train", "loss": 1.0}, {"kind": "time"}]) == []
