"""The directory of a run: config.json, run.json, metrics.jsonl, checkpoints/, tensorboard/."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from types import MappingProxyType
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
from fope_jax.data import DataConfig
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.data.tokenizers.tokenizer_json import TOKENIZER_CONFIGS
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.evaluate.run_data import has_tokenizer_of_run
from fope_jax.extras import installed_version
from fope_jax.storage.directories import check_space, check_writable, make_writable
from fope_jax.storage.files import read_json, read_json_or_empty, write_json
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import CHECKPOINTS, CONFIG, IMPORTED, LINEAGE, QUARANTINE, RUN
from fope_jax.storage.step_save import MANIFEST
from fope_jax.train.optim import describe_rate
from fope_jax.train.save_time import checkpoint_bytes
from fope_jax.train.state import StatePlan

log = logging.getLogger(__name__)

CONTINUED = "continued"  # key in run.json: the steps that were added to a trained run
UNTRAINED = "untrained"  # key in run.json: positions that were changed without training
KEPT = "kept"  # key in run.json: fields of their config.json that only an export needs
_SHOWN = 12  # most differing keys that an error lists
PACKAGES = ("fope-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# ---------------------------------------------------------------------------- checks


def check_workdir(workdir: Path, experiment: Experiment) -> None:
    """Checks that ``experiment`` can be trained in ``workdir``; writes nothing.

    Raises:
      OSError: the directory cannot be written.
      ConfigError: it holds a run of another configuration (the message names the keys and both
        values), or imported weights, which training would overwrite.
    """
    try:
        check_writable(workdir)
    except OSError as error:
        raise OSError(f"cannot write to workdir {workdir}: {error.strerror or error}") from error
    config, parent, problem, old = workdir / CONFIG, workdir.parent, None, None
    if config.exists():
        try:  # rebuilt: a field added to the package since then gets its default
            old = experiment_to_dict(build_experiment(read_json(config)))
        except ValueError as error:
            problem = f"has a {CONFIG} that is not of a run ({error})"
    elif (workdir / MANIFEST).exists():
        problem = f"has a {MANIFEST}: it is a token cache or a checkpoint"
    is_run = (parent / CONFIG).exists() and (parent / CHECKPOINTS).exists()
    if parent.name == CHECKPOINTS or is_run:
        problem = "is inside another run"
    if problem:
        raise ConfigError(f"workdir {workdir} {problem}; use another --workdir")
    if not has_checkpoint(workdir):
        return
    run = read_json_or_empty(workdir / RUN)
    if UNTRAINED in run:
        raise ConfigError(
            f"workdir {workdir} holds a checkpoint whose positions were changed without training, "
            f"with which no run begins: `fope extend {workdir} --method same --length TOKENS "
            "--workdir NEW` trains it"
        )
    if IMPORTED in run:
        raise ConfigError(
            f"workdir {workdir} holds weights imported from {run[IMPORTED]['directory']}, which "
            "another run would overwrite; use another --workdir. Training goes on from them with "
            f"`fope extend {workdir} --method same --length TOKENS --workdir NEW`"
        )
    tokenizer, changes = experiment.data.tokenizer, []
    if old and has_tokenizer_of_run(workdir, tokenizer):  # its file may lie elsewhere now
        old["data"]["tokenizer"] = tokenizer
    if old:
        changes = incompatible_changes(old, experiment_to_dict(experiment))
    if old and changes:
        more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
        raise ConfigError(
            f"workdir {workdir} holds a run of another configuration; put these back with "
            "--config.KEY=VALUE, or use another --workdir. Different:\n  "
            + "\n  ".join([*changes[:_SHOWN], *more])
            + _how_to_train_longer(changes, old["train"]["steps"], experiment.train.steps)
        )


def _how_to_train_longer(changes: Sequence[str], steps: int, now: int) -> str:
    """A line where nothing but the number of steps has changed, and grown: a decay would move."""
    if now <= steps or any(not change.startswith("train.steps: ") for change in changes):
        return ""
    return (
        f"\nWith train.decay_steps = {steps} as well it is trained longer, at the rate that its "
        "decay ended with, as `fope train --continue-for` does"
    )


def has_checkpoint(workdir: Path) -> bool:
    """Whether the run ever completed a checkpoint, even if it is now damaged or lost.

    Raises:
      OSError: the directory cannot be read.
    """
    try:
        for directory in (workdir / CHECKPOINTS, workdir / CHECKPOINTS / QUARANTINE):
            steps = directory.iterdir() if directory.is_dir() else ()
            if any((step / MANIFEST).exists() for step in steps):
                return True
        return any(map(is_save_row, read_rows(workdir / METRICS)))  # the directories may be lost
    except PermissionError as error:
        raise OSError(f"cannot read workdir {workdir}: {error.strerror}") from error


def is_save_row(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics.jsonl tells of a checkpoint that was completed."""
    return (row.get("kind"), row.get("phase")) == ("time", "save") and not row.get("failed")


def check_disk_space(workdir: Path, plan: StatePlan, config: TrainConfig) -> None:
    """Raises OSError if the disk has no room for a checkpoint; see ``train.on_save_error``."""
    size = checkpoint_bytes(plan.state.params, plan.state.optimizer, plan.constants)
    try:
        check_space(workdir, size, "a checkpoint")
    except OSError as error:
        if config.on_save_error == "stop":
            raise
        log.warning("%s; training begins all the same (train.on_save_error = continue)", error)


# ---------------------------------------------------------------------------- files


def open_workdir(workdir: Path, experiment: Experiment) -> None:
    """Writes config.json after `check_workdir`; removes files of a start without a checkpoint."""
    check_workdir(workdir, experiment)
    if not has_checkpoint(workdir):
        if (workdir / CONFIG).exists():
            log.info("%s has no checkpoint yet: it begins anew, by this configuration", workdir)
        for name in (RUN, LINEAGE):
            (workdir / name).unlink(missing_ok=True)
    elif (workdir / CONFIG).exists() and (workdir / RUN).exists():
        _record_added_steps(workdir, experiment.train)
    make_writable(workdir)
    write_json(workdir / CONFIG, experiment_to_dict(experiment))


def save_tokenizer(workdir: Path, tokenizer: Tokenizer, data: DataConfig) -> None:
    """Writes the tokenizer of a run, with the configuration files beside its tokenizer.json."""
    tokenizer.save(workdir)
    if data.tokenizer.endswith(".json"):
        for name in TOKENIZER_CONFIGS:
            path = as_path(data.tokenizer).with_name(name)
            if path.is_file():
                (workdir / name).write_bytes(path.read_bytes())


def _record_added_steps(workdir: Path, config: TrainConfig) -> None:
    """Writes to run.json that the run gets more steps than config.json gave it so far."""
    steps, run = read_json(workdir / CONFIG)["train"]["steps"], read_json(workdir / RUN)
    record = {"from": steps, "to": config.steps, "learning_rate": describe_rate(config)}
    known = run.get(CONTINUED, [])
    # Written before config.json: killed in between, the same start finds its record.
    if steps < config.steps and known[-1:] != [record]:
        write_json(workdir / RUN, run | {CONTINUED: [*known, record]})


def write_run_info(
    workdir: Path,
    facts: Mapping[str, Any],
    step: int,
    data: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes ``facts`` to run.json; a start at a later ``step`` is added to its ``resumed``.

    ``data`` is ``describe_data`` of the token cache, which may have been moved since an earlier
    start.
    """
    path = workdir / RUN
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run = read_json_or_empty(path)
    if step and run:
        run["resumed"].append({"time": now, "step": step} | provenance())
    else:
        # Written by an extension of imported weights: without it an export would lose fields.
        kept = {KEPT: run[KEPT]} if run.get(KEPT) else {}
        run = kept | dict(facts) | {"started": now} | provenance() | {"resumed": []}
    write_json(path, {**run, **data})


def provenance() -> dict[str, Any]:
    """Commit, package versions, machine and command line of this process."""
    device = jax.devices()[0]
    versions = {package: installed_version(package) for package in PACKAGES}
    return {
        "commit": package_commit(Path(__file__).parents[2]),
        "versions": {"python": platform.python_version()} | versions,
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "command": sys.argv,
    }


def package_commit(root: Path) -> str | None:
    """The commit of the package below ``root``; None if nothing tells.

    Where ``root`` is no checkout, as on TPU hosts and in images, that of the file COMMIT, which
    `tpu_scripts/install.sh` packs, or that from which pip installed (PEP 610).
    """
    # Without .git here, git would answer for a repository around this directory.
    commit = git_commit(root) if (root / ".git").exists() else None
    packed = root / "COMMIT"
    if commit is None and packed.is_file():
        commit = packed.read_text().strip().removeprefix("unknown")
    return commit or _installed_commit(root)


def _installed_commit(root: Path) -> str | None:
    """The commit of a package that pip installed into ``root`` from a repository."""
    for package in distributions(name="fope-jax", path=[str(root)]):
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        return origin.get("vcs_info", {}).get("commit_id")
    return None


def git_commit(directory: Path) -> str | None:
    """The git commit of ``directory``, with "-dirty" if files differ; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit
