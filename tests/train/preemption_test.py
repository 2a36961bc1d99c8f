"""A signal in the middle of a row or an evaluation, and what else a checkpoint must carry."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from fope_jax.config import build_experiment
from fope_jax.evaluate import validation
from fope_jax.evaluate.metrics import read_rows
from fope_jax.processes.signals import SIGNALS, Stopped
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.lock import LockError
from fope_jax.train import loop
from fope_jax.train.loop import train
from fope_jax.train.preemption import Preempted, preemption

pytestmark = pytest.mark.usefixtures("as_in_a_terminal")


def signalled(monkeypatch, at, number=signal.SIGTERM):
    """Sends a signal to this process while batch ``at`` of a training is placed, from 1."""
    shard_batch, calls = loop.shard_batch, iter(range(1000))

    def placed(batch, mesh):
        if next(calls) == at:  # the first call compiles
            os.kill(os.getpid(), number)
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", placed)


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    train(runs.experiment(log_every=6, save_every=12), workdir)
    return workdir


def test_stopped_in_the_middle_of_rows_the_rows_and_bits_are_those_of_the_unbroken_run(
    runs, unbroken, tmp_path, monkeypatch
):
    experiment = runs.experiment(log_every=6, save_every=12)
    before = [signal.getsignal(number) for number in SIGNALS]
    for at, stopped, number in zip((3, 1, 4), (3, 4, 8), SIGNALS, strict=True):
        with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
            signalled(patch, at, number)
            train(experiment, tmp_path)
        assert caught.value.exit_code == 128 + number
        assert f"stopped by {number.name} after step {stopped}; " in str(caught.value)
        assert str(caught.value).endswith(f"{tmp_path}/checkpoints/{stopped}")
        assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == stopped
        assert [signal.getsignal(number) for number in SIGNALS] == before
    train(experiment, tmp_path)
    assert [row[0] for row in runs.losses(tmp_path)] == [6, 12]
    assert runs.losses(tmp_path) == runs.losses(unbroken)
    assert runs.arrays(tmp_path, 12) == runs.arrays(unbroken, 12)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"], "the clock goes on"
    phases = [row["phase"] for row in read_rows(tmp_path / "metrics.jsonl") if "phase" in row]
    assert phases.count("start") == phases.count("compile") == phases.count("save") == 4


@pytest.mark.slow
def test_the_guards_means_go_on_after_an_interruption(runs, tmp_path, monkeypatch):
    experiment = runs.experiment(spike_factor=50.0)
    train(experiment, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signalled(patch, 6)
        train(experiment, tmp_path / "stopped")
    train(experiment, tmp_path / "stopped")
    kept = [
        CheckpointStore(tmp_path / name / "checkpoints").metadata(12)["guard"]
        for name in ("unbroken", "stopped")
    ]
    assert kept[0] == kept[1] and kept[0][2] == 12 and kept[0][0] > 1


def test_a_signal_before_the_first_step_ends_at_once(runs, tmp_path, monkeypatch):
    signalled(monkeypatch, 0)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        train(runs.experiment(), tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() is None
    assert not (tmp_path / "run.lock").exists()


def measured(runs):
    """Evaluations after 0, 4, 8 and 12 steps, of which the last two come with a checkpoint."""
    values = runs.values(method="rope", evaluate_every=4, save_every=8)
    evaluate = {
        "lengths": (1, 2),
        "num_windows": 3,
        "training_windows": 3,
        "position_windows": 0,
        "passkey_trials": 0,
        "batch_tokens": 64,
    }
    return build_experiment(values | {"evaluate": evaluate})


@pytest.mark.slow
def test_stopped_in_evaluations_the_rows_and_bits_are_those_of_the_unbroken_run(
    runs, tmp_path, monkeypatch
):
    """An evaluation is left at once, with its step in a checkpoint, and made by the next start."""
    experiment = measured(runs)
    train(experiment, tmp_path / "unbroken")
    workdir, score = tmp_path / "run", validation.scorer_factory
    with pytest.raises(Stopped), monkeypatch.context() as patch:
        signalled_scorer(patch, score, at=2)
        train(experiment, workdir)
    assert CheckpointStore(workdir / "checkpoints").latest_valid_step() is None, "nothing to save"
    # Evaluations have two batches each: in the middle of the second, third and fourth.
    for at, stopped, number in (
        (4, 4, signal.SIGHUP),
        (4, 8, signal.SIGTERM),
        (4, 12, signal.SIGINT),
    ):
        with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
            signalled_scorer(patch, score, at, number)
            train(experiment, workdir)
        assert caught.value.exit_code == 128 + number
        assert str(caught.value).endswith(f"from checkpoint {workdir}/checkpoints/{stopped}")
        assert CheckpointStore(workdir / "checkpoints").latest_valid_step() == stopped
        rows = read_rows(workdir / "metrics.jsonl")
        assert stopped not in [row["step"] for row in rows if row["kind"] == "validation"]
    train(experiment, workdir)
    rows, expected = (
        [row for row in read_rows(path / "metrics.jsonl") if row["kind"] == "validation"]
        for path in (workdir, tmp_path / "unbroken")
    )
    assert rows == expected and len(rows) == 8
    assert runs.losses(workdir) == runs.losses(tmp_path / "unbroken")
    assert runs.arrays(workdir, 12) == runs.arrays(tmp_path / "unbroken", 12)
    before = (workdir / "metrics.jsonl").read_bytes()
    train(experiment, workdir)  # finished
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_batch_that_takes_long_is_not_waited_for():
    """`check` is called while the device is at work, and what it raises leaves the batch behind."""
    tokens, made = jnp.ones((512, 512)), []
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: jnp.tanh(y @ y), x))
    long = long.lower(tokens).compile()

    def scorer(tokens, targets, places):
        made.append(long(tokens))
        return made[0], made[0]

    def check():
        if made:
            assert not made[0].is_ready()
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        validation._checking(scorer, check)(tokens, None)


def signalled_scorer(patch, scorer_factory, at, number=signal.SIGTERM):
    """Sends a signal while the ``at``-th batch is scored, from 1."""
    calls = iter(range(1, 1000))

    def maker(*arguments):
        make = scorer_factory(*arguments)

        def made(*arrays):
            score = make(*arrays)

            def scored(*batch):
                if next(calls) == at:
                    os.kill(os.getpid(), number)
                return score(*batch)

            return scored

        return made

    patch.setattr(validation, "scorer_factory", maker)


def test_in_another_thread_no_signal_is_caught():
    told = []

    def ask():
        with preemption() as asked:
            told.append(asked.is_requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert told == [False]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(runs, unbroken, tmp_path):
    rows = [row for row in read_rows(unbroken / "metrics.jsonl") if row["step"] <= 12]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match="has trained 12 steps and saved them, but no valid"):
        train(runs.experiment(log_every=6, save_every=12), tmp_path)


def test_a_run_that_is_taken_over_stops_before_its_next_checkpoint(runs, tmp_path, monkeypatch):
    shard_batch, calls = loop.shard_batch, iter(range(1000))

    def taken_over(batch, mesh):
        if next(calls) == 2:
            lock = tmp_path / "run.lock"
            owner = json.loads(lock.read_text()) | {"host": "elsewhere", "verb": "train"}
            lock.write_text(json.dumps(owner).ljust(511) + "\n")
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", taken_over)
    with pytest.raises(LockError, match="belongs to another process now .*host elsewhere"):
        train(runs.experiment(), tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() is None
