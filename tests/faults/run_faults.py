"""What can happen to a run while it trains, and to what it has written."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from fope_jax.checkpoint import CheckpointStore
from fope_jax.config import build_experiment, load_config
from fope_jax.data.cache import open_cache
from fope_jax.data.loader import Loader
from fope_jax.evaluate.metrics import read_rows
from tests.cloud_storage import Storage, serving
from tests.faults import world
from tests.faults.fault import Fault
from tests.faults.world import ROOT, SAVE_EVERY, STEPS

PACE = 0.02  # seconds a step, so that there is a time at which a signal can come


# ---------------------------------------------------------------------------- killed


def resume_killed(run: Path, reference: Path, *overrides: str) -> None:
    """Goes on with a run that was killed, and compares it with the unbroken one."""
    rows = world.steps(run)
    assert rows == sorted(set(rows)), f"a step twice or out of order: {rows}"
    left = world.valid_step(run)
    lost = max(rows, default=0) - left
    assert 0 <= lost <= SAVE_EVERY, f"{lost} steps lost"
    code, text = world.train(run, *overrides)
    assert code == 0, text
    if left and left < STEPS:
        assert f"resuming {run} at step {left} " in text, text
    world.assert_whole(run, reference)


def kill_at_a_random_time(directory: Path, seed: int) -> None:
    reference, run = world.unbroken(), directory / "run"
    moment = random.Random(seed).uniform(0.0, world.seconds_of_a_run(PACE))
    pid = world.start(run, pace=PACE)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    assert world.nursery().wait(pid) in (-signal.SIGKILL, 0)
    resume_killed(run, reference)


# In the order in which a save comes to them; the numbers are those of the call in it.
IN_A_SAVE = (
    ("fope_jax.checkpoint.CheckpointStore._remove_unfinished", 1, 1),
    ("orbax.checkpoint.Checkpointer.save", 1, 1),
    ("fope_jax.checkpoint.write_json", 1, 2),
    ("fope_jax.checkpoint.tree_sha256", 1, 1),
    ("fope_jax.checkpoint.write_json", 2, 2),
    ("fope_jax.train.account.TimeAccount.rows", 2, 1),  # its first call is after the compilation
)


def kill_in_a_save(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    name, first, calls = IN_A_SAVE[seed % len(IN_A_SAVE)]
    save = rng.randrange(STEPS // SAVE_EVERY)
    seconds = rng.uniform(0, 0.08) if "orbax" in name else 0.0
    reference, run = world.unbroken(), directory / "run"
    code, text = world.train(run, die=[name, first + save * calls, seconds])
    assert code == -signal.SIGKILL, text
    resume_killed(run, reference)


def kill_between_rows_and_checkpoint(directory: Path, seed: int) -> None:
    reference, run = world.unbroken(), directory / "run"
    call = 1 + random.Random(seed).randrange(STEPS // SAVE_EVERY)
    code, text = world.train(run, die=["fope_jax.checkpoint.CheckpointStore.save", call, 0])
    assert code == -signal.SIGKILL, text
    assert max(world.steps(run)) == call * SAVE_EVERY, "its row was there"
    resume_killed(run, reference)


# ---------------------------------------------------------------------------- asked to stop


ROW_EVERY = "train.log_every=4"  # so that a signal comes in the middle of rows


def stop_by_signal(directory: Path, seed: int, **harm: int) -> None:
    reference, run = world.unbroken(ROW_EVERY), directory / "run"
    pid = world.start(run, ROW_EVERY, pace=PACE, **harm)
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    time.sleep(random.Random(seed).uniform(0, PACE * (STEPS - 12)))
    asked = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert world.nursery().wait(pid) == 143, world.said(run)
    assert time.monotonic() - asked < 10
    assert_stopped(run)
    code, text = world.train(run, ROW_EVERY)
    assert code == 0, text
    world.assert_whole(run, reference)


def assert_stopped(run: Path) -> None:
    """The run has said where it stopped, and its checkpoint is that step."""
    found = re.search(
        r"stopped by SIGTERM after step (\d+); the same command goes on from checkpoint (\S+)",
        world.said(run),
    )
    assert found, world.said(run)
    step = int(found[1])
    assert Path(found[2]) == run / "checkpoints" / found[1]
    assert world.valid_step(run) == step < STEPS
    assert max(world.steps(run)) <= step, "no row of a step that is not saved"


def stop_a_distributed_process(directory: Path, seed: int) -> None:
    # JAX looks for the signal once a second, so there must be steps for a while.
    reference, run = world.unbroken(ROW_EVERY), directory / "run"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pid = world.start(run, ROW_EVERY, pace=0.25, distributed=port)
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    time.sleep(random.Random(seed).uniform(0, 1))
    os.kill(pid, signal.SIGTERM)
    assert world.nursery().wait(pid) == 143, world.said(run)
    assert_stopped(run)
    code, text = world.train(run, ROW_EVERY)
    assert code == 0, text
    world.assert_whole(run, reference)


def launch(run: Path, processes: int, devices: int, **harm: float) -> subprocess.Popen[bytes]:
    """Several processes that train together, as tpu_scripts/local.sh starts them."""
    request = world.request(run, ROW_EVERY, "train.batch_size=4", **harm)
    del request["log"]
    command = [
        ROOT / "tpu_scripts/local.sh", "--processes", str(processes), "--devices", str(devices),
        "--grace", "60", "--", "python", "-m", "tests.faults.nursery", json.dumps(request),
    ]  # fmt: skip
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


# ---------------------------------------------------------------------------- damaged


def a_file_of(step: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in step.rglob("*") if path.is_file()))


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(step: Path, rng: random.Random) -> None:
    path = a_file_of(step, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def garbage(step: Path, rng: random.Random) -> None:
    (step / "metadata.json").write_bytes(rng.randbytes(200))


def empty(step: Path, _: random.Random) -> None:
    shutil.rmtree(step)
    step.mkdir()


HARM = {
    "truncated": truncate,
    "a file deleted": lambda step, rng: a_file_of(step, rng).unlink(),
    "metadata garbage": garbage,
    "directory empty": empty,
    "a bit flipped": lambda step, rng: flip_a_bit(a_file_of(step, rng), rng),
}


def damage_the_newest(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    reference = world.unbroken()
    run = world.copy_of(reference, directory)
    newest = run / "checkpoints" / str(STEPS)
    HARM[list(HARM)[seed % len(HARM)]](newest, rng)
    left = {p.name: p.read_bytes() for p in newest.rglob("*") if p.is_file()}
    code, text = world.train(run)
    assert code == 0, text
    assert f"checkpoint {newest} is damaged: " in text
    assert f"resuming {run} at step {STEPS - SAVE_EVERY} " in text
    kept = run / "checkpoints/quarantine" / str(STEPS)
    assert f"moved to {kept}" in text
    assert {p.name: p.read_bytes() for p in kept.rglob("*") if p.is_file()} == left
    world.assert_whole(run, reference)


def flip_twenty_bits(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = world.copy_of(world.unbroken(), directory)
    newest = run / "checkpoints" / str(STEPS)
    for _ in range(20):
        path = a_file_of(newest, rng)
        whole = path.read_bytes()
        flip_a_bit(path, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = CheckpointStore(run / "checkpoints").latest_valid_step()
        assert found == STEPS - SAVE_EVERY, path
        # A manifest that is wrong about a file is told as that file's damage.
        named = "" if path.name == "manifest.json" else f"{path.relative_to(newest)} "
        assert f"{newest} is damaged: {named}" in str(caught[0].message)
        path.write_bytes(whole)
    assert world.valid_step(run) == STEPS


def damage_all(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = world.copy_of(world.unbroken(), directory)
    for step in (STEPS - SAVE_EVERY, STEPS):
        if seed % 2:
            shutil.rmtree(run / "checkpoints" / str(step))
        else:
            flip_a_bit(a_file_of(run / "checkpoints" / str(step), rng), rng)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, text = world.train(run)
    assert code == 2, text
    assert "no valid checkpoint is left" in text and "start over" in text
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------------------- no space


def fill_the_disk(directory: Path, seed: int) -> None:
    reference, run = world.unbroken(), directory / "run"
    call = 2 + seed % 2
    code, text = world.train(run, full_at=[call])
    assert code == 2, text
    place = run / "checkpoints" / str(call * SAVE_EVERY)
    assert f"cannot save checkpoint {place}: " in text.splitlines()[-1], text
    assert sorted(p.name for p in place.parent.iterdir()) == sorted(
        str(step) for step in ((call - 1) * SAVE_EVERY, (call - 2) * SAVE_EVERY) if step
    )
    resume_killed(run, reference)


def fill_the_disk_and_go_on(directory: Path, seed: int) -> None:
    goes_on = "train.on_save_error=continue"
    reference, run = world.unbroken(), directory / "run"
    call = 1 + seed % 3
    code, text = world.train(run, goes_on, full_at=[call])
    assert code == 0, text
    place = run / "checkpoints" / str(call * SAVE_EVERY)
    assert f"cannot save checkpoint {place}: " in text
    assert "training goes on without (train.on_save_error = continue)" in text
    assert not (place.exists() and call * SAVE_EVERY < STEPS - SAVE_EVERY)
    world.assert_whole(run, reference)
    code, text = world.train(directory / "last", goes_on, full_at=[STEPS // SAVE_EVERY])
    assert code == 2, "the last checkpoint must be written"


# ---------------------------------------------------------------------------- bad steps


SKIP = "train.on_bad_step=skip"


def one_bad_step(directory: Path, seed: int) -> None:
    rng, run = random.Random(seed), directory / "run"
    bad = rng.randint(2, STEPS)
    harm = {"nan_at": (bad,)}
    reference = world.unbroken(ROW_EVERY, SKIP, **harm)
    rows = [row for row in read_rows(reference / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [
        int(start < bad <= row["step"])
        for start, row in zip([0, *(r["step"] for r in rows)], rows, strict=False)
    ]
    assert all(np.isfinite(row["loss"]) for row in rows)
    told = rf"step {bad}: loss is nan, gradient norm nan; skipped \(1 in a row"
    assert re.search(told, world.said(reference))
    pid = world.start(run, ROW_EVERY, SKIP, pace=PACE, **harm)  # also through an interruption
    world.wait_for(lambda: (run / "metrics.jsonl").exists() and world.steps(run))
    time.sleep(rng.uniform(0, PACE * (STEPS - 12)))
    os.kill(pid, signal.SIGTERM)
    assert world.nursery().wait(pid) == 143, world.said(run)
    assert world.train(run, ROW_EVERY, SKIP, **harm)[0] == 0
    world.assert_whole(run, reference)


def ten_bad_steps(directory: Path, seed: int) -> None:
    first, run = random.Random(seed).randint(2, STEPS - 9), directory / "run"
    bad = tuple(range(first, first + 10))
    code, text = world.train(run, ROW_EVERY, SKIP, nan_at=bad)
    assert code == 2, text
    assert f"step {bad[-1]}: loss is nan" in text
    assert "10 in a row, train.max_skipped = 10" in text
    for step in bad:
        facts = json.loads((run / "bad_steps" / f"{step}.json").read_text())
        assert facts["step"] == step and facts["loss"] == "nan" and len(facts["rows"]) == 4
        assert all(row["documents"] and row["documents"][0]["name"] for row in facts["rows"])
        with np.load(run / "bad_steps" / f"{step}.npz") as batch:
            assert batch["tokens"].shape == (4, 16)
    code, text = world.train(run, ROW_EVERY, SKIP, "train.max_skipped=11", nan_at=bad)
    assert code == 0, text
    assert world.arrays(run) == world.arrays(
        world.unbroken(ROW_EVERY, SKIP, "train.max_skipped=11", nan_at=bad)
    )


def stop_at_a_bad_step(directory: Path, seed: int) -> None:
    bad, run = random.Random(seed).randint(2, STEPS), directory / "run"
    code, text = world.train(run, nan_at=[bad])
    assert code == 2, text
    last = text.splitlines()[-1]
    assert f"step {bad}: loss is nan, gradient norm nan; nothing has been saved since" in last
    assert f"{run}/bad_steps: {bad}.npz" in last
    assert world.valid_step(run) == (bad - 1) // SAVE_EVERY * SAVE_EVERY
    resume_killed(run, world.unbroken())  # as if the memory that did it had been replaced


def a_spike(directory: Path, seed: int) -> None:
    run = directory / "run"
    factor, bad = "train.spike_factor=1.25", 22 + seed % 3
    code, text = world.train(run, SKIP, factor, shuffled_at=[bad])
    assert code == 0, text
    assert re.search(
        rf"step {bad}: loss is [\d.]+, gradient norm [\d.]+, beyond train.spike_factor = 1.25 "
        r"times the running mean; skipped",
        text,
    ), text
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows if row["skipped"]] == [bad]
    code, text = world.train(directory / "stops", factor, shuffled_at=[bad])
    assert code == 2 and f"step {bad}: loss is " in text.splitlines()[-1], text


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
            ROOT / "tpu_scripts/local.sh", "--processes", str(processes),
            "--devices", str(devices), "--", "python", "-m", "tests.faults.examples",
            str(out), world.config(), str(run), str(stop + (stop < STEPS)), mesh,
        ]  # fmt: skip
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


def a_strange_token(directory: Path, seed: int) -> None:
    bad, run = 1 + random.Random(seed).randrange(STEPS), directory / "run"
    code, text = world.train(run, strange_at=[bad])
    assert code == 2, text
    last = text.splitlines()[-1]
    assert f"step {bad}, tokens of the batch: token ids 1000000 to 1000000: vocab_size=300" in last
    resume_killed(run, world.unbroken())


# ---------------------------------------------------------------------------- the machine


def a_jumping_clock(directory: Path, seed: int) -> None:
    run = directory / "run"
    code, text = world.train(run, clock=10**8 if seed % 2 else 10**4)  # years, or hours
    assert code == 0, text
    rows = read_rows(run / "metrics.jsonl")
    clock = [row["seconds"] for row in rows if row["kind"] == "train"]
    assert clock == sorted(clock) and 0 < clock[-1] < 600
    assert all(0 <= row["seconds"] < 600 for row in rows if row["kind"] == "time")
    world.assert_whole(run, world.unbroken())


def a_directory_without_rights(directory: Path, seed: int) -> None:
    place = directory / "read_only"
    run = world.copy_of(world.unbroken(), place) if seed % 2 else place / "run"
    place.mkdir(exist_ok=True)
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    request = world.request(run, nobody=True) | {"log": str(directory / "log")}
    try:
        code = world.nursery().wait(world.nursery().start(request))
    finally:
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
    last = (directory / "log").read_text().splitlines()[-1]
    assert code == 2 and last == f"fope: cannot write to workdir {run}: Permission denied", last


def train_in_a_bucket(directory: Path, storage: Storage) -> tuple[int, str]:
    with serving(storage) as service:
        request = world.request(Path("run")) | {"log": str(directory / "log")}
        request["argv"][request["argv"].index("run")] = "gs://bucket/run"
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.nursery", json.dumps(request)],
            cwd=ROOT, env=world.environment() | service, timeout=500,
        )  # fmt: skip
    return done.returncode, (directory / "log").read_text()


def a_bucket_that_fails_now_and_then(directory: Path, seed: int) -> None:
    rng, storage, failed = random.Random(seed), Storage("bucket"), []
    directory.mkdir(exist_ok=True)

    def fails() -> bool:
        failed.append(rng.random() < 0.03)
        return failed[-1]

    storage.fails = fails
    code, text = train_in_a_bucket(directory, storage)
    assert code == 0, text
    assert sum(failed) > 3, "some requests were refused"
    kept = directory / "run/metrics.jsonl"
    kept.parent.mkdir()
    kept.write_bytes(storage.buckets["bucket"]["run/metrics.jsonl"].content)
    assert world.numbers(kept.parent) == world.numbers(world.unbroken())


def a_bucket_that_is_lost(directory: Path, seed: int) -> None:
    storage = Storage("bucket")
    directory.mkdir(exist_ok=True)

    def fails() -> bool:  # for good, once the first checkpoint is whole
        return f"run/checkpoints/{SAVE_EVERY}/manifest.json" in storage.buckets["bucket"]

    storage.fails = fails
    code, text = train_in_a_bucket(directory, storage)
    assert code == 2, text
    last = text.splitlines()[-1]
    assert last.startswith("fope: ") and "gs://bucket/run" in last, last
    storage.fails = lambda: False
    code, text = train_in_a_bucket(directory, storage)
    assert code == 0 and "resuming gs://bucket/run at step" in text, text


FAULTS = [
    Fault(
        "kill -9 at a random time",
        "every loss and array has the bits of the unbroken run, no step is missing or twice, and "
        "at most one save interval is trained again",
        kill_at_a_random_time, trials=100, short=1,
    ),
    Fault(
        "kill -9 inside a save",
        "the same, whichever file was being written",
        kill_in_a_save, trials=24, short=1,
    ),
    Fault(
        "kill -9 between metrics and checkpoint",
        "the same: rows without a checkpoint are dropped and come again",
        kill_between_rows_and_checkpoint, trials=4, short=0,
    ),
    Fault(
        "SIGTERM",
        "the step under way is saved, the exit code is 143, rows and bits go on as unbroken",
        stop_by_signal, trials=20, short=1,
    ),
    Fault(
        "SIGTERM under jax.distributed, one process",
        "the same",
        stop_a_distributed_process, trials=2, short=0,
    ),
    Fault(
        "SIGTERM under jax.distributed, two processes",
        "the same: both agree on the step",
        stop_several_processes, trials=1, short=0,
    ),
    Fault(
        "newest checkpoint damaged",
        "found, told, moved to quarantine; the step before it is used and the bits come again",
        damage_the_newest, trials=20, short=1,
    ),
    Fault(
        "20 random bit flips in a checkpoint",
        "each one is found, before an array is read",
        flip_twenty_bits, trials=5, short=1,
    ),
    Fault(
        "every checkpoint damaged or gone",
        "an error; never a silent start from 0, and no file is touched",
        damage_all, trials=4, short=0,
    ),
    Fault(
        "no space for a checkpoint, on_save_error = stop",
        "told at once; earlier checkpoints stay, no temporary files do",
        fill_the_disk, trials=4, short=1,
    ),
    Fault(
        "no space for a checkpoint, on_save_error = continue",
        "told at once; training goes on to the same bits, and the last one must be written",
        fill_the_disk_and_go_on, trials=3, short=0,
    ),
    Fault(
        "one loss that is no number, on_bad_step = skip",
        "left out and counted; resumed in any place the run has the same bits",
        one_bad_step, trials=5, short=0,
    ),
    Fault(
        "ten in a row, on_bad_step = skip",
        "the run ends; batches and documents of all ten are written out",
        ten_bad_steps, trials=3, short=0,
    ),
    Fault(
        "one loss that is no number, on_bad_step = stop",
        "the run ends and names the step; its batch is written out, nothing of it is saved",
        stop_at_a_bad_step, trials=5, short=0,
    ),
    Fault(
        "a spike in the loss",
        "beyond train.spike_factor it is skipped, or the run ends, as configured",
        a_spike, trials=3, short=0,
    ),
    Fault(
        "two trainers in one workdir",
        "the second stops at once and names the first, which goes on; a dead one's lock is taken",
        two_trainers, trials=4, short=0,
    ),
    Fault(
        "another model, dtype, position embedding, tokenizer, length or seed",
        "one error with both values and the flag, before a device does anything",
        another_configuration, trials=len(OTHERS), short=1,
    ),
    Fault(
        "other processes and another mesh in mid-run",
        "every row of every batch holds the example that one process would have had there",
        other_processes_in_mid_run, trials=1, short=0,
    ),
    Fault(
        "a token beyond the vocabulary",
        "an error before the step, with the step and the ids",
        a_strange_token, trials=2, short=0,
    ),
    Fault(
        "a clock that jumps",
        "no time is negative and no number changes",
        a_jumping_clock, trials=2, short=0,
    ),
    Fault(
        "a bucket that refuses 3% of all requests",
        "each is tried again; the numbers are those of the run on disk",
        a_bucket_that_fails_now_and_then, trials=1, short=0,
    ),
    Fault(
        "a bucket that is lost after the first checkpoint",
        "tried again with limits, then an error; the same command goes on",
        a_bucket_that_is_lost, trials=1, short=0,
    ),
    Fault(
        "a directory without the right to write",
        "one line that names it, before any work",
        a_directory_without_rights, trials=2, short=0,
    ),
]  # fmt: skip
