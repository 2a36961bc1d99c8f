"""Evaluation inside training: the numbers of `fope evaluate`, each once, after any interruption."""

import shutil

import numpy as np
import pytest

from fope_jax.config import build_experiment, experiment_to_dict, incompatible_changes
from fope_jax.config import train as config_train
from fope_jax.data import task_mixture
from fope_jax.evaluate import scoring, validation
from fope_jax.evaluate.metrics import read_rows
from fope_jax.extend.child import child_experiment
from fope_jax.main import main
from fope_jax.train.loop import train
from tests.train.fixtures import extend_with_yarn

EVALUATE = {
    "lengths": (1, 2),
    "num_windows": 3,
    "training_windows": 3,
    "position_windows": 0,
    "passkey_trials": 0,
    "batch_tokens": 64,
}


def experiment(runs, **train_changes):
    values = runs.values(**{"method": "rope", "steps": 4} | train_changes)
    return build_experiment(values | {"evaluate": EVALUATE})


@pytest.fixture(scope="module")
def parent(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "parent"
    train(experiment(runs, save_every=2), workdir)
    return workdir


def extension(parent, workdir):
    return extend_with_yarn(parent, workdir, "--config.train.evaluate_every=3")


@pytest.fixture(scope="module")
def child(parent, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "child"
    traces = []
    real = scoring.token_nats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "token_nats", lambda *a, **k: traces.append(1) or real(*a, **k))
        assert main(extension(parent, workdir)) == 0
    assert len(traces) == 2, "one program in the loop for all steps, one of fope evaluate"
    return workdir


def validation_rows(workdir):
    return [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == "validation"]


def test_one_command_measures_before_during_and_after(child):
    rows = validation_rows(child)
    assert [row["step"] for row in rows] == [0, 3, 5]
    assert [row["tokens_seen"] for row in rows] == [0, 96, 160]
    assert {(row["context"], row["training_length"], row["windows"]) for row in rows} == {
        (32, 32, 3)
    }
    assert {(row["tokens"], row["bytes"], row["split"]) for row in rows} == {(24, 24, "validation")}
    every = read_rows(child / "metrics.jsonl")
    timed = [row["step"] for row in every if row.get("phase") == "validation"]
    assert timed == [0, 3, 5]
    whole = [row for row in every if row["kind"] == "perplexity"]
    assert [row["step"] for row in whole] == [5]
    for name in ("nats", "tokens", "bytes", "correct"):
        assert whole[0][name] == pytest.approx(rows[-1][name], rel=1e-6), "the same windows"
    assert len({row["nats"] for row in rows}) == 3
    # An evaluation ends a row of training, whose clock is stopped meanwhile.
    assert [row["step"] for row in every if row["kind"] == "train"] == [2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 3])
def test_rows_beyond_the_restart_come_again_and_none_twice(parent, child, runs, tmp_path, at):
    """Stopped after the evaluation of step 0, and of step 3, whose newest checkpoint is 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(task_mixture, patch, at=4 + at)
        main(extension(parent, tmp_path / "run"))
    assert [row["step"] for row in validation_rows(tmp_path / "run")] == ([0, 3] if at else [0])
    assert main(extension(parent, tmp_path / "run")) == 0
    assert validation_rows(tmp_path / "run") == validation_rows(child)
    assert runs.arrays(tmp_path / "run", 5) == runs.arrays(child, 5)


@pytest.mark.slow  # the test of the default has it for the weights as well
def test_measuring_changes_no_update(parent, runs, tmp_path):
    measured = experiment(runs, save_every=2, evaluate_every=2)
    train(measured, tmp_path / "run")
    assert runs.arrays(tmp_path / "run", 4) == runs.arrays(parent, 4)
    rows = validation_rows(tmp_path / "run")
    assert [(row["step"], row["context"]) for row in rows] == [
        (step, context) for step in (0, 2, 4) for context in (16, 32)
    ]
    values = (experiment_to_dict(e) for e in (measured, experiment(runs, save_every=2)))
    assert not incompatible_changes(*values)


@pytest.mark.slow
def test_scores_that_are_not_finite_are_warned_of_and_end_no_training(
    runs, tmp_path, monkeypatch, caplog
):
    def nan_at_32(*_):
        def scorer(tokens, targets, index=None):
            bad = np.full(targets.shape, tokens.shape[1] == 32)
            return np.where(bad, np.nan, 1.0).astype(np.float32), ~bad

        return lambda params, constants: scorer

    monkeypatch.setattr(validation, "scorer_factory", nan_at_32)
    train(experiment(runs, evaluate_every=4), tmp_path / "run")
    rows = validation_rows(tmp_path / "run")
    assert [(row["step"], row["context"], row["correct"]) for row in rows] == [
        (step, context, 24 if context == 16 else 0) for step in (0, 4) for context in (16, 32)
    ]
    assert [np.isnan(row["nats"]) for row in rows] == [False, True] * 2
    told = "step 4: validation loss is not finite at 32 tokens of context"
    assert any(told in record.message for record in caplog.records)


def test_what_cannot_be_measured_is_said_before_training(runs, tmp_path):
    values = runs.values(evaluate_every=2) | {"evaluate": EVALUATE | {"lengths": ()}}
    with pytest.raises(ValueError, match=r"evaluate_every = 2, .*nothing to measure: .*lengths = "):
        train(build_experiment(values), tmp_path / "run")
    with pytest.raises(
        ValueError, match="evaluate_every = 0; accepted: 1 or more, 'auto', or None"
    ):
        experiment(runs, evaluate_every=0)


@pytest.mark.parametrize(
    ("steps", "log_every", "interval"),
    [(99, 1, None), (100, 10, 100), (500, 20, 100), (500, 30, 120), (5_000, 10, 500)],
)
def test_by_default_evaluations_are_few_and_cut_no_row(runs, steps, log_every, interval):
    config = runs.experiment(steps=steps, log_every=log_every).train
    assert (config.evaluate_every, config.evaluation_interval) == ("auto", interval)


def test_by_default_the_training_length_is_measured_and_no_update_is_changed(
    parent, runs, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(config_train, "_LEAST_INTERVAL", 2)
    train(experiment(runs, save_every=2, log_every=2), tmp_path / "run")
    assert runs.arrays(tmp_path / "run", 4) == runs.arrays(parent, 4)
    rows = validation_rows(tmp_path / "run")
    found = [(row["step"], row["context"], row["tokens_seen"]) for row in rows]
    assert found == [(0, 16, 0), (2, 16, 2 * 2 * 16), (4, 16, 4 * 2 * 16)]
    assert [row[0] for row in runs.losses(tmp_path / "run")] == [2, 4]
    assert "validation" in capfd.readouterr().err.splitlines()[-1]  # the bar


@pytest.mark.slow
def test_by_default_what_cannot_be_measured_ends_no_run_and_an_old_run_stays_as_it_is(
    parent, runs, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "fope_jax")
    monkeypatch.setattr(config_train, "_LEAST_INTERVAL", 2)
    values = runs.values(method="rope", steps=4, save_every=2, log_every=2)
    values["evaluate"] = EVALUATE | {"lengths": (10**6,)}
    train(build_experiment(values), tmp_path / "run")
    assert "no validation loss during training: " in caplog.text
    assert not validation_rows(tmp_path / "run")
    train(build_experiment(values), tmp_path / "run")
    assert "run is finished: 4 steps are trained" in caplog.text
    old = shutil.copytree(parent, tmp_path / "old")
    train(experiment(runs, save_every=2), old)
    assert "old is finished: 4 steps are trained" in caplog.text and not validation_rows(old)


def test_an_extension_is_measured_five_times_unless_it_says_otherwise(runs):
    parent = experiment(runs, steps=100)
    child = child_experiment(parent, 100, "yarn", 32, overrides=["train.steps=12"])
    assert child.train.evaluate_every == 3
    never = child_experiment(parent, 100, "yarn", 32, overrides=["train.evaluate_every=none"])
    assert never.train.evaluate_every is None
    unscored = child_experiment(parent, 100, "yarn", 32, overrides=["evaluate.lengths=()"])
    assert unscored.train.evaluate_every is None


def test_what_the_evaluation_at_the_end_cannot_do_is_said_before_training(parent, tmp_path, capsys):
    command = [*extension(parent, tmp_path / "run"), "--config.evaluate.passkey_trials=1"]
    assert main([*command, "--config.evaluate.passkey_lengths=1"]) == 2
    assert "passkey_lengths gives a context of 32 tokens, too short" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
