"""SIGTERM in the middle of a row, and what else a checkpoint must carry for the bits to go on."""

import json
import os
import signal
import threading

import pytest

from fope_jax.checkpoint import CheckpointError, CheckpointStore
from fope_jax.evaluate.metrics import read_rows
from fope_jax.lock import LockError
from fope_jax.train import loop
from fope_jax.train.loop import train
from fope_jax.train.preemption import Preempted, preemption


def signalled(monkeypatch, at):
    """Sends SIGTERM to this process while batch ``at`` of a training is placed, from 1."""
    put, calls = loop.put, iter(range(1000))

    def placed(batch, mesh):
        if next(calls) == at:  # the first call compiles
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put", placed)


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    train(runs.experiment(log_every=6, save_every=12), workdir)
    return workdir


def test_stopped_in_the_middle_of_rows_the_rows_and_bits_are_those_of_the_unbroken_run(
    runs, unbroken, tmp_path, monkeypatch
):
    experiment = runs.experiment(log_every=6, save_every=12)
    before = signal.getsignal(signal.SIGTERM)
    for at, stopped in ((3, 3), (1, 4), (4, 8)):
        with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
            signalled(patch, at)
            train(experiment, tmp_path)
        assert caught.value.exit_code == 143
        assert f"after step {stopped}; " in str(caught.value)
        assert str(caught.value).endswith(f"{tmp_path}/checkpoints/{stopped}")
        assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == stopped
        assert signal.getsignal(signal.SIGTERM) is before
    train(experiment, tmp_path)
    assert [row[0] for row in runs.losses(tmp_path)] == [6, 12]
    assert runs.losses(tmp_path) == runs.losses(unbroken)
    assert runs.arrays(tmp_path, 12) == runs.arrays(unbroken, 12)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"], "the clock goes on"
    phases = [row["phase"] for row in read_rows(tmp_path / "metrics.jsonl") if "phase" in row]
    assert phases.count("start") == phases.count("compile") == phases.count("save") == 4


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


def test_in_another_thread_no_signal_is_caught():
    told = []

    def ask():
        with preemption() as asked:
            told.append(asked(1))

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
    put, calls = loop.put, iter(range(1000))

    def taken_over(batch, mesh):
        if next(calls) == 2:
            lock = tmp_path / "run.lock"
            owner = json.loads(lock.read_text()) | {"host": "elsewhere", "verb": "train"}
            lock.write_text(json.dumps(owner).ljust(511) + "\n")
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put", taken_over)
    with pytest.raises(LockError, match="belongs to another process now .*host elsewhere"):
        train(runs.experiment(), tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() is None
