"""Runs are made once, in order, beside each other, and a failure stops nothing else."""

import json
import os
import re
import signal
import sys
import threading
import time

import pytest

from fope_jax.config.fields import ConfigError
from fope_jax.processes.signals import Stopped, raise_on_signal
from fope_jax.sweep import queue
from fope_jax.sweep.queue import DONE, SweepError, core_shares, run_sweep
from fope_jax.sweep.runs import Extend, Train, check_sweep

QUICK = "configs/quickstart.py:smoke"

# Stands in for `fope`: notes each call, and fails where a file says so.
FAKE = """
import json, os, pathlib, signal, sys, time
calls = pathlib.Path(sys.argv[1])
arguments = sys.argv[2:]
at = 1 if arguments[0] == "evaluate" else arguments.index("--workdir") + 1
directory = pathlib.Path(arguments[at])
directory.mkdir(exist_ok=True)
with calls.open("a") as stream:
    stream.write(json.dumps([arguments[0], directory.name, time.time()]) + "\\n")
if (directory.parent / f"fail-{arguments[0]}-{directory.name}").exists():
    sys.exit("no luck")
def save(*_):
    time.sleep(0.3)
    (directory / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
deadline = time.time() + 60
while (directory.parent / f"{directory.name}-meets").exists() and time.time() < deadline:
    if (directory.parent / (directory.parent / f"{directory.name}-meets").read_text()).is_dir():
        break
    time.sleep(0.05)
with calls.open("a") as stream:
    stream.write(json.dumps(["end", directory.name, time.time()]) + "\\n")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    script, notes = tmp_path / "fake.py", tmp_path / "calls"
    script.write_text(FAKE)
    notes.touch()
    monkeypatch.setattr(queue, "PROGRAM", (sys.executable, str(script), str(notes)))

    def made():
        return [json.loads(line) for line in notes.read_text().splitlines()]

    return made


def verbs(calls):
    return [(verb, name) for verb, name, _ in calls() if verb != "end"]


RUNS = [Train("a", QUICK), Extend("b", "a", "yarn", 256), Train("c", f"{QUICK},seed=1")]


def sweep(workdir, runs=RUNS, **arguments):
    said = []
    run_sweep(check_sweep(runs), workdir, say=said.append, **arguments)
    return said


def test_what_is_done_is_kept_though_another_run_fails(tmp_path, calls):
    (tmp_path / "fail-train-a").touch()
    kept = []
    with pytest.raises(SweepError, match="2 of 3 runs have failed"):
        sweep(tmp_path, keep=kept.append)
    assert kept == ["c"]
    (tmp_path / "fail-train-a").unlink()
    sweep(tmp_path, keep=kept.append)
    assert kept == ["c", "c", "a", "b"]


def test_each_run_is_trained_and_evaluated_once(tmp_path, calls):
    workdir = tmp_path / "sweep"
    what_comes, *done = sweep(workdir)
    assert what_comes == "3 runs to make: a, b, c"
    seconds = r"\d+ s"
    left = f"about {seconds} left"
    for line, ending in zip(done, (f"1 of 3; {left}", f"2 of 3; {left}", "3 of 3"), strict=True):
        verbs_of_it = rf"\((train|extend) {seconds}, evaluate {seconds}\)"
        assert re.fullmatch(rf"[abc] is done in {seconds} {verbs_of_it}; {ending}", line)
    assert verbs(calls) == [
        ("train", "a"),
        ("evaluate", "a"),
        ("extend", "b"),
        ("evaluate", "b"),
        ("train", "c"),
        ("evaluate", "c"),
    ]
    assert sweep(workdir) == ["3 of 3 runs are done and kept"]
    assert len(verbs(calls)) == 6
    # Another question about one run asks only about that one again.
    asked = [*RUNS[:2], Train("c", f"{QUICK},seed=1", ("evaluate.num_windows=5",))]
    assert sweep(workdir, asked)[:2] == ["2 of 3 runs are done and kept", "1 run to make: c"]
    assert verbs(calls)[6:] == [("train", "c"), ("evaluate", "c")]


def test_a_failure_spares_the_others_and_its_children_wait(tmp_path, calls):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "fail-evaluate-a").touch()
    with pytest.raises(SweepError) as caught:
        sweep(workdir)
    assert str(caught.value) == (
        "2 of 3 runs have failed; the same command runs them again:\n"
        f"  a: fope evaluate ended with code 1: no luck ({workdir}/a.log)\n"
        "  b: its parent a has failed"
    )
    assert verbs(calls) == [("train", "a"), ("evaluate", "a"), ("train", "c"), ("evaluate", "c")]
    (workdir / "fail-evaluate-a").unlink()
    assert sweep(workdir)[:2] == ["1 of 3 runs are done and kept", "2 runs to make: a, b"]
    assert ("extend", "b") in verbs(calls)


def test_several_at_once_but_never_a_child_before_its_parent(tmp_path, calls):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "a-meets").write_text("c")  # a does not end before c has begun
    sweep(workdir, jobs=2)
    order = [(verb, name) for verb, name, _ in calls()]
    assert order.index(("train", "c")) < order.index(("end", "a"))
    assert order.index(("extend", "b")) > order.index(("evaluate", "a"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_sweep_that_is_asked_to_end_lets_its_runs_save(tmp_path, calls, number):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    for name in ("a", "c"):
        (workdir / f"{name}-meets").write_text("nobody")

    def ask():
        while sorted(verbs(calls)) != [("train", "a"), ("train", "c")]:
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    with pytest.raises(Stopped, match=number.name), raise_on_signal():
        sweep(workdir, jobs=2)
    assert (workdir / "a" / "saved").exists() and (workdir / "c" / "saved").exists()
    assert sorted(verbs(calls)) == [("train", "a"), ("train", "c")], "nothing else has begun"
    for name in ("a", "c"):
        (workdir / f"{name}-meets").unlink()
    sweep(workdir)
    assert ("evaluate", "b") in verbs(calls)


def test_another_run_in_the_way_is_refused_before_anything_is_run(tmp_path, calls):
    workdir = tmp_path / "sweep"
    sweep(workdir, [Train("a", QUICK)])
    from fope_jax.config import experiment_to_dict

    planned = check_sweep([Train("a", f"{QUICK},seed=5")])
    config = json.dumps(experiment_to_dict(planned[0].experiment))
    (workdir / "a" / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"a holds another run than the sweep's(?s:.*)seed: 5"):
        sweep(workdir)
    assert verbs(calls) == [("train", "a"), ("evaluate", "a")]


def test_a_run_of_an_older_version_is_done(tmp_path, calls):
    """Its experiment lacks a key that has come since, whose default it had."""
    sweep(tmp_path, RUNS[:1])
    stamp = tmp_path / "a" / DONE
    stored = json.loads(stamp.read_text())
    del stored["experiment"]["data"]["copy_shards"]
    stamp.write_text(json.dumps(stored))
    sweep(tmp_path, RUNS[:1])
    assert verbs(calls) == [("train", "a"), ("evaluate", "a")]


def test_cores_are_counted_where_the_system_does_not_tell_which(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert core_shares(2) == [[0, 2], [1]]


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 1, 2}, raising=False)
    assert core_shares(2) == [[1, 3], [2]]
    assert core_shares(4) == [[1], [2], [3], [1]]
    with pytest.raises(ValueError, match="jobs = 0; accepted: an integer of 1 or more"):
        core_shares(0)
