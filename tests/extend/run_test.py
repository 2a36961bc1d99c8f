"""A trained model goes on: no-ops are exact, the rest is stated, refused or warned of."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from fope_jax.data import task_mixture
from fope_jax.data.build import build
from fope_jax.data.cache import open_cache
from fope_jax.data.loader import Loader
from fope_jax.evaluate.progress import no_progress
from fope_jax.evaluate.restore import load_run, read_experiment
from fope_jax.evaluate.run import evaluate
from fope_jax.extend import parent as parent_module
from fope_jax.extend.initial_loss import stream_loss
from fope_jax.extend.parent import open_parent
from fope_jax.extend.run import extend, read_lineage
from fope_jax.main import main
from fope_jax.position import ClipFloor, DroPE, RoPE
from fope_jax.train.state import plan_state
from tests.train.fixtures import extend_with_yarn


def rows(workdir):
    return (workdir / "metrics.jsonl").read_text()


# ---------------------------------------------------------------------------- what holds exactly


@pytest.mark.slow
def test_going_on_unchanged_with_the_optimizer_is_the_parents_own_training(
    rope, runs, tmp_path, caplog
):
    """From update 8 of 12, same method, length and schedule: updates 9 to 12 to the bit."""
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        extend(
            str(rope / "8"),
            "same",
            16,
            tmp_path / "run",
            optimizer="keep",
            warn_above=0.9,
            overrides=["--config.train.steps=4"],
        )
    child, parent = runs.arrays(tmp_path / "run", 4), runs.arrays(rope, 12)
    schedule = [name for name in parent if child[name] != parent[name]]
    assert schedule == ["['optimizer'][3]['count']"], "counted anew; train.schedule_start goes on"
    assert sum(row[1] for row in runs.losses(tmp_path / "run")) == pytest.approx(
        sum(row[1] for row in runs.losses(rope) if row[0] > 8)
    )
    start = read_lineage(tmp_path / "run")["start"]
    assert start["parent"] == start["child"] == start["parent_at_new_length"], "to the bit"
    assert start["ratio"] == 1 and "1.00 times the parent's" in start["warning"]
    ours = [record for record in caplog.records if record.name.startswith("fope_jax")]
    warned = [record.message for record in ours if record.levelno == logging.WARNING]
    assert warned == [f"WARNING: {start['warning']}"]
    assert "more than 0.9 times" in start["warning"]


# ---------------------------------------------------------------------------- a whole extension


def arguments(parent, workdir, *overrides):
    unevaluated = ("--config.train.evaluate_every=none", "--no-evaluate")
    return extend_with_yarn(parent, workdir, *unevaluated, *overrides)


@pytest.fixture(scope="module")
def yarn(rope, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "yarn"
    assert main(arguments(rope, workdir)) == 0
    return workdir


def test_the_run_says_where_it_comes_from_and_what_was_changed(yarn, rope, runs):
    lineage = read_lineage(yarn)
    assert lineage["request"] == {
        "parent": str(rope.resolve()),
        "step": 12,
        "method": "yarn",
        "length": 32,
        "optimizer": "reset-moments",
        "match": "frequency",
    }
    parent, child = (json.loads((run / "run.json").read_text()) for run in (rope, yarn))
    assert lineage["parent"]["position"] == parent["position"]
    assert lineage["child"]["position"] == child["position"]
    assert child["position"]["hash"] != parent["position"]["hash"]
    # Head dimension 8: frequencies 1, 0.1, 0.01, 0.001; 16 / (2 pi) = 2.5 turns of the fastest.
    assert lineage["frequencies"]["text"] == (
        "of 4 frequencies 1 kept, 3 divided by 2, 0 zeroed, 0 new; cosine and sine times 1.069"
    )
    data, cache = lineage["data"], open_cache(runs.experiment().data, "train")
    assert data["windows"] == [-(-cache.num_tokens // 16), -(-cache.num_tokens // 32)]
    assert (data["rows"], data["tokens_an_update"], data["first_batch"]) == ([2, 1], 32, 12)
    assert lineage["parent"]["tokens_seen"] == 12 * 32
    start = lineage["start"]
    assert start["ratio"] == pytest.approx(start["child"] / start["parent"])
    assert start["parent"] != start["child"] != start["parent_at_new_length"]
    assert start["warning"] is None and start["warn_above"] == 1.2


def test_the_parent_at_the_new_length_is_scored_with_its_own_positions_there(yarn, rope):
    parent, start = open_parent(rope), read_lineage(yarn)["start"]
    child = read_experiment(yarn)
    plan = plan_state(dataclasses.replace(parent.experiment, train=child.train))
    trained, cache = parent.load(plan, False).items, open_cache(child.data, "validation")
    loss = stream_loss(plan, trained["params"], trained["constants"], cache, start["tokens"])
    assert start["parent_at_new_length"] == pytest.approx(loss, rel=1e-6)
    assert start["parent"] != pytest.approx(loss, rel=1e-5), "at 16 tokens"


def test_its_batches_go_on_where_the_parent_stopped(yarn, runs):
    cache = open_cache(runs.experiment().data, "train")
    loader = Loader(cache, length=32, batch_size=1, seed=1)
    expected = sum(loader.batch(step).weights.sum() for step in range(12, 17))
    assert sum(row[2] for row in runs.losses(yarn)) == expected


@pytest.mark.slow
def test_the_same_command_goes_on_to_the_same_bits_without_the_parents_arrays(
    rope, yarn, runs, tmp_path, monkeypatch, caplog
):
    parent = Path(shutil.copytree(rope, tmp_path / "rope"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(task_mixture, patch, at=12 + 3)
        main(arguments(parent, tmp_path / "run"))
    shutil.rmtree(parent / "checkpoints")
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        assert main(arguments(parent, tmp_path / "run")) == 0
    assert runs.losses(tmp_path / "run") == runs.losses(yarn)
    assert runs.arrays(tmp_path / "run", 5) == runs.arrays(yarn, 5)
    assert main(arguments(parent, tmp_path / "run")) == 0  # finished


@pytest.mark.slow
def test_an_extended_run_is_evaluated_and_reported_beside_its_parent(yarn, rope, tmp_path, capsys):
    for run in (rope, yarn):
        copy = Path(shutil.copytree(run, tmp_path / run.name))
        config = json.loads((copy / "config.json").read_text())
        config["evaluate"] |= {
            "lengths": [2] if run is rope else [1],
            "num_windows": 4,
            "position_windows": 0,
            "passkey_trials": 0,
        }
        (copy / "config.json").write_text(json.dumps(config))
        assert evaluate(copy, progress=no_progress, say=lambda line: None)
    lineage = json.loads((tmp_path / "yarn/lineage.json").read_text())
    lineage["parent"]["run"] = str((tmp_path / "rope").resolve())
    (tmp_path / "yarn/lineage.json").write_text(json.dumps(lineage))
    assert (
        main(["report", str(tmp_path / "rope"), str(tmp_path / "yarn"), "-o", str(tmp_path)]) == 0
    )
    told = "fope+yarn-32 goes on from fope, step 12, at 32 tokens in place of 16: of 4 freq"
    assert told in capsys.readouterr().out and told in (tmp_path / "index.html").read_text()
    assert (tmp_path / "perplexity-difference-validation.png").is_file(), "one axis for both"


# ---------------------------------------------------------------------------- files


def test_a_workdir_of_another_run_is_left_alone(rope, yarn, fope, capsys):
    before = rows(fope), rows(yarn)
    for parent, workdir, changes, message in (
        (rope, rope, [], "is the parent itself; use another --workdir"),
        (rope, fope, [], "holds a run that is no extension (it has no lineage.json)"),
        (rope, yarn, ["--method", "ntk"], "holds an extension with method = yarn, now ntk"),
        (rope, yarn, ["--optimizer", "keep"], "with optimizer = reset-moments, now keep"),
        (rope / "8", yarn, [], "holds an extension with step = 12, now 8"),
        (rope, yarn, ["--config.train.steps=6"], "train.steps: 5, now 6"),
    ):
        assert main([*arguments(parent, workdir), *changes]) == 2
        assert message in capsys.readouterr().err
    assert (rows(fope), rows(yarn)) == before


def test_a_parent_whose_weights_are_not_finite_is_named(rope, tmp_path, capsys, monkeypatch):
    restore = parent_module.restore_checked

    def broken(*given):
        arrays = restore(*given)
        arrays["params"]["embedding"] = arrays["params"]["embedding"].at[5, 3].set(np.nan)
        return arrays

    monkeypatch.setattr(parent_module, "restore_checked", broken)
    assert main(arguments(rope, tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert "step 12: weights that are not finite" in told and "embedding (1 value)" in told
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(rope, runs, tmp_path, capsys):
    tokenizer = ["--config.data.tokenizer=sentencepiece", "--config.data.vocab_size=295"]
    build(runs.experiment(runs.data | {"tokenizer": "sentencepiece", "vocab_size": 295}).data)
    assert main([*arguments(rope, tmp_path / "a"), *tokenizer]) == 2
    assert "the parent's model reads tokens of its own tokenizer only" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_cache_that_is_missing_is_built_from_the_parents_configuration(rope, tmp_path, capsys):
    elsewhere = f"--config.data.cache_dir={tmp_path / 'none'}"
    for changes in ([elsewhere], [elsewhere, "--config.data.max_tokens=100"]):
        assert main([*arguments(rope, tmp_path / "a"), *changes]) == 2
        told = capsys.readouterr().err
        assert f"fope data build --config {rope}/config.json" in told
        assert told.count("config.json") == 1 and "CONFIG" not in told
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------- DroPE


@pytest.mark.slow
def test_drope_trains_without_positions_at_the_length_of_its_parent(rope, tmp_path):
    steps = ["--config.train.steps=1", "--config.train.evaluate_every=none"]
    extend(str(rope), "drope", 16, tmp_path / "drope", overrides=steps)
    child = load_run(tmp_path / "drope")
    assert child.model.position == DroPE(16) and child.experiment.train.length == 16
    assert child.experiment.train.learning_rate == 1e-2, "the parent's"
    assert "4 zeroed" in read_lineage(tmp_path / "drope")["frequencies"]["text"]


@pytest.mark.parametrize(
    ("length", "overrides", "message"),
    [
        (32, (), "length 32: DroPE trains at the 16 tokens .* accepted: --length 16"),
        (16, ("--config.position.length=64",), "position.length = 64: the temperature of an eva"),
    ],
)
def test_drope_is_not_trained_beyond_that_length(rope, tmp_path, length, overrides, message):
    with pytest.raises(ValueError, match=message):
        extend(str(rope), "drope", length, tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_shorter_length_is_trained_when_asked_for(rope, tmp_path):
    steps = ["--config.train.steps=1", "--config.train.evaluate_every=none"]
    extend(str(rope), "clip", 8, tmp_path / "run", allow_shorter=True, overrides=steps)
    child = load_run(tmp_path / "run").experiment
    assert (child.train.length, child.train.batch_size) == (8, 4)
    assert child.position == RoPE(scaling=(ClipFloor(8),))
