"""One checkpoint under several position embeddings: rows, what they say, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fope_jax as fj
from fope_jax.evaluate.metrics import read_rows
from fope_jax.evaluate.restore import load_run
from fope_jax.evaluate.variants import variant_experiment, variant_model
from fope_jax.extend.parent import open_parent
from fope_jax.extend.run import extend
from fope_jax.extend.variants import make_variant, split_variant
from fope_jax.main import main
from fope_jax.model.transformer import split
from fope_jax.position import (
    ClipFloor,
    DroPE,
    DynamicNTK,
    FoPE,
    LogitScaling,
    NoPE,
    ReRoPE,
    RoPE,
    SelfExtend,
    SlidingWindow,
    YaRN,
)
from fope_jax.report.rows import read_runs

ONE = [
    "--config.evaluate.num_windows=2",
    "--config.evaluate.lengths=1,2",
    "--config.evaluate.scored_tokens=8",
    "--protocols=same-tokens",
]


@pytest.fixture(scope="module")
def run(rope, tmp_path_factory):
    """Evaluated as it is, with YaRN for four times its length, and without positions."""
    copy = Path(shutil.copytree(rope, tmp_path_factory.mktemp("runs") / "rope"))
    assert main(["evaluate", str(copy), *ONE]) == 0
    assert main(["evaluate", str(copy), *ONE, "--as", "yarn:factor=4", "--as", "nope"]) == 0
    return copy


def nats(rows, label):
    return {
        row["context"]: row["nats"]
        for row in rows
        if row["kind"] == "perplexity" and row.get("as", "") == label
    }


@pytest.mark.slow  # makes and scores several runs
def test_the_rows_are_those_of_runs_that_were_changed_so(run, tmp_path):
    """Each variant's numbers, to the bit, are those of a run made by --no-train."""
    rows = read_rows(run / "metrics.jsonl")
    for label, method, knobs in (
        ("yarn:factor=4", "yarn", ["--config.position.factor=4"]),
        ("nope", "nope", []),
    ):
        child = tmp_path / method
        extend(str(run), method, 64, child, no_train=True, overrides=knobs)
        assert main(["evaluate", str(child), *ONE]) == 0
        expected = nats(read_rows(child / "metrics.jsonl"), "")
        assert nats(rows, label) == expected and len(expected) == 2
    own, yarn, nope = (nats(rows, label) for label in ("", "yarn:factor=4", "nope"))
    assert own != yarn != nope != own, "each is read differently"


@pytest.mark.slow
def test_rows_name_the_variant_and_the_runs_own_stay(run, capsys):
    rows = read_rows(run / "metrics.jsonl")
    scored = [row for row in rows if row["kind"] == "perplexity"]
    names = {row["variant"] for row in scored}
    assert names == {"fope", "fope as yarn:factor=4", "fope as nope"}
    summary = next(row for row in rows if row["kind"] == "protocol" and row.get("as") == "nope")
    assert summary["settings"]["position"] == {"method": "nope"}
    assert summary["position"]["summary"] == "nope()"
    before = (run / "metrics.jsonl").read_text()
    assert main(["evaluate", str(run), *ONE, "--as", "yarn:factor=4.0", "--as", "same"]) == 0
    assert (run / "metrics.jsonl").read_text() == before, "4.0 is 4, and what is there is kept"
    said = capsys.readouterr().out
    assert "same-tokens (validation) as yarn:factor=4: rows for step 12 exist" in said
    assert "same-tokens (validation): rows for step 12 exist" in said


@pytest.mark.slow
def test_report_and_verdict_show_them(run, tmp_path, capsys):
    own, yarn, nope = read_runs([run])
    names = [variant.variant for variant in (own, yarn, nope)]
    assert names == ["fope", "fope as yarn:factor=4", "fope as nope"]
    assert yarn.config["position"]["scaling"][0]["factor"] == 4.0
    assert nope.config["position"] == {"method": "nope"} and not nope.of("train")
    assert all("as" not in row for row in own.rows) and own.of("train")
    assert main(["report", str(run), "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    verdict = " ".join(said.split())
    assert "FoPE as nope's perplexity" in verdict
    told = "fope as yarn:factor=4 is fope, step 12, read so without training: of 4 frequencies 1 k"
    assert told in said and told in (tmp_path / "index.html").read_text()


def test_from_python(run):
    table = fj.evaluate(
        fj.load(run),
        ["same-tokens"],
        contexts=[1, 2],
        num_windows=2,
        scored_tokens=8,
        positions=["same", "nope"],
    )
    assert list(table["method"].unique()) == ["rope", "nope"]
    assert list(table["run"].unique()) == ["fope", "fope as nope"] and len(table) == 4


@pytest.mark.parametrize(
    ("text", "label", "position"),
    [
        ("yarn:factor=4", "yarn:factor=4", RoPE(scaling=(YaRN(4.0, 16),))),
        (
            "yarn:beta_fast=8.0,factor=2",
            "yarn:beta_fast=8,factor=2",
            RoPE(scaling=(YaRN(2.0, 16, beta_fast=8.0),)),
        ),
        ("dynamic_ntk:factor=2", "dynamic_ntk:factor=2", RoPE(scaling=(DynamicNTK(2.0, 16),))),
        ("clip", "clip", RoPE(scaling=(ClipFloor(16),))),
        ("fope", "fope", FoPE(16, zero_sine=0.0, outputs="surviving")),
        ("fope:preset=official", "fope:preset=official", FoPE(16)),
        ("nope", "nope", NoPE()),
        ("drope:coefficient=0.103", "drope:coefficient=0.103", DroPE(16, 0.103)),
        ("drope:length=64", "drope:length=64", DroPE(16, length=64)),
        ("logit_scaling", "logit_scaling", LogitScaling(RoPE(), training_length=16)),
        ("sliding_window:window=4", "sliding_window:window=4", SlidingWindow(RoPE(), 4)),
        ("self_extend:window=8,group=4", "self_extend:group=4,window=8", SelfExtend(RoPE(), 8, 4)),
        ("rerope:window=8", "rerope:window=8", ReRoPE(RoPE(), 8)),
        ("same", "", RoPE()),
    ],
)
def test_what_can_be_asked_for(rope, text, label, position):
    variant = make_variant(open_parent(rope), text)
    assert (variant.label, variant.position) == (label, position)


OWN = """
from dataclasses import dataclass
from typing import ClassVar

from fope_jax.position import RoPE


@dataclass(frozen=True)
class Slower(RoPE):
    slower: float = 2.0
"""


def test_a_method_of_the_users_own_is_named_by_its_module(rope, tmp_path, monkeypatch):
    (tmp_path / "own_of_variants_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        variant = make_variant(open_parent(rope), "own_of_variants_test:Slower:slower=4,theta=9")
        own = sys.modules["own_of_variants_test"].Slower
        assert variant.position == own(theta=9.0, slower=4.0)
        assert variant.label == "own_of_variants_test:Slower:slower=4,theta=9"
        plain = make_variant(open_parent(rope), "own_of_variants_test:Slower")
        assert (plain.label, plain.position) == ("own_of_variants_test:Slower", own())
    finally:
        sys.modules.pop("own_of_variants_test", None)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nowhere:Slower"], "--as nowhere:Slower: the Python module 'nowhere' cannot be imported"),
        (["yarn"], "--as yarn: it needs a factor, how many times longer: yarn:factor=4"),
        (["yarm:factor=4"], "--as yarm:factor=4: unknown method 'yarm'; did you mean 'yarn'"),
        (["same,yarn:factor=4"], "one method; give --as once for each of several"),
        (["yarn:factor"], "'factor' is no KNOB=VALUE, such as yarn:factor=4"),
        ([":factor=4"], "accepted: METHOD:KNOB=VALUE,.. such as yarn:factor=4"),
        (["yarn:factor=x"], "factor"),
        (["yarn:factor=4,beta=2"], "unknown knob 'beta' of yarn. Known: factor, original_length, "),
        (["yarn:factr=4"], "unknown knob 'factr' of yarn; did you mean 'factor'? Known: "),
        (["yarn:factor=4,factor=2"], "factor is given twice; accepted: each once"),
        (["pi:factor=nan"], "config.position.factor = 'nan' is no finite number; accepted: float"),
        (["alibi"], "rope to alibi: .*queries and keys hold phases, and alibi was never part of"),
        (["sliding_window"], "sliding_window needs window"),
        (
            ["self_extend:window=8"],
            "self_extend needs group, which no length gives: self_extend:window=8,group=VALUE",
        ),
        (
            ["self_extend:window=8,groups=4"],
            "unknown knob 'groups' of self_extend; did you mean 'g",
        ),
        (["rerope:windows=8"], "unknown knob 'windows' of rerope; did you mean 'window'?"),
        (["longrope:factor=4"], "found by search; a checkpoint of Hugging Face has them in its ro"),
        (["sliding_window:window=0"], "window=0"),
        (["nope", "nope"], "--as nope is given twice"),
    ],
)
def test_what_cannot_be_represented_is_refused_before_any_work(run, capsys, texts, message):
    before = (run / "metrics.jsonl").read_text()
    flags = [word for text in texts for word in ("--as", text)]
    assert main(["evaluate", str(run), *ONE, *flags]) == 2
    assert message.partition(".*")[0] in (said := capsys.readouterr().err), said
    assert (run / "metrics.jsonl").read_text() == before


def test_commas_inside_brackets_belong_to_a_value():
    method, knobs = split_variant("longrope:short_factor=[1.0,2.0],long_factor=(1,4),factor=2")
    assert method == "longrope" and knobs["short_factor"] == "[1.0,2.0]"
    assert list(knobs) == ["short_factor", "long_factor", "factor"]


def test_arrays_are_carried_and_the_rest_is_shared(fope):
    """FoPE's trained coefficients stay under a window; RoPE's parameters are not copied."""
    loaded = load_run(fope)
    variant = make_variant(open_parent(fope), "sliding_window:window=4")
    model = variant_model(
        loaded.model, variant_experiment(loaded.experiment, variant), variant, None
    )
    before, after = split(loaded.model)[1], split(model)[1]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    np.testing.assert_array_equal(
        before["position_layers"]["cos_coef"], after["position_layers"]["cos_coef"]
    )
    assert before["embedding"] is after["embedding"] or np.shares_memory(
        np.asarray(before["embedding"]), np.asarray(after["embedding"])
    )
    assert json.dumps(variant.text)
