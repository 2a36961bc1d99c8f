"""What a run has written is damaged, or cannot be written."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from fope_jax.storage.checkpoint import CheckpointStore
from tests.cloud_storage import Storage, serving
from tests.faults import world
from tests.faults.fault import Fault
from tests.faults.world import ROOT, SAVE_EVERY, STEPS

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
    world.resume_killed(run, reference)


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


# ---------------------------------------------------------------------------- the machine


def a_directory_without_rights(directory: Path, seed: int) -> None:
    """A new run and an old one, in a directory that may be read alone or not even be entered."""
    may_enter = seed % 4 < 2
    # That of a test cannot be entered by others.
    with tempfile.TemporaryDirectory(prefix="fope-fault-") as open_to_all:
        base, place = Path(open_to_all), Path(open_to_all) / "read_only"
        run = world.copy_of(world.unbroken(), place) if seed % 2 else place / "run"
        place.mkdir(exist_ok=True)
        base.chmod(0o755 if may_enter else 0o700)
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        directory.mkdir(exist_ok=True)
        request = world.request(run, nobody=True) | {"log": str(directory / "log")}
        try:
            code = world.nursery().wait(world.nursery().start(request))
        finally:
            for path in (place, *place.rglob("*")):
                path.chmod(0o755)
    last = (directory / "log").read_text().splitlines()[-1]
    verb = "write to" if may_enter else "read"
    assert code == 2 and last == f"fope: cannot {verb} workdir {run}: Permission denied", last


def train_in_a_bucket(directory: Path, storage: Storage) -> tuple[int, str]:
    with serving(storage) as service:
        request = world.request(Path("run")) | {"log": str(directory / "log")}
        request["argv"][request["argv"].index("run")] = "gs://bucket/run"
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.nursery", json.dumps(request)],
            cwd=ROOT,
            env=world.environment() | service,
            timeout=500,
        )
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
        "newest checkpoint damaged",
        "found, told, moved to quarantine; the step before it is used and the bits come again",
        damage_the_newest,
        trials=20,
        short=1,
    ),
    Fault(
        "20 random bit flips in a checkpoint",
        "each one is found, before an array is read",
        flip_twenty_bits,
        trials=5,
        short=1,
    ),
    Fault(
        "every checkpoint damaged or gone",
        "an error; never a silent start from 0, and no file is touched",
        damage_all,
        trials=4,
        short=0,
    ),
    Fault(
        "no space for a checkpoint, on_save_error = stop",
        "told at once; earlier checkpoints stay, no temporary files do",
        fill_the_disk,
        trials=4,
        short=0,
    ),
    Fault(
        "no space for a checkpoint, on_save_error = continue",
        "told at once; training goes on to the same bits, and the last one must be written",
        fill_the_disk_and_go_on,
        trials=3,
        short=0,
    ),
    Fault(
        "a bucket that refuses 3% of all requests",
        "each is tried again; the numbers are those of the run on disk",
        a_bucket_that_fails_now_and_then,
        trials=1,
        short=0,
    ),
    Fault(
        "a bucket that is lost after the first checkpoint",
        "tried again with limits, then an error; the same command goes on",
        a_bucket_that_is_lost,
        trials=1,
        short=0,
    ),
    Fault(
        "a directory without the right to write",
        "one line that names it, before any work",
        a_directory_without_rights,
        trials=4,
        short=4,
    ),
]
