"""What can be put right in a run: by moving and copying, never by deleting."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from fope_jax.doctor.checks import CHECKPOINTS, QUARANTINE, steps_of
from fope_jax.doctor.rows import is_train, read_lines, step_of
from fope_jax.evaluate.metrics import METRICS
from fope_jax.storage.files import write_text
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path, is_in_bucket


def repair(run: str | Path) -> list[str]:
    """Moves damaged checkpoints to the quarantine, and writes metrics.jsonl without what is wrong.

    Nothing is deleted: the metrics are copied to ``metrics.jsonl.bak-N`` first. Of several train
    rows of one step the last stays.

    Returns:
      A line for each thing done.

    Raises:
      ValueError: the run is in a bucket.
      LockError: a process writes into it.
    """
    run = as_path(run)
    if is_in_bucket(run):
        raise ValueError(f"{run} is in a bucket: repair a copy on this machine and upload it")
    with lock_run(run, "doctor"):
        return [*_set_aside(run), *_rewrite_metrics(run)]


def _set_aside(run: Path) -> Iterator[str]:
    from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore

    store = CheckpointStore(run / CHECKPOINTS)
    for step in steps_of(run):
        path = run / CHECKPOINTS / str(step)
        try:
            store.metadata(step)
        except CheckpointError:
            target = _free(run / CHECKPOINTS / QUARANTINE / str(step), ".")
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            yield f"moved {path} to {target}"
    store.close()


def _rewrite_metrics(run: Path) -> Iterator[str]:
    path = run / METRICS
    lines = list(read_lines(path)) if path.exists() else []
    rows = [(line.number, line.row, line.text) for line in lines if line.row is not None]
    last = {step_of(row): number for number, row, _ in rows if is_train(row)}
    kept = [
        (number, row, text)
        for number, row, text in rows
        if not is_train(row) or last[step_of(row)] == number
    ]
    train = iter(sorted((one for one in kept if is_train(one[1])), key=lambda one: step_of(one[1])))
    ordered = [next(train) if is_train(one[1]) else one for one in kept]
    if [number for number, *_ in ordered] == [line.number for line in lines]:
        return
    copy = _free(path.with_name(f"{path.name}.bak"), "-", first=1)
    shutil.copy2(path, copy)
    write_text(path, "".join(text.decode().rstrip() + "\n" for *_, text in ordered))
    dropped = len(lines) - len(ordered)
    yield f"copied {path} to {copy}; {dropped} of {len(lines)} lines are left out of it now"


def _free(path: Path, mark: str, first: int = 0) -> Path:
    """``path``, or with a number after it, under a name that nothing has."""
    names = (
        path.with_name(f"{path.name}{mark}{n}" if n else path.name) for n in itertools.count(first)
    )
    return next(name for name in names if not name.exists())
