"""Training goes on while a checkpoint is written; what fails is told; what may change on resume."""

import logging
import os
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from fope_jax.config import build_experiment, experiment_to_dict, incompatible_changes
from fope_jax.evaluate.metrics import read_rows
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.directories import list_file_sizes
from fope_jax.storage.step_save import StepSave
from fope_jax.train import loop
from fope_jax.train.checkpoints import CheckpointSaver
from fope_jax.train.loop import train
from fope_jax.train.preemption import Preempted
from fope_jax.train.save_time import measured_rate, save_seconds
from fope_jax.train.workdir import has_checkpoint

pytestmark = pytest.mark.usefixtures("as_in_a_terminal", "compile_once")


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory):
    """12 updates of RoPE, saved after 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("unbroken")
    train(runs.experiment(method="rope", keep=3), workdir)
    return workdir


def at_batch(monkeypatch, number, action):
    """Calls ``action`` while batch ``number`` of a training is placed, from 1."""
    shard_batch, calls = loop.shard_batch, iter(range(1000))

    def placed(batch, mesh):
        if next(calls) == number:  # the first call compiles
            action()
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", placed)


def hold_saves(monkeypatch, step):
    """The save of ``step`` ends only when this event is set."""
    may_end, complete = threading.Event(), StepSave._complete

    def held(save, digests):
        assert save.step != step or may_end.wait(30), "training waits for a save"
        complete(save, digests)

    monkeypatch.setattr(StepSave, "_complete", held)
    return may_end


def fail_saves(monkeypatch, *steps):
    complete = StepSave._complete

    def failing(save, digests):
        if save.step in steps:
            raise OSError(28, "No space left on device")
        complete(save, digests)

    monkeypatch.setattr(StepSave, "_complete", failing)


def save_rows(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [row for row in rows if row.get("phase") == "save"]


def assert_same_run(runs, workdir, unbroken):
    assert runs.losses(workdir) == runs.losses(unbroken)
    assert runs.arrays(workdir, 12) == runs.arrays(unbroken, 12)


def test_training_goes_on_while_a_checkpoint_is_written(runs, unbroken, tmp_path, monkeypatch):
    """It would wait for ever for the save of step 4, which ends while batch 7 is placed."""
    may_end = hold_saves(monkeypatch, 4)
    at_batch(monkeypatch, 7, lambda: time.sleep(0.5) or may_end.set())
    train(runs.experiment(method="rope", keep=3), tmp_path)
    assert_same_run(runs, tmp_path, unbroken)
    assert runs.arrays(tmp_path, 4) == runs.arrays(unbroken, 4), "not what they became since"
    for row in save_rows(tmp_path):
        assert row["seconds"] > 0 and row["written_seconds"] > 0 and row["bytes"] > 10_000
    held = save_rows(tmp_path)[0]
    assert held["step"] == 4 and held["seconds"] < held["written_seconds"] - 0.5


@pytest.mark.slow
def test_killed_before_its_manifest_a_step_does_not_count(runs, unbroken, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    reached, over, complete = threading.Event(), threading.Event(), StepSave._complete

    def kill():
        assert reached.wait(30)  # else the save would go on by the method of below
        raise Killed

    def cut_off(save, digests):
        if save.step == 8:
            reached.set()
            over.wait(30)
            raise SystemExit
        complete(save, digests)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StepSave, "_complete", cut_off)
        for kind in (CheckpointSaver, CheckpointStore):  # nothing waits for what is killed
            patch.setattr(kind, "close", lambda _: None)
        at_batch(patch, 11, kill)
        train(runs.experiment(method="rope"), tmp_path)
    over.set()
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == 4
    assert (tmp_path / "checkpoints/8/unfinished").is_file()
    assert [row["step"] for row in save_rows(tmp_path)] == [4]
    train(runs.experiment(method="rope"), tmp_path)
    assert_same_run(runs, tmp_path, unbroken)
    assert not (tmp_path / "checkpoints/quarantine").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_save_under_way_at_a_signal_is_finished_and_the_last_step_saved_too(
    runs, unbroken, tmp_path, monkeypatch, number
):
    def ask():
        os.kill(os.getpid(), number)
        threading.Timer(0.3, may_end.set).start()

    with monkeypatch.context() as patch:
        may_end = hold_saves(patch, 4)
        at_batch(patch, 6, ask)
        with pytest.raises(Preempted, match=r"after step 6; .*checkpoints/6$"):
            train(runs.experiment(method="rope"), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == 6
    train(runs.experiment(method="rope"), tmp_path)
    assert_same_run(runs, tmp_path, unbroken)


def test_a_save_that_fails_ends_the_run_at_the_next_update(runs, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_saves(patch, 8)
        patch.setattr(StepSave, "is_done", property(lambda save: save.join() is None))
        with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*/8: .*No space left"):
            train(runs.experiment(method="rope"), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    failed = save_rows(tmp_path)[-1]
    assert failed["step"] == 8 and failed["failed"]
    train(runs.experiment(method="rope"), tmp_path)
    assert_same_run(runs, tmp_path, unbroken)


@pytest.mark.slow
def test_a_save_that_fails_is_told_and_the_run_goes_on(
    runs, unbroken, tmp_path, monkeypatch, caplog
):
    fail_saves(monkeypatch, 4, 8)
    train(runs.experiment(method="rope", on_save_error="continue"), tmp_path)
    assert_same_run(runs, tmp_path, unbroken)
    for step in (4, 8):
        assert f"cannot save checkpoint {tmp_path}/checkpoints/{step}: " in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["12"]


@pytest.mark.slow
def test_the_last_checkpoint_must_be_written(runs, tmp_path, monkeypatch):
    fail_saves(monkeypatch, 4, 8, 12)
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*/12: "):
        train(runs.experiment(method="rope", on_save_error="continue"), tmp_path)
    assert not has_checkpoint(tmp_path), "a save that failed is none that was lost"
    assert [row["failed"] for row in save_rows(tmp_path)] == [True] * 3


@pytest.mark.slow
def test_a_signal_after_a_failed_save_still_saves(runs, tmp_path, monkeypatch, caplog):
    fail_saves(monkeypatch, 4)
    monkeypatch.setattr(StepSave, "is_done", False)  # found at the next save
    at_batch(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match=r"checkpoints/6$"):
        train(runs.experiment(method="rope"), tmp_path)
    assert f"cannot save checkpoint {tmp_path}/checkpoints/4: " in caplog.text
    assert CheckpointStore(tmp_path / "checkpoints").latest_valid_step() == 6


@pytest.mark.slow
def test_milestones_are_kept(runs, tmp_path):
    train(runs.experiment(method="rope", save_every=2, keep=1, keep_period=6), tmp_path)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [6, 12]


def test_milestones_are_steps_that_are_saved(runs):
    with pytest.raises(
        ValueError, match=r"keep_period = 5; accepted: a multiple of save_every = 2"
    ):
        runs.experiment(save_every=2, keep_period=5)


@pytest.mark.slow
def test_a_throttled_store_takes_what_arithmetic_says(runs, tmp_path, monkeypatch, caplog):
    """The start says how long a save takes; from SIGTERM to the end no more than two pass."""
    rate, complete = 40_000, StepSave._complete  # bytes a second

    def slowly(save, digests):
        time.sleep(sum(list_file_sizes(save.path).values()) / rate)
        complete(save, digests)

    monkeypatch.setattr(StepSave, "_complete", slowly)
    experiment, asked = runs.experiment(method="rope", steps=24, grace_seconds=1.0), []

    def ask():
        os.kill(os.getpid(), signal.SIGTERM)
        asked.append(time.monotonic())

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="fope_jax"):
        at_batch(patch, 9, ask)  # the save of step 8 is under way
        with pytest.raises(Preempted, match=r"checkpoints/9$"):
            train(experiment, tmp_path)
    elapsed, rows = time.monotonic() - asked[0], save_rows(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 9]
    measured = measured_rate(rows)
    assert measured == pytest.approx(rate, rel=0.25)
    predicted = save_seconds(rows[-1]["bytes"], 1, measured)
    assert predicted > 1 and predicted * 0.9 < elapsed < 2 * predicted + 1
    assert "grace is 1 s (train.grace_seconds), too short: a stop loses" in caplog.text
    assert "from each process" in caplog.text, "nothing was measured before"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fope_jax"):
        train(experiment, tmp_path)
    assert re.search(r"a save takes about \d\.\d s; grace is 1 s .*too short", caplog.text)


# ---------------------------------------------------------------------------- resuming


# May change: key -> (another value, whether the losses are the same bits on any machine).
CHANGES = {
    "train.accumulate": (2, False),
    "model.remat": ("full", True),
    "model.attention": ("chunked", False),
    "model.scan_layers": (False, False),
    "model.derivatives": ("all", False),
    "train.save_every": (3, True),
    "train.keep": (5, True),
    "train.keep_period": (8, True),
    "train.grace_seconds": (60.0, True),
    "train.on_save_error": ("continue", True),
    "data.cache_dir": ("{moved}", True),
    "data.train_files": (("{moved}/*.txt",), True),
}
# Refused, with both values: what decides the numbers.
REFUSED = {
    "seed": (1, 2),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.d_model": (16, 32),
    "model.num_layers": (1, 2),
    "train.batch_size": (2, 4),
    "train.length": (16, 32),
    "train.learning_rate": (0.01, 0.02),
    "train.weight_decay": (0.1, 0.0),
    "train.steps": (12, 24),
    "train.data_start": (0, 4),
    "train.gradient_clip": (1.0, None),
    "data.packing": ("documents", "windows"),
    "data.tokenizer": ("bytes", "sentencepiece"),
    "data.max_tokens": (None, 1000),
    "data.tasks": ([], ["recall=0.5"]),
}


def changed(runs, key, value):
    values, (section, _, field) = runs.values(method="rope"), key.rpartition(".")
    target = values[section] if section else values
    target = dict(target) | {field: value}
    return build_experiment(values | ({section: target} if section else target))


@pytest.mark.parametrize("key", CHANGES)
def test_what_does_not_decide_the_numbers_may_change(runs, key):
    values = (runs.experiment(method="rope"), changed(runs, key, CHANGES[key][0]))
    assert incompatible_changes(*map(experiment_to_dict, values)) == []


@pytest.mark.parametrize("key", REFUSED)
def test_what_decides_the_numbers_may_not_change(runs, key):
    before, after = REFUSED[key]
    lines = incompatible_changes(
        experiment_to_dict(runs.experiment(method="rope")),
        experiment_to_dict(changed(runs, key, after)),
    )
    assert f"{key}: {before!r}, now {after!r}" in lines


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGES)
def test_a_run_goes_on_with_another_value(runs, unbroken, tmp_path, monkeypatch, key):
    value, has_same_bits = CHANGES[key]
    if key == "data.cache_dir":
        value = str(shutil.copytree(runs.data["cache_dir"], tmp_path / "moved"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        at_batch(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(runs.experiment(method="rope"), run)
    train(changed(runs, key, value), run)
    found, expected = (dict((row[0], row[1:]) for row in runs.losses(p)) for p in (run, unbroken))
    totals = [sum(nats for nats, _, _ in rows.values()) for rows in (found, expected)]
    if has_same_bits:
        assert runs.arrays(run, 12) == runs.arrays(unbroken, 12)
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    else:
        # The update after the change, then those that its rounding has gone through.
        for step, tolerance in ((6, 2e-7), (9, 1e-6), (12, 1e-6)):
            np.testing.assert_allclose(found[step][0], expected[step][0], rtol=tolerance)
            assert found[step][1] == expected[step][1]
