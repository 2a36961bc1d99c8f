"""Reading rows, and the numbers that are made of them."""

import json
import math
from pathlib import Path

import pytest

from fope_jax.report.comparison import (
    Comparison,
    check_comparable,
    comparisons,
    run_labels,
    scored_key,
)
from fope_jax.report.page import write_report
from fope_jax.report.results import write_results
from fope_jax.report.rows import ReportError, read_rows, read_run, read_runs
from fope_jax.report.sums import Sums, add_up, group, spread
from fope_jax.report.verdict import verdict
from fope_jax.storage.changeable_keys import CHANGEABLE_KEYS

# ---------------------------------------------------------------------------- reading


def test_a_run_holds_the_rows_of_its_newest_evaluation(synthetic, make_run):
    rows = synthetic.rows_of("rope", 0, step=500) + synthetic.rows_of("rope", 0, step=1000)
    run = read_run(make_run("rope", rows=rows))
    assert run.step == 1000
    assert {row["step"] for row in run.of("perplexity")} == {1000}
    assert len(run.of("train")) == 80
    assert (run.variant, run.seed, run.training_length) == ("rope", 0, 128)
    assert run.info["commit"] == "0123abc"
    earlier = read_run(run.path / "500")
    assert (earlier.path, earlier.step) == (run.path, 500)
    assert {row["step"] for row in earlier.of("perplexity")} == {500}
    with pytest.raises(ReportError, match="step 7 has not been evaluated; evaluated: 500, 1000"):
        read_run(run.path / "7")
    with pytest.raises(ReportError, match="is named twice, at steps 500 and 1000: the mean of the"):
        read_runs([run.path / "500", run.path])
    assert [same.step for same in read_runs([run.path, run.path / "1000"])] == [1000]


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        (None, "{nats: 3}", r"is no JSON object: '\{nats: 3\}"),
        (None, "[1]", r"is no JSON object: '\[1\]'"),
        (None, '{"kinds": "train"}', 'an object with a string "kind"'),
        (
            "perplexity",
            {"nats": "many"},
            "'nats' of a 'perplexity' row is 'many'; accepted: int or float",
        ),
        ("perplexity", {"bytes": ...}, "row has no 'bytes'"),
        ("perplexity", {"context": 128.5}, "'context' .* is 128.5; accepted: int"),
        ("perplexity", {"correct": True}, "'correct' .* is True; accepted"),
        ("perplexity", {"tokens": 0}, "'tokens' .* is 0; accepted: > 0"),
        ("passkey", {"total": 0}, "'total' of a 'passkey' row is 0; accepted: > 0"),
        ("passkey", {"depth": None}, "'depth' .* is None; accepted: int or float"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(synthetic, make_run, kind, line, message):
    path = make_run("rope") / "metrics.jsonl"
    if kind:  # a good row with the changes in ``line``; ... takes a field out
        row = next(row for row in synthetic.rows_of("rope", 0) if row["kind"] == kind) | line
        line = json.dumps({key: value for key, value in row.items() if value is not ...})
    good = path.read_text().splitlines()
    path.write_text("\n".join([*good[:11], line, *good[11:]]) + "\n")
    with pytest.raises(ReportError, match=f"rope-0/metrics.jsonl, line 12:? .*{message}"):
        read_rows(path)


def test_what_another_position_embedding_scored_later_hides_nothing(synthetic, make_run):
    rows = synthetic.rows_of("rope", 0, step=500)
    later = [
        row | {"as": "yarn:factor=2", "variant": "rope as yarn:factor=2", "step": 1000}
        for row in rows
        if row["kind"] in ("perplexity", "protocol")
    ]
    run, variant = read_runs([make_run("rope", rows=[*rows, *later])])
    assert (run.step, variant.step, variant.info["as"]["step"]) == (500, 1000, 1000)
    assert len(run.of("perplexity")) == len(variant.of("perplexity")) == 10


def test_a_results_file_is_of_one_run_and_checked_as_a_directory_is(make_run, tmp_path):
    kept = tmp_path / "kept.jsonl"
    write_results(read_run(make_run("rope")), kept)
    (tmp_path / "two.jsonl").write_text(kept.read_text() * 2)
    with pytest.raises(ReportError, match="two.jsonl holds the results of more than one run"):
        read_run(tmp_path / "two.jsonl")
    head, *rows = kept.read_text().splitlines()
    head = json.loads(head)
    del head["config"]["name"]
    kept.write_text("\n".join([json.dumps(head), *rows]) + "\n")
    with pytest.raises(ReportError, match="kept.jsonl has no 'name'"):
        read_run(kept)


def test_a_torn_last_line_and_unknown_kinds_are_left(make_run):
    path = make_run("rope") / "metrics.jsonl"
    whole = read_rows(path)
    with path.open("a") as stream:
        stream.write('{"kind": "weather", "anything": 1}\n{"kind": "perpl')
    assert read_rows(path) == whole


def test_directories_that_are_no_runs_are_named(tmp_path, make_run):
    with pytest.raises(ReportError, match="no runs to report on"):
        read_runs([])
    with pytest.raises(ReportError, match="nothing is no run: there is no such directory"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(ReportError, match="no run: there is no config.json"):
        read_runs([tmp_path])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ReportError, match="is no run but a checkpoint of Hugging Face; `fope im"):
        read_runs([tmp_path])
    run = make_run("rope")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(
        ReportError, match="rope-0 has no metrics.jsonl: .* neither trained nor evaluated"
    ):
        read_runs([run])
    (run / "config.json").write_text('{"name": "rope"}')
    with pytest.raises(ReportError, match="config.json has no 'seed'"):
        read_runs([run])
    (run / "config.json").write_text("{")
    with pytest.raises(ReportError, match="config.json is no JSON"):
        read_runs([run])


# ---------------------------------------------------------------------------- numbers


def test_ratios_are_taken_of_pooled_sums():
    sums = add_up(
        [
            {"nats": 30.0, "tokens": 10, "bytes": 40, "correct": 5},
            {"nats": 10.0, "tokens": 30, "bytes": 60, "correct": 15},
        ]
    )
    assert sums.perplexity() == math.e  # 40 nats on 40 tokens, not the mean of e**3 and e**(1/3)
    assert sums.bits_per_byte() == pytest.approx(40 / math.log(2) / 100)
    assert sums.token_accuracy() == 50


def test_nothing_is_clipped():
    assert Sums(nats=8e4, tokens=10).perplexity() == math.inf
    assert Sums(nats=690.0, tokens=1).perplexity() == math.exp(690)
    assert math.isnan(Sums(nats=math.nan, tokens=1).perplexity())
    assert math.isnan(Sums(nats=1.0, tokens=1, bytes=0).bits_per_byte())


def test_spread_is_the_sample_deviation():
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 3)
    alone = spread([4.0])
    assert (alone.mean, alone.count) == (4.0, 1)
    assert math.isnan(alone.deviation)


def test_groups_come_in_order():
    assert list(group([{"context": 512}, {"context": 64}], lambda row: row["context"])) == [64, 512]


# ---------------------------------------------------------------------------- comparisons


def test_seeds_of_one_variant_are_one_curve_with_a_spread(make_run):
    runs = read_runs([make_run("fope", seed, shift=0.1 * seed) for seed in (0, 1)])
    (comparison,) = comparisons(runs, "perplexity")
    values = comparison.spreads(Sums.perplexity)["fope"]
    one, two = math.exp(3.09), math.exp(3.19)
    assert values[128].mean == pytest.approx((one + two) / 2)
    assert values[128].deviation == pytest.approx((two - one) / math.sqrt(2))
    ratios = comparison.spreads(Sums.perplexity, relative=True)["fope"]
    assert ratios[128] == (1.0, 0.0, 2)
    assert ratios[2048].mean == pytest.approx(math.exp(3.47 - 3.09))
    assert ratios[2048].deviation < 1e-9  # taken within each seed


def test_runs_scored_on_different_tokens_are_never_in_one_comparison(make_run):
    runs = read_runs([make_run("rope"), make_run("alibi", tokens={"Emma": 6400})])
    both = comparisons(runs, "perplexity")
    assert sorted(list(c.curves) for c in both) == [["alibi"], ["rope"]]
    assert len(comparisons(runs, "passkey")) == 1
    joined = Comparison(
        "perplexity", "validation", both[0].curves | both[1].curves, both[0].training_lengths
    )
    with pytest.raises(ReportError, match=r"'(rope|alibi)' were scored on different things"):
        check_comparable(joined)


def test_protocols_of_one_run_are_compared_apart_and_refused_together(synthetic, make_run):
    rows = synthetic.rows_of("rope", 0)
    rows += [row | {"protocol": "sliding-window"} for row in rows if row["kind"] == "perplexity"]
    one, other = comparisons(read_runs([make_run("rope", rows=rows)]), "perplexity")
    assert (one.protocol, other.protocol) == ("same-tokens", "sliding-window")
    mixed = Comparison(
        "perplexity", "validation", {"rope": [one.first_rows + other.first_rows]}, {}
    )
    with pytest.raises(
        ReportError, match="'same-tokens'.*'sliding-window'.*not belong in one plot"
    ):
        check_comparable(mixed)


def test_chunks_need_not_score_the_same_tokens_at_every_context(synthetic, make_run):
    def chunked(variant, less):
        rows = synthetic.rows_of(variant, 0)
        for row in rows:
            if row["kind"] == "perplexity":
                row |= {"protocol": "chunks", "tokens": row["tokens"] - less // row["context"]}
        return make_run(variant, rows=rows)

    runs = read_runs([chunked("rope", 2048), chunked("fope", 2048), chunked("alibi", 4096)])
    curves = [list(comparison.curves) for comparison in comparisons(runs, "perplexity")]
    assert sorted(curves) == [["alibi"], ["rope", "fope"]]


def test_intervals_are_of_the_mean_over_seeds_and_ratios_are_paired(synthetic, make_run):
    runs = []
    for seed in (0, 1):
        rows = synthetic.rows_of("fope", seed, tokens=synthetic.TEN_BOOKS)
        for row in rows:  # one book is harder by a nat, at every context and for every seed
            if row["kind"] == "perplexity":
                row["nats"] += (0.2 * seed + (row["document"] == "book 0")) * row["tokens"]
        runs.append(make_run("fope", seed, rows=rows))
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    found = comparison.intervals(Sums.loss)["fope"]
    assert found[128] == pytest.approx((3.09 + 0.1, 3.09 + 0.1 + 0.3))  # drawn 0 to 3 times
    ratios = comparison.intervals(Sums.perplexity, relative=True)["fope"]
    assert ratios[2048] == pytest.approx((math.exp(0.38), math.exp(0.38)))
    assert comparison.intervals(Sums.perplexity)["fope"][128].high == pytest.approx(
        (math.exp(3.39) + math.exp(3.59)) / 2
    )


def test_rows_that_do_not_name_documents_have_no_interval(four_runs):
    (comparison,) = comparisons(read_runs(four_runs), "position")
    intervals = comparison.intervals(Sums.loss, lambda row: row["bucket"][0])
    assert intervals == {"rope": {}, "alibi": {}, "nope": {}, "fope": {}}


def test_committed_rows_are_still_readable():
    path = Path(__file__).parents[2] / "experiments/quickstart/results/fope_0.jsonl"
    rows = read_rows(path)
    assert {row["protocol"] for row in rows} >= {"same-tokens", "long-window"}
    assert scored_key("perplexity", [r for r in rows if r["kind"] == "perplexity"])


def test_contexts_scored_on_different_tokens_are_refused(synthetic, make_run):
    rows = [
        row
        for row in synthetic.rows_of("rope", 0)
        if not (row.get("document") == "Emma" and row["context"] == 512)
    ]
    with pytest.raises(ReportError, match=r"'rope' \(seed 0.*not scored on the same .*512: 3,200"):
        comparisons(read_runs([make_run("rope", rows=rows)]), "perplexity")


def with_bos(rows):
    kinds = ("perplexity", "position", "passkey", "retrieval", "validation", "protocol")
    return [row | {"bos_token": "<s>"} if row["kind"] in kinds else row for row in rows]


@pytest.mark.parametrize("kind", ["perplexity", "position", "passkey"])
def test_windows_with_a_bos_token_are_compared_with_their_like_alone(synthetic, make_run, kind):
    added = make_run("rope", rows=with_bos(synthetic.rows_of("rope", 0)))
    other = make_run("alibi", rows=with_bos(synthetic.rows_of("alibi", 0)))
    plain = make_run("nope")
    found = comparisons(read_runs([added, plain, other]), kind)
    assert {tuple(one.curves) for one in found} == {("rope", "alibi"), ("nope",)}
    for one in found:
        check_comparable(one)
    one, other = (next(c for c in found if name in c.curves) for name in ("rope", "nope"))
    mixed = Comparison(kind, one.name, one.curves | other.curves, {})
    with pytest.raises(ReportError, match="'rope' and 'nope' were scored on different things"):
        check_comparable(mixed)


def test_as_many_trials_with_longer_answers_are_other_trials(synthetic, make_run):
    rows = synthetic.rows_of("alibi", 0)
    for row in rows:
        if row["kind"] == "passkey":
            row["tokens"], row["nats"] = 3 * row["tokens"], 3 * row["nats"]
    runs = [make_run("rope"), make_run("alibi", rows=rows), make_run("fope")]
    found = comparisons(read_runs(runs), "passkey")
    assert sorted(tuple(one.curves) for one in found) == [("alibi",), ("rope", "fope")]
    assert len({row["total"] for one in found for _, row in one.labelled_rows()}) == 1


def to_512(rows):
    return [row for row in rows if row.get("context", 0) <= 512]


def in_other_book(rows):
    return [row | {"document": "Ulysses"} if row.get("document") == "Emma" else row for row in rows]


@pytest.mark.parametrize("change", [to_512, in_other_book])
def test_as_many_other_tokens_are_not_the_same_tokens(synthetic, make_run, change):
    """A tokenizer of bytes gives equal counts wherever windows lie."""
    other = make_run("alibi", rows=change(synthetic.rows_of("alibi", 0)))
    runs = read_runs([make_run("rope"), other])
    found = comparisons(runs, "perplexity")
    assert sorted(tuple(one.curves) for one in found) == [("alibi",), ("rope",)]
    note = verdict(runs).table.note
    assert "perplexity: not all on the same tokens, only the ratios compare" in note


def test_a_file_may_lie_in_another_directory(synthetic, make_run):
    rows = synthetic.rows_of("alibi", 0)
    moved = [row | {"document": f"../{row.get('document')}"} for row in rows]
    runs = read_runs([make_run("rope"), make_run("alibi", rows=moved)])
    (comparison,) = comparisons(runs, "perplexity")
    assert comparison.curves.keys() == {"rope", "alibi"}


def test_a_run_may_lack_the_shortest_context(synthetic, make_run, tmp_path, undrawn):
    rows = [row for row in synthetic.rows_of("alibi", 0) if row.get("context", 256) >= 256]
    runs = [make_run("alibi", rows=rows), make_run("rope")]
    (comparison,) = comparisons(read_runs(runs), "perplexity")
    assert list(comparison.sums_by_context) == comparison.contexts
    assert write_report(runs, tmp_path / "page").is_file()


def test_rows_of_one_run_with_and_without_bos_are_refused(synthetic, make_run):
    rows = synthetic.rows_of("rope", 0)
    half = [row for row in rows if row["kind"] == "perplexity"][::2]
    rows = [*(row for row in rows if row not in half), *with_bos(half)]
    with pytest.raises(ReportError, match="'<s>'.* do not belong in one plot"):
        comparisons(read_runs([make_run("rope", rows=rows)]), "perplexity")


def test_one_name_trained_on_two_lengths_is_two_labels(make_run):
    runs = read_runs([make_run("rope"), make_run("rope", name="long", length=512)])
    assert sorted(run_labels(runs).values()) == ["rope (trained on 128)", "rope (trained on 512)"]
    (comparison,) = comparisons(runs, "perplexity")  # the same tokens, so one plot
    ratios = comparison.spreads(Sums.perplexity, relative=True)
    assert ratios["rope (trained on 128)"][128].mean == 1
    assert ratios["rope (trained on 512)"][512].mean == 1


@pytest.fixture
def make_ropes(make_run):
    """Runs of the variant "rope" with these changes of their configurations, by dotted key."""

    def make(*changes, seeds=(0, 0, 0)):
        runs = []
        for index, changed in enumerate(changes):
            runs.append(make_run("rope", seeds[index], name=f"run{index}"))
            path = runs[-1] / "config.json"
            config = json.loads(path.read_text())
            for key, value in changed.items():
                *sections, name = key.split(".")
                (config[sections[0]] if sections else config)[name] = value
            path.write_text(json.dumps(config))
        return read_runs(runs)

    return make


YARN = {"scaling": "yarn", "factor": 2.0, "original_length": 64}
THETA = "position.theta"


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        (({}, {THETA: 5e5}), ("rope (theta=10000)", "rope (theta=500000)")),
        (({}, {"train.steps": 7}), ("rope (train.steps=1000)", "rope (train.steps=7)")),
        (
            ({"position.scaling": []}, {"position.scaling": [YARN]}),
            ("rope (scaling=none)", "rope (scaling=yarn)"),
        ),
        (
            ({"position.scaling": [YARN]}, {"position.scaling": [YARN | {"factor": 16.0}]}),
            ("rope (scaling.0.factor=2)", "rope (scaling.0.factor=16)"),
        ),
    ],
)
def test_runs_of_one_name_are_told_apart_by_the_key_in_which_they_differ(
    make_ropes, changes, labels, seeds
):
    runs = make_ropes(*changes, seeds=seeds)
    assert tuple(run_labels(runs).values()) == labels
    (comparison,) = comparisons(runs, "perplexity")
    assert tuple(comparison.curves) == labels


def test_what_changes_no_number_and_what_older_runs_lack_tells_no_runs_apart(make_ropes):
    same = {"model.remat": "full", "data": {"cache_dir": "x"}, "mesh": {"data": 2}}
    newer = {"model.qkv_bias": False}
    runs = make_ropes({}, same, newer, seeds=(0, 1, 2))
    assert set(run_labels(runs).values()) == {"rope"}


def test_no_key_that_may_change_when_a_run_resumes_tells_runs_apart(make_ropes):
    keys = [key for key in CHANGEABLE_KEYS if key != "name"]
    one, other = ({"data": {}} | dict.fromkeys(keys, value) for value in ("one", "other"))
    assert set(run_labels(make_ropes(one, other, seeds=(0, 1))).values()) == {"rope"}


def test_runs_of_one_name_configuration_and_seed_are_told_apart_by_their_paths(make_ropes):
    runs = make_ropes({}, {}, {}, seeds=(0, 0, 1))
    assert list(run_labels(runs).values()) == [f"rope ({run.path})" for run in runs]


@pytest.mark.parametrize(
    ("changes", "seeds", "reason"),
    [
        (
            ({}, {}, {THETA: 5e5, "train.steps": 7}),
            (0, 1, 0),
            r"run0 and .*run2 are both .*'rope' and differ in .*theta \(10000, 500000\); train\.s",
        ),
        (({}, {THETA: 9.0}, {THETA: 9.0}), (0, 0, 0), "run1 and .*run2 .* both have seed 0"),
        (
            ({}, {"train.length": 512}, {THETA: 9.0}),
            (0, 0, 0),
            r"run0 and .*run2 .* differ in position\.theta \(10000, 9\): averaged.*config.name=",
        ),
    ],
)
def test_runs_of_one_name_that_are_no_seeds_of_it_are_refused(make_ropes, changes, seeds, reason):
    with pytest.raises(ReportError, match=reason):
        comparisons(make_ropes(*changes, seeds=seeds), "perplexity")


def test_a_run_without_its_training_length_has_no_ratio(synthetic, make_run):
    rows = [row for row in synthetic.rows_of("rope", 0) if row.get("context") != 128]
    (comparison,) = comparisons(read_runs([make_run("rope", rows=rows)]), "perplexity")
    assert comparison.spreads(Sums.perplexity, relative=True) == {"rope": {}}
