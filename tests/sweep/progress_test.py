"""The time that a sweep says is left follows from what its runs took."""

import json

import pytest

from fope_jax.sweep import progress as module
from fope_jax.sweep.progress import METRICS, SweepProgress, last_step
from fope_jax.sweep.runs import Train, check_sweep

QUICK = "configs/quickstart.py:smoke"  # 20 updates
RUNS = [Train(name, f"{QUICK},seed={seed}") for seed, name in enumerate("abcd")]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def make(workdir, runs=RUNS, seconds=(), jobs=2):
    said = []
    planned = check_sweep(runs)
    return SweepProgress(planned, workdir, dict(seconds), jobs, said.append), planned, said


def train(workdir, name, step):
    (workdir / name).mkdir(exist_ok=True)
    with (workdir / name / METRICS).open("a") as stream:
        stream.write(json.dumps({"kind": "train", "step": step}) + "\n")


def test_the_time_left_is_that_of_runs_of_the_same_model_and_updates(tmp_path, clock):
    progress, (a, b, c, d), said = make(tmp_path)
    with progress:
        progress.begin(a)
        progress.begin(b)
        clock[0] = 50.0
        progress.end(a, {"train": 40.0, "evaluate": 10.0})
        progress.begin(c)
        clock[0] = 60.0
        progress.end(b, {"train": 45.0, "evaluate": 15.0})
        progress.begin(d)
        clock[0] = 110.0
        progress.end(c, {"train": 50.0, "evaluate": 10.0})
        progress.end(d, {"train": 40.0, "evaluate": 10.0})
    assert said == [
        "4 runs to make, 2 at once: a, b, c, d",
        # b has lasted as long as a, and two of 50 s on two cores are 50 s
        "a is done in 50 s (train 40 s, evaluate 10 s); 1 of 4; about 50 s left",
        # c has 45 of 55 s to go, beside d with 55 s
        "b is done in 1 min 0 s (train 45 s, evaluate 15 s); 2 of 4; about 55 s left",
        "c is done in 1 min 0 s (train 50 s, evaluate 10 s); 3 of 4; about 7 s left",
        "d is done in 50 s (train 40 s, evaluate 10 s); 4 of 4",
    ]


def test_before_any_is_done_the_updates_of_one_under_way_tell(tmp_path, clock):
    progress, (a, *_), _ = make(tmp_path, RUNS[:2], jobs=1)
    with progress:
        assert progress._left() == "unknown time"
        progress.begin(a)
        clock[0] = 30.0
        assert progress._left() == "unknown time"
        train(tmp_path, "a", 10)  # half of the updates, 3/8 of the run: 80 s in all
        assert progress._left() == "about 2 min 10 s"  # 50 s, and 80 s of the other
        progress.show()
        assert progress._bar.postfix == "a 10/20; about 2 min 10 s left"


def test_runs_done_before_and_failed_ones_are_not_waited_for(tmp_path, clock):
    progress, (_, b, *_), said = make(tmp_path, seconds={"a": 20.0}, jobs=1)
    with progress:
        progress.begin(b)
        progress.fail(b)
        assert progress._left() == "about 40 s"
    assert said == ["3 runs to make: b, c, d"]


def test_the_last_step_of_a_file_that_is_being_written(tmp_path):
    path = tmp_path / METRICS
    assert last_step(path) == 0
    path.write_text("")
    assert last_step(path) == 0
    path.write_text('{"kind": "train", "step": 7}\n{"kind": "tr')
    assert last_step(path) == 7
