"""A run is killed, or asked to stop."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.faults import world
from tests.faults.fault import Fault
from tests.faults.world import ROOT, SAVE_EVERY, STEPS

# ---------------------------------------------------------------------------- killed


def kill_at_a_random_time(directory: Path, seed: int) -> None:
    reference, run = world.unbroken(), directory / "run"
    moment = random.Random(seed).uniform(0.0, world.seconds_of_a_run(world.PACE))
    pid = world.start(run, pace=world.PACE)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    assert world.nursery().wait(pid) in (-signal.SIGKILL, 0)
    world.resume_killed(run, reference)


# In the order in which a save comes to them; the numbers are those of the call in it.
IN_A_SAVE = (
    ("fope_jax.storage.checkpoint.CheckpointStore._remove_unfinished", 1, 1),
    ("fope_jax.storage.step_save.StepSave._copy_arrays", 1, 1),
    ("fope_jax.storage.step_save.StepSave._hash_written", 1, 1),
    ("fope_jax.storage.step_save.write_json", 1, 2),
    ("fope_jax.storage.step_save.list_file_sizes", 1, 1),
    ("fope_jax.storage.step_save.write_json", 2, 2),
    ("fope_jax.storage.checkpoint.CheckpointStore._remove_older", 1, 1),
    ("fope_jax.train.checkpoints.CheckpointSaver._report", 1, 1),
)


def kill_in_a_save(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    name, first, calls = IN_A_SAVE[seed % len(IN_A_SAVE)]
    save = rng.randrange(STEPS // SAVE_EVERY)
    seconds = rng.uniform(0, 0.08) if "copy" in name else 0.0
    reference, run = world.unbroken(), directory / "run"
    code, text = world.train(run, die=[name, first + save * calls, seconds])
    assert code == -signal.SIGKILL, text
    world.resume_killed(run, reference)


def kill_between_rows_and_checkpoint(directory: Path, seed: int) -> None:
    reference, run = world.unbroken(), directory / "run"
    call = 1 + random.Random(seed).randrange(STEPS // SAVE_EVERY)
    code, text = world.train(
        run, die=["fope_jax.storage.checkpoint.CheckpointStore.start_save", call, 0]
    )
    assert code == -signal.SIGKILL, text
    assert max(world.steps(run)) == call * SAVE_EVERY, "its row was there"
    world.resume_killed(run, reference)


# ---------------------------------------------------------------------------- asked to stop


def stop_by_signal(
    directory: Path, seed: int, number: signal.Signals = signal.SIGTERM, **harm: int
) -> None:
    reference, run = world.unbroken(world.ROW_EVERY), directory / "run"
    pid = world.start(run, world.ROW_EVERY, pace=world.PACE, **harm)
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    time.sleep(random.Random(seed).uniform(0, world.PACE * (STEPS - 12)))
    asked = time.monotonic()
    os.kill(pid, number)
    assert world.nursery().wait(pid) == 128 + number, world.said(run)
    assert time.monotonic() - asked < 10
    assert_stopped(run, number.name)
    code, text = world.train(run, world.ROW_EVERY)
    assert code == 0, text
    world.assert_whole(run, reference)


def stop_by_another_signal(directory: Path, seed: int) -> None:
    stop_by_signal(directory, seed, (signal.SIGHUP, signal.SIGINT)[seed % 2])


def assert_stopped(run: Path, name: str = "SIGTERM") -> None:
    """The run has said where it stopped, and its checkpoint is that step."""
    found = re.search(
        rf"stopped by {name} after step (\d+); the same command goes on from checkpoint (\S+)",
        world.said(run),
    )
    assert found, world.said(run)
    step = int(found[1])
    assert Path(found[2]) == run / "checkpoints" / found[1]
    assert world.valid_step(run) == step < STEPS
    assert max(world.steps(run)) <= step, "no row of a step that is not saved"


def stop_a_distributed_process(directory: Path, seed: int) -> None:
    # JAX looks for the signal once a second, so there must be steps for a while.
    reference, run = world.unbroken(world.ROW_EVERY), directory / "run"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pid = world.start(run, world.ROW_EVERY, pace=0.25, distributed=port)
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    time.sleep(random.Random(seed).uniform(0, 1))
    os.kill(pid, signal.SIGTERM)
    assert world.nursery().wait(pid) == 143, world.said(run)
    assert_stopped(run)
    code, text = world.train(run, world.ROW_EVERY)
    assert code == 0, text
    world.assert_whole(run, reference)


def launch(run: Path, processes: int, devices: int, **harm: float) -> subprocess.Popen[bytes]:
    """Several processes that train together, as tpu_scripts/local.sh starts them."""
    request = world.request(run, world.ROW_EVERY, "train.batch_size=4", **harm)
    del request["log"]
    command = [
        ROOT / "tpu_scripts/local.sh",
        "--processes",
        str(processes),
        "--devices",
        str(devices),
        "--grace",
        "60",
        "--",
        "python",
        "-m",
        "tests.faults.nursery",
        json.dumps(request),
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=world.environment() | {"PATH": path}
        )


def stop_several_processes(directory: Path, seed: int) -> None:
    reference, run = directory / "reference", directory / "run"
    assert launch(reference, 2, 2).wait(300) == 0, world.said(reference)
    process = launch(run, 2, 2, pace=0.3)
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run), 200)
    time.sleep(random.Random(seed).uniform(0, 1))
    process.terminate()
    assert process.wait(120) == 143, world.said(run)
    assert_stopped(run)
    assert launch(run, 2, 2).wait(300) == 0, world.said(run)
    assert world.numbers(run) == world.numbers(reference)


FAULTS = [
    Fault(
        "kill -9 at a random time",
        "every loss and array has the bits of the unbroken run, no step is missing or twice, and "
        "at most one save interval is trained again",
        kill_at_a_random_time,
        trials=100,
        short=0,
    ),
    Fault(
        "kill -9 inside a save",
        "the same, whichever file was being written",
        kill_in_a_save,
        trials=24,
        short=0,
    ),
    Fault(
        "kill -9 between metrics and checkpoint",
        "the same: rows without a checkpoint are dropped and come again",
        kill_between_rows_and_checkpoint,
        trials=4,
        short=0,
    ),
    Fault(
        "SIGTERM",
        "the step under way is saved, the exit code is 143, rows and bits go on as unbroken",
        stop_by_signal,
        trials=20,
        short=0,
    ),
    Fault(
        "SIGHUP or SIGINT",
        "the same, with the exit codes 129 and 130",
        stop_by_another_signal,
        trials=6,
        short=0,
    ),
    Fault(
        "SIGTERM under jax.distributed, one process",
        "the same",
        stop_a_distributed_process,
        trials=2,
        short=0,
    ),
    Fault(
        "SIGTERM under jax.distributed, two processes",
        "the same: both agree on the step",
        stop_several_processes,
        trials=1,
        short=0,
    ),
]
