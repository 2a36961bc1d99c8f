"""Several processes of one run, of which one ends: the others do, and say why."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fope_jax.config import build_experiment, experiment_to_dict
from fope_jax.evaluate.metrics import read_rows

ROOT = Path(__file__).parents[2]
# Fails, or is slow, as process OF alone does.
HARMED = """
import sys, time
from fope_jax.main import main
from fope_jax.processes.collectives import is_main_process
{harm}
sys.exit(main(sys.argv[1:]))
"""
SAVE_FAILS = """
from fope_jax.storage import step_save
write = step_save.write_json
def written(path, content):
    if path.name == "manifest.json":
        raise OSError(28, "No space left on device", str(path))
    write(path, content)
step_save.write_json = written
"""
SECOND_CANNOT_WRITE = """
from fope_jax.storage.step_save import StepSave
hash_written = StepSave._hash_written
def failing(save):
    if save.step == 10 and not is_main_process():
        raise OSError(28, "No space left on device")
    return hash_written(save)
StepSave._hash_written = failing
"""
SECOND_FAILS = """
from fope_jax.train import loop
shard_batch, calls = loop.shard_batch, []
def placed(batch, mesh):
    calls.append(1)
    if len(calls) == 3 and not is_main_process():
        raise ZeroDivisionError("a defect")
    return shard_batch(batch, mesh)
loop.shard_batch = placed
"""
SLOW_STEPS = """
from fope_jax.train import loop
shard_batch = loop.shard_batch
def placed(batch, mesh):
    time.sleep(0.3)
    return shard_batch(batch, mesh)
loop.shard_batch = placed
"""
SLOW_BATCHES = """
from fope_jax.evaluate import perplexity
score = perplexity.score_windows
def scored(*arguments, progress, **named):
    def slowly(batches, **named):
        for batch in progress(batches, **named):
            time.sleep(0.3)
            yield batch
    return score(*arguments, progress=slowly, **named)
perplexity.score_windows = scored
"""


@pytest.fixture
def config(runs, tmp_path):
    values = runs.values(steps=40, save_every=20, log_every=1) | {
        "evaluate": {
            "lengths": (1,),
            "num_windows": 200,
            "position_windows": 0,
            "passkey_trials": 0,
            "batch_tokens": 16,
        },
        "mesh": {"data": 2},
    }
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(arg=''): return ConfigDict({values!r})\n"
    )
    return path, values


def start(*arguments, harm=""):
    """Two processes of one command; local.sh would end the one where the other fails."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "FOPE_COORDINATOR": f"127.0.0.1:{port}",
        "FOPE_NUM_PROCESSES": "2",
        "PYTHONPATH": str(ROOT),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", HARMED.format(harm=harm), *map(str, arguments)],
            env=environment | {"FOPE_PROCESS_ID": str(i)},
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]


def ends(processes, seconds=60):
    """Exit codes, and what was said, of processes that end soon after each other."""
    errors = []
    for process in processes:
        errors.append(process.communicate(timeout=seconds)[1])
        seconds = 60
    return [process.returncode for process in processes], errors


def train(config, workdir, harm="", *options):
    return start("train", "--config", config[0], "--workdir", workdir, *options, harm=harm)


@pytest.mark.slow  # two processes
def test_what_the_first_refuses_ends_the_other_in_a_line(config, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    (workdir / "checkpoints" / "5" / "manifest.json").write_text("{}")
    other = experiment_to_dict(build_experiment(config[1] | {"seed": 5}))
    (workdir / "config.json").write_text(json.dumps(other))
    codes, (first, second) = ends(train(config, workdir))
    assert codes == [2, 2]
    assert f"fope: workdir {workdir} holds a run of another configuration" in first
    assert "fope: process 0 (host " in second
    assert f"): workdir {workdir} holds a run of another configuration" in second
    assert "seed: 5, now 1" in second.splitlines()[-1]


@pytest.mark.slow
def test_a_workdir_that_another_process_writes(config, tmp_path):
    from fope_jax.storage.lock import lock_run

    with lock_run(tmp_path / "run", "train"):
        codes, (_, second) = ends(train(config, tmp_path / "run"))
    assert codes == [2, 2]
    assert "fope: process 0 (host " in second
    assert f"): {tmp_path / 'run'} is written by another process" in second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "code", "failed", "reason"),
    [
        (SAVE_FAILS, 2, 0, "cannot save checkpoint"),
        (SECOND_FAILS, 1, 1, "ZeroDivisionError: a defect"),
    ],
    ids=["a save of the first", "a defect of the second"],
)
def test_what_fails_in_one_process_ends_all(config, tmp_path, harm, code, failed, reason):
    """The other is ended by JAX, which misses the one that failed."""
    codes, errors = ends(train(config, tmp_path / "run", harm))
    assert codes[failed] == code and codes[1 - failed] != 0, errors
    assert reason in errors[failed]


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_save_that_fails_in_one_process_is_told_by_both(config, tmp_path, on_error):
    run, goes_on = tmp_path / "run", on_error == "continue"
    options = [f"--config.train.on_save_error={on_error}", "--config.train.save_every=10"]
    codes, errors = ends(train(config, run, SECOND_CANNOT_WRITE, *options))
    assert codes == ([0, 0] if goes_on else [2, 2]), errors
    assert all(f"cannot save checkpoint {run}/checkpoints/10: " in error for error in errors)
    assert "No space left on device" in errors[1] and "process 1" in errors[0]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == (["30", "40"] if goes_on else []), errors
    if goes_on:
        manifest = json.loads((run / "checkpoints/40/manifest.json").read_text())["files"]
        assert any("ocdbt.process_1/" in name for name in manifest)
        assert not any(name.startswith("checksums") for name in manifest)
        codes, errors = ends(train(config, run, "", *options))
        assert codes == [0, 0] and "is finished" in errors[0], errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_one_stops_and_saves_both(config, tmp_path, number):
    workdir = tmp_path / "run"
    processes = train(config, workdir, SLOW_STEPS + unignored())
    wait_for_rows(workdir, "train")
    processes[1].send_signal(number)
    codes, (first, second) = ends(processes)
    assert codes == [143, 128 + number], (first, second)
    assert "fope: stopped by SIGTERM after step " in first
    step = first.rpartition("/")[2].strip()
    assert f"fope: stopped by {number.name} after step {step}; " in second
    assert (workdir / "checkpoints" / step / "manifest.json").exists()
    assert not (workdir / "run.lock").exists()


@pytest.mark.slow
def test_a_signal_to_one_ends_an_evaluation_of_both(config, tmp_path):
    workdir = tmp_path / "run"
    codes, errors = ends(train(config, workdir))
    assert codes == [0, 0], errors
    processes = start("evaluate", "--run", workdir, harm=SLOW_BATCHES)
    wait_for_rows(workdir, "evaluate: restore")
    time.sleep(1)
    processes[0].send_signal(signal.SIGTERM)
    began = time.monotonic()
    codes, errors = ends(processes)
    assert codes == [143, 143], errors
    assert time.monotonic() - began < 15
    assert all("fope: stopped by SIGTERM" in error for error in errors)
    assert not (workdir / "run.lock").exists()


def unignored():
    """Where the tests themselves run in the background, SIGINT is ignored, and would be here."""
    return (
        "\nimport signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    )


def wait_for_rows(workdir, kind):
    deadline, path = time.monotonic() + 60, workdir / "metrics.jsonl"
    while not (path.exists() and any(kind in (r["kind"], r.get("phase")) for r in read_rows(path))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
