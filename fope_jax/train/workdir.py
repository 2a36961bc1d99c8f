"""The directory of a run: config.json, run.json, metrics.jsonl, checkpoints/, tensorboard/."""

from __future__ import annotations

import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fope_jax.config import (
    ConfigError,
    Experiment,
    TrainConfig,
    build_experiment,
    experiment_to_dict,
    incompatible_changes,
)
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.storage.checkpoint import MANIFEST, QUARANTINE
from fope_jax.storage.directories import check_space, check_writable, make_writable
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import as_path
from fope_jax.train.state import StatePlan

log = logging.getLogger(__name__)

CONFIG, RUN, CHECKPOINTS = "config.json", "run.json", "checkpoints"
LINEAGE = "lineage.json"  # of a run that goes on from another
IMPORTED = "imported"  # the key of run.json that says where the weights of step 0 came from
KEPT = "kept"  # the key with what the config.json of their checkpoint says besides
_SHOWN = 12  # keys of another configuration that an error names
PACKAGES = ("fope-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def has_checkpoint(workdir: Path) -> bool:
    """Whether a checkpoint of this run was ever whole, however it is now.

    Before that there is nothing that another start could lose.
    """
    for directory in (workdir / CHECKPOINTS, workdir / CHECKPOINTS / QUARANTINE):
        steps = directory.iterdir() if directory.is_dir() else ()
        if any((step / MANIFEST).exists() for step in steps):
            return True
    rows = read_rows(workdir / METRICS)  # the directories may have been lost
    return any((row.get("kind"), row.get("phase")) == ("time", "save") for row in rows)


def check_workdir(workdir: Path, experiment: Experiment) -> None:
    """Finds out whether ``experiment`` can be trained in ``workdir``; writes nothing.

    What a start has left that was stopped before its first checkpoint stands in nobody's way.

    Raises:
      OSError: the directory cannot be written.
      ConfigError: it holds a run of another configuration; the message names the keys and both
        values. Or it holds imported weights, which a new run would train over.
    """
    try:
        check_writable(workdir)
    except OSError as error:
        raise OSError(f"cannot write to workdir {workdir}: {error.strerror or error}") from error
    _check_not_something_else(workdir)
    if not has_checkpoint(workdir):
        return
    run = workdir / RUN
    if run.exists() and IMPORTED in (facts := read_json(run)):
        raise ConfigError(
            f"workdir {workdir} holds weights imported from {facts[IMPORTED]['directory']}, with "
            "which no run begins; use another --workdir"
        )
    path = workdir / CONFIG
    if path.exists():
        # Built again, so that a value added since the run began counts as its default.
        old = experiment_to_dict(build_experiment(read_json(path)))
        changes = incompatible_changes(old, experiment_to_dict(experiment))
        if changes:
            more = [f"  and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
            raise ConfigError(
                f"workdir {workdir} holds a run of another configuration; put these back with "
                "--config.KEY=VALUE, or use another --workdir. Different:\n"
                + "\n".join([f"  {change}" for change in changes[:_SHOWN]] + more)
            )


def _check_not_something_else(workdir: Path) -> None:
    """Raises ConfigError where files of another kind would be written over or mixed up."""
    path, above = workdir / CONFIG, workdir.parent
    what = None
    if path.exists():
        try:
            build_experiment(read_json(path))
        except ValueError as error:
            what = f"has a {CONFIG} that is not of a run ({error})"
    elif (workdir / MANIFEST).exists():
        what = f"has a {MANIFEST}: it is a token cache or a checkpoint"
    if above.name == CHECKPOINTS or ((above / CONFIG).exists() and (above / CHECKPOINTS).exists()):
        what = "is inside another run"
    if what:
        raise ConfigError(f"workdir {workdir} {what}; use another --workdir")


def check_disk_space(workdir: Path, plan: StatePlan, config: TrainConfig) -> None:
    """Finds out whether the disk has room for a checkpoint.

    Raises:
      OSError: it has not, and the run stops where one cannot be written.
    """
    arrays = jax.tree.leaves((plan.state.params, plan.state.optimizer, plan.constants))
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    try:
        check_space(workdir, size, "a checkpoint")
    except OSError as error:
        if config.on_save_error == "stop":
            raise
        log.warning("%s; training begins all the same (train.on_save_error = continue)", error)


def open_workdir(workdir: Path, experiment: Experiment) -> None:
    """Writes config.json, after `check_workdir`; what an earlier start left goes, see there.

    Raises:
      OSError, ConfigError: see `check_workdir`.
    """
    check_workdir(workdir, experiment)
    if not has_checkpoint(workdir):
        if (workdir / CONFIG).exists():
            log.info("%s has no checkpoint yet: it begins anew, by this configuration", workdir)
        for name in (RUN, LINEAGE):
            (workdir / name).unlink(missing_ok=True)
    make_writable(workdir)
    write_json(workdir / CONFIG, experiment_to_dict(experiment))


def split_step(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """A run, and the step where ``path`` names a checkpoint of it: ``runs/a/500``, else None."""
    run = as_path(path)
    if not run.name.isdecimal() or (run / CONFIG).is_file():
        return run, None
    parent = run.parent.parent if run.parent.name == CHECKPOINTS else run.parent
    return (parent, int(run.name)) if (parent / CONFIG).is_file() else (run, None)


def write_run_info(workdir: Path, facts: Mapping[str, Any], step: int) -> None:
    """Writes run.json at the first start; each later start is added to its ``resumed`` list.

    Args:
      workdir: of the run.
      facts: what only the caller knows (seed, parameter count, fingerprints).
      step: updates done before this start.
    """
    path = workdir / RUN
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step}
    if step and path.exists():
        run = read_json(path)
        run["resumed"].append(start | provenance())
    else:
        # What an extension of imported weights left here: an export needs it.
        kept = read_json(path).get(KEPT) if path.exists() else None
        run = {KEPT: kept} if kept else {}
        run |= dict(facts) | {"started": start["time"]} | provenance() | {"resumed": []}
    write_json(path, run)


def provenance() -> dict[str, Any]:
    """Commit, versions, machine and command line of this process."""
    device = jax.devices()[0]
    return {
        "commit": git_commit(Path(__file__).parent),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "command": sys.argv,
    }


def git_commit(directory: Path) -> str | None:
    """The commit checked out around ``directory``, with "-dirty" where files differ from it.

    None where it is no git checkout or git is not installed.
    """
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
