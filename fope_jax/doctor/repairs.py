"""Repairs of a run: files are moved and copied, never deleted."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from fope_jax.doctor.checks import checkpoint_steps, read_lines
from fope_jax.evaluate.metrics import METRICS
from fope_jax.storage.files import write_text
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import is_in_bucket
from fope_jax.storage.run_paths import CHECKPOINTS, QUARANTINE, split_step


def repair(run: str | Path) -> list[str]:
    """Moves damaged checkpoints to the quarantine, and removes bad lines from metrics.jsonl.

    The old metrics are copied to ``metrics.jsonl.bak-N`` first. Of several train rows of one step
    the last stays. Returns a line for each thing done.

    Raises:
      ValueError: the run is in a bucket.
      LockError: another process writes into it.
    """
    run, _ = split_step(run)
    if is_in_bucket(run):
        raise ValueError(f"{run} is in a bucket: repair a copy on this machine and upload it")
    with lock_run(run, "doctor"):
        return [*_quarantine_checkpoints(run), *_repair_metrics(run / METRICS)]


def _quarantine_checkpoints(run: Path) -> list[str]:
    from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore

    store, done = CheckpointStore(run / CHECKPOINTS), []
    for step in checkpoint_steps(run):
        path = run / CHECKPOINTS / str(step)
        try:
            store.metadata(step)
        except CheckpointError:
            aside = run / CHECKPOINTS / QUARANTINE
            aside.mkdir(exist_ok=True)
            names = (f"{step}.{n}" if n else str(step) for n in itertools.count())
            target = next(aside / name for name in names if not (aside / name).exists())
            path.rename(target)
            done.append(f"moved {path} to {target}")
    store.close()
    return done


def _repair_metrics(path: Path) -> list[str]:
    """Drops unreadable lines and all but the last train row of a step, and sorts train rows."""
    lines = list(read_lines(path)) if path.exists() else []
    last = {line.step: line.number for line in lines if line.is_train}
    kept = [
        line
        for line in lines
        if line.row is not None and (not line.is_train or last[line.step] == line.number)
    ]
    train = iter(sorted((line for line in kept if line.is_train), key=lambda line: line.step))
    ordered = [next(train) if line.is_train else line for line in kept]
    if ordered == lines:
        return []
    names = (path.with_name(f"{path.name}.bak-{n}") for n in itertools.count(1))
    copy = next(name for name in names if not name.exists())
    shutil.copy2(path, copy)
    write_text(path, "".join(line.text.decode().rstrip() + "\n" for line in ordered))
    dropped = len(lines) - len(ordered)
    return [f"copied {path} to {copy}; {dropped} of {len(lines)} lines are left out of it now"]
