"""Another trainer, another configuration, other processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from fope_jax.config import build_experiment, load_config
from fope_jax.data.cache import open_cache
from fope_jax.data.loader import Loader
from tests.faults import world
from tests.faults.fault import Fault
from tests.faults.world import ROOT, STEPS

# ---------------------------------------------------------------------------- two at once


def two_trainers(directory: Path, seed: int) -> None:
    reference, run = world.unbroken(), directory / "run"
    pid = world.start(run, pace=0.15)
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    second = world.nursery().start(world.request(run) | {"log": str(directory / "second.log")})
    assert world.nursery().wait(second) == 2
    text = (directory / "second.log").read_text()
    who = rf"fope train, host {socket.gethostname()}, pid {pid}, since \d{{4}}-\d\d-\d\dT\S+"
    assert re.search(rf"{run} is written by another process \({who}\)", text), text
    if seed % 2:  # and its owner dies
        os.kill(pid, signal.SIGKILL)
        world.nursery().wait(pid)
        code, text = world.train(run)
        assert code == 0 and "run.lock: its process is gone" in text, text
    else:
        assert world.nursery().wait(pid) == 0, world.said(run)
    world.assert_whole(run, reference)


# ---------------------------------------------------------------------------- another model


OTHERS = (
    ("model.d_model=32", "model.d_model: 16, now 32"),
    ("model.param_dtype=bfloat16", "model.param_dtype: 'float32', now 'bfloat16'"),
    ("model.dtype=bfloat16", "model.dtype: 'float32', now 'bfloat16'"),
    ("position.method=rope", "position.method: 'fope', now 'rope'"),
    ("position.theta=500.0", "position.theta: 10000.0, now 500.0"),
    ("data.tokenizer=sentencepiece", "data.tokenizer: 'bytes', now 'sentencepiece'"),
    ("train.length=32", "train.length: 16, now 32"),
    ("train.batch_size=8", "train.batch_size: 4, now 8"),
    ("seed=5", "seed: 0, now 5"),
)


def another_configuration(directory: Path, seed: int) -> None:
    override, says = OTHERS[seed % len(OTHERS)]
    run = world.copy_of(world.unbroken(), directory)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, text = world.train(run, override)
    assert code == 2, text
    assert f"  {says}" in text.splitlines() and "--config.KEY=VALUE" in text, text
    assert len(text.splitlines()) < 20 and "compiled" not in text, text
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def other_processes_in_mid_run(directory: Path, seed: int) -> None:
    """One process, then two with two devices each, then one with four: the same examples."""
    run, out = directory / "run", directory / "out"
    out.mkdir(parents=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    setups = ((1, 1, 12, "data=1"), (2, 2, 18, "data=4"), (1, 4, STEPS, "data=2,tensor=2"))
    for processes, devices, stop, mesh in setups:
        command = [
            ROOT / "tpu_scripts/local.sh",
            "--processes",
            str(processes),
            "--devices",
            str(devices),
            "--",
            "python",
            "-m",
            "tests.faults.examples",
            str(out),
            world.config(),
            str(run),
            str(stop + (stop < STEPS)),
            mesh,
        ]
        environment = world.environment() | {"PATH": path}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert world.steps(run) == list(range(1, STEPS + 1))
    experiment = build_experiment(load_config(world.config()))
    loader = Loader(open_cache(experiment.data, "train"), length=16, batch_size=4, seed=0)
    begin = 0
    for processes, _, stop, _ in setups:
        rows = [
            row
            for process in range(processes)
            for row in json.loads((out / f"{stop + (stop < STEPS)}-{process}.json").read_text())
        ]
        for step in range(begin, stop):
            expected = loader.batch(step).tokens
            found = {r["row"]: [] for r in rows}
            for row in rows:
                if row["call"] == step - begin + 1:  # the first call compiles
                    found[row["row"]].append(row["tokens"])
            assert sorted(found) == [0, 1, 2, 3]
            for number, parts in found.items():
                joined = [token for part in unique(parts) for token in part]
                assert joined == expected[number].tolist(), (step, number)
        begin = stop


def unique(parts: list[list[int]]) -> list[list[int]]:
    """Parts of one row in their order; those that several devices hold, once."""
    return [part for i, part in enumerate(parts) if part not in parts[:i]]


FAULTS = [
    Fault(
        "two trainers in one workdir",
        "the second stops at once and names the first, which goes on; a dead one's lock is taken",
        two_trainers,
        trials=4,
        short=0,
    ),
    Fault(
        "another model, dtype, position embedding, tokenizer, length or seed",
        "one error with both values and the flag, before a device does anything",
        another_configuration,
        trials=len(OTHERS),
        short=1,
    ),
    Fault(
        "other processes and another mesh in mid-run",
        "every row of every batch holds the example that one process would have had there",
        other_processes_in_mid_run,
        trials=1,
        short=0,
    ),
]
