"""Checks of all files of a run; nothing is changed."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.evaluate.metrics import METRICS
from fope_jax.storage.directories import list_file_sizes
from fope_jax.storage.files import read_json
from fope_jax.storage.lock import LOCK, is_owner_alive, read_lock_owner
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import (
    CHECKPOINTS,
    CONFIG,
    IMPORTED,
    LINEAGE,
    QUARANTINE,
    RUN,
    is_of_weights,
    split_step,
)

_TEMPORARY = (".orbax-checkpoint-tmp", ".tmp")
_SHOWN = 5


class Finding(NamedTuple):
    """A problem, with its file, and the command that solves it.

    ``harmless``: the next `fope train` or reader handles it.
    """

    problem: str
    advice: str
    harmless: bool = False


class Check(NamedTuple):
    """The check of one item of a run."""

    name: str
    summary: str
    findings: Sequence[Finding] = ()


def exit_code(checks: Iterable[Check]) -> int:
    """1 if any finding is not harmless, else 0."""
    return int(any(not finding.harmless for check in checks for finding in check.findings))


def as_text(run: str | Path, checks: Iterable[Check]) -> str:
    """A table of the checks, followed by the findings."""
    lines, notes, problems = [str(run)], [], []
    for check in checks:
        state = "note" if check.findings else "sound"
        for finding in check.findings:
            mark = "note" if finding.harmless else "PROBLEM"
            state = mark if mark == "PROBLEM" else state
            advised = [f"{mark}: {finding.problem}", f"  do: {finding.advice}"]
            (notes if finding.harmless else problems).extend(advised)
        lines.append(f"  {check.name:<12} {state:<8} {check.summary}")
    # A name from a damaged file may hold characters that cannot be encoded.
    return "\n".join([*lines, *problems, *notes]).encode(errors="backslashreplace").decode()


def as_json(run: str | Path, checks: Iterable[Check]) -> dict[str, Any]:
    """The checks as JSON values."""
    described = [
        {"name": c.name, "summary": c.summary, "findings": [f._asdict() for f in c.findings]}
        for c in checks
    ]
    return {"run": str(run), "exit_code": exit_code(checks), "checks": described}


def first_few(values: Iterable[Any]) -> str:
    """The first few values, and how many more there are.

    >>> first_few(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    values = list(values)
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more


def examine(run: str | Path) -> list[Check]:
    """Checks a run without a device; reads its checkpoints and the whole token cache.

    ``run`` may name one checkpoint, ``runs/a/500``: of all only that one is read.

    Raises:
      FileNotFoundError: there is no such directory, or no such checkpoint.
    """
    run, step = split_step(run)
    if not run.is_dir():
        what = "is no directory" if run.exists() else "does not exist"
        raise FileNotFoundError(f"{run} {what}; name the --workdir of `fope train`")
    steps = checkpoint_steps(run)
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{run} has no checkpoint {step}; there are: {first_few(steps)}")
    config, experiment = _check_config(run)
    checkpoints, metadata = _check_checkpoints(run, experiment, steps if step is None else [step])
    newest, schedule = max(metadata if step is None else steps, default=0), None
    if experiment is not None:
        stops = tuple(stage.stop for stage in experiment.train.stages)
        schedule = RowSchedule(experiment.train.log_every, experiment.train.save_every, stops)
    return [
        config,
        checkpoints,
        _check_metrics(run, schedule, newest),
        _check_data(run, experiment, metadata),
        _check_lineage(run, is_finished=schedule is not None and newest >= schedule.stops[-1]),
        _check_leftovers(run),
    ]


def _check_config(run: Path) -> tuple[Check, Any]:
    """The check, and the experiment if it can be built."""
    from fope_jax.config import build_experiment

    path = run / CONFIG
    if not path.is_file():
        advice = f"name a --workdir, or bring {CONFIG} back: fope train --config CONFIG makes it"
        return Check("config", "missing", [Finding(f"{path} does not exist", advice)]), None
    values: dict[str, Any] = {}
    try:
        values = read_json(path)
        experiment = build_experiment(values)
    except ValueError as error:
        problem = str(error) if str(path) in str(error) else f"{path}: {error}"
        finding = Finding(problem, "bring the file back, or put the value right")
        if option := re.search(r"--allow-module \S+", problem):  # a method of the user's own
            finding = Finding(problem, f"if you trust it: fope doctor {run} {option[0]}")
        if is_of_weights(values):
            advice = f"make a run of it: fope import {run} --workdir RUN"
            finding = Finding(f"{path} is of a checkpoint of Hugging Face, no run", advice)
        return Check("config", "cannot be built", [finding]), None
    findings = []
    try:
        read_json(run / RUN) if (run / RUN).exists() else None
    except ValueError as error:
        findings.append(Finding(str(error), f"move it away: mv {run / RUN} {run / RUN}.bak"))
    summary = f"{experiment.name}, seed {experiment.seed}, {experiment.train.steps:,} steps"
    return Check("config", summary, findings), experiment


# ---------------------------------------------------------------------------- metrics.jsonl


class RowSchedule(NamedTuple):
    """When training writes a train row: every so many steps, at saves and at ends of stages."""

    log_every: int
    save_every: int
    stops: tuple[int, ...]

    def next_step(self, step: int) -> int | None:
        """The step of the next row after ``step``; None after the last.

        >>> schedule = RowSchedule(log_every=3, save_every=4, stops=(5, 10))
        >>> [schedule.next_step(step) for step in (0, 3, 4, 5, 9, 10)]
        [3, 4, 5, 6, 10, None]
        """
        if step >= self.stops[-1]:
            return None
        ends = [stop for stop in self.stops if stop > step]
        return min(*(step - step % n + n for n in (self.log_every, self.save_every)), *ends)


class Line(NamedTuple):
    """A line of a file. ``row`` is None where it is not a JSON object."""

    number: int
    row: dict[str, Any] | None
    is_whole: bool
    text: bytes

    @property
    def step(self) -> int:
        """The step of its row; -1 without one."""
        step = (self.row or {}).get("step")
        return step if isinstance(step, int) else -1

    @property
    def is_train(self) -> bool:
        """Whether it holds a train row with a step."""
        return self.row is not None and self.row.get("kind") == "train" and self.step >= 0


def read_lines(path: Path) -> Iterator[Line]:
    """All lines of a file, including those that are not JSON."""
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        yield Line(number, row if isinstance(row, dict) else None, text.endswith(b"\n"), text)


def _check_metrics(run: Path, schedule: RowSchedule | None, newest: int) -> Check:
    """Rows are whole, finite, once for each step, and complete up to the newest checkpoint."""
    path, findings = run / METRICS, []
    if not path.exists():
        findings = [Finding(f"{path} does not exist", "bring it back")] if newest else []
        return Check("metrics", "no rows", findings)

    def add(problem: str, advice: str, harmless: bool = False) -> None:
        findings.append(Finding(f"{path}: {problem}", advice, harmless))

    lines = list(read_lines(path))
    repair = f"fope doctor {run} --repair"
    if bad := [line.number for line in lines if line.row is None and line.is_whole]:
        add(f"no JSON object in line {first_few(bad)}", repair)
    if lines and lines[-1].row is None and not lines[-1].is_whole:
        add(f"line {lines[-1].number} was cut off", "nothing: the next row replaces it", True)

    evaluate = f"fope evaluate {run} --force names the weights or documents it comes from"
    if _is_imported(run):
        evaluate += (
            "; weights that are not finite have to be imported again from a sound checkpoint"
        )
    rows = [line for line in lines if line.row is not None]
    for of_training, advice in ((True, "lower train.learning_rate"), (False, evaluate)):
        numbers = [
            f"{line.number} ({key})"
            for line in rows
            if ((line.row or {}).get("kind") in ("train", "validation")) == of_training
            for key, value in (line.row or {}).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if numbers:
            add(f"numbers that are not finite in line {first_few(numbers)}", advice)

    steps = [line.step for line in rows if line.is_train]
    if repeated := sorted(step for step, count in Counter(steps).items() if count > 1):
        add(f"several train rows of step {first_few(repeated)}", repair)
    if early := [step for before, step in itertools.pairwise(steps) if step < before]:
        add(f"train rows out of order at step {first_few(early)}", repair)
    if schedule is not None:
        missing = []
        for before, step in itertools.pairwise([0, *sorted(set(steps))]):
            expected = schedule.next_step(before)
            if expected is not None and step > expected:
                missing.append(f"after step {before}")
        last = max(steps, default=0)
        if last < newest:
            missing.append(f"from step {last} to the checkpoint {newest}")
        if missing:
            every = f"(one every {schedule.log_every} steps)"
            add(
                f"train rows are missing {first_few(missing)} {every}",
                "bring the file back from a copy; nothing else has these numbers. Where "
                "train.log_every was larger then, nothing is missing",
            )
    if later := sorted({line.step for line in rows if line.step > newest}):
        saved = f"the newest checkpoint, {newest}" if newest else "any checkpoint"
        problem = f"rows of steps beyond {saved}: {first_few(later)}"
        add(problem, "nothing: training again writes them again", harmless=True)
    summary = f"{len(rows):,} rows" + (f", train rows to step {max(steps):,}" if steps else "")
    return Check("metrics", summary, findings)


def _is_imported(run: Path) -> bool:
    try:
        return IMPORTED in read_json(run / RUN)
    except (ValueError, OSError, ImportError):  # `_check_config` reports it
        return False


# ---------------------------------------------------------------------------- the other parts


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint directory."""
    directory = run / CHECKPOINTS
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())


def lock_owner(run: Path) -> str | None:
    """The process that writes into a run, in words; None if there is none."""
    owner = read_lock_owner(run)
    return f"written by {owner.text}" if owner is not None and is_owner_alive(owner) else None


def _check_checkpoints(
    run: Path, experiment: Any, steps: Iterable[int]
) -> tuple[Check, dict[int, dict[str, Any]]]:
    """The check, and the metadata of each sound checkpoint."""
    from fope_jax.evaluate.fingerprint import check_fingerprint
    from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
    from fope_jax.storage.step_save import MANIFEST

    sound: dict[int, dict[str, Any]] = {}
    findings = []
    store = CheckpointStore(run / CHECKPOINTS)
    for step in steps:
        path = run / CHECKPOINTS / str(step)
        try:
            sound[step] = store.metadata(step)
        except CheckpointError as error:
            is_being_written = lock_owner(run) is not None and not (path / MANIFEST).exists()
            advice = (
                "nothing: it is being written"
                if is_being_written
                else f"fope doctor {run} --repair"
            )
            findings.append(Finding(str(error), advice, is_being_written))
            continue
        if experiment is not None:
            position, shape = experiment.position, experiment.model.shape
            try:
                check_fingerprint(sound[step], position, shape, None, str(path))
            except CheckpointError as error:
                findings.append(Finding(str(error), f"bring the run's own {CONFIG} back"))
    store.close()
    hashes = sorted({str(metadata.get("position")) for metadata in sound.values()})
    if len(hashes) > 1:
        problem = f"{run / CHECKPOINTS}: checkpoints of several position embeddings, "
        findings.append(Finding(problem + ", ".join(hashes), "move those of other runs away"))
    if findings and not sound:
        advice = "bring one back from a copy: without one the run cannot go on"
        findings = [f if f.harmless else f._replace(advice=advice) for f in findings]
    summary = "none that is sound" if findings else "none"
    if sound:
        summary = f"{len(sound)} sound ({first_few(sorted(sound))})"
    return Check("checkpoints", summary, findings), sound


def _check_data(run: Path, experiment: Any, metadata: dict[int, dict[str, Any]]) -> Check:
    """The token cache of each split is whole, and the one that checkpoints were trained on."""
    from fope_jax.data import manifest as manifests
    from fope_jax.data.config import SPLITS
    from fope_jax.evaluate.run_data import find_run_data, load_run_tokenizer

    if experiment is None:
        return Check("data", f"not looked for without {CONFIG}")
    findings, caches = [], []
    build = f"fope data build --config {run / CONFIG}"
    for split in SPLITS:
        try:
            cache = find_run_data(run, experiment.data).open(split)
            cache.verify()
            _ = cache.tokenizer
            caches.append(cache)
        except (RuntimeError, ValueError, OSError) as error:
            findings.append(Finding(f"{split}: {error}", build))
    if not caches:
        return Check("data", "no sound token cache", findings)
    directory, fingerprint = caches[0].location, caches[0].fingerprint
    for step, stored in metadata.items():
        if stored.get("data") not in (None, fingerprint):
            problem = (
                f"{run / CHECKPOINTS / str(step)}: its data fingerprint is {stored['data']}, that "
                f"of {directory} is {fingerprint}: the text has changed"
            )
            advice = f"bring the text back that it was trained on, then: {build}"
            findings.append(Finding(problem, advice))
    try:
        load_run_tokenizer(run, experiment.data)
    except (RuntimeError, ValueError, OSError) as error:
        findings.append(Finding(str(error), f"copy it back from {directory}"))
    manifest = manifests.read_manifest(directory)
    known = {manifests.MANIFEST, "tokenizer.model", "tokenizer.json"}
    known |= manifests.file_hashes(manifest).keys() if manifest else set()
    if unknown := sorted(list_file_sizes(directory).keys() - known):
        problem = f"{directory}: files that its manifest does not name: {first_few(unknown)}"
        findings.append(Finding(problem, "nothing: they are never read", harmless=True))
    tokens = ", ".join(f"{cache.split} {cache.num_tokens:,} tokens" for cache in caches)
    return Check("data", f"{tokens} in {directory}", findings)


def _check_lineage(run: Path, is_finished: bool) -> Check:
    path = run / LINEAGE
    if not path.exists():
        origin = "imported weights" if _is_imported(run) else "trained from the beginning"
        return Check("lineage", origin)
    try:
        parent = read_json(path).get("parent")
        source = parent.get("run") if isinstance(parent, dict) else None
        if not isinstance(source, str):
            raise ValueError(f"{path} names no run under parent.run")
        has_parent = (as_path(source) / CONFIG).is_file()
    except (ValueError, OSError, ImportError) as error:
        return Check("lineage", "cannot be read", [Finding(str(error), "bring the file back")])
    if has_parent:
        return Check("lineage", f"goes on from {source}")
    problem = f"{path}: its parent {source} is not there"
    advice = "bring it back before `fope extend` goes on; a finished run needs it for the report "
    finding = Finding(problem, advice + "alone", harmless=is_finished)
    return Check("lineage", "the parent is missing", [finding])


def _check_leftovers(run: Path) -> Check:
    """Temporary files and locks of killed processes, and the current writer."""
    directory, owner, findings = run / CHECKPOINTS, lock_owner(run), []
    paths = [*run.iterdir(), *(directory.iterdir() if directory.is_dir() else ())]
    names = sorted(p.name for p in paths if any(mark in p.name for mark in _TEMPORARY))
    if names and owner is None:
        problem = f"{run}: left by a process that was killed: {first_few(names)}"
        advice = "nothing: the next save removes or replaces them"
        findings.append(Finding(problem, advice, harmless=True))
    if owner is None and (run / LOCK).exists():
        problem = f"{run / LOCK}: its owner is gone"
        findings.append(Finding(problem, "nothing: the next run takes it over", harmless=True))
    aside = directory / QUARANTINE
    quarantined = f"{len(list(aside.iterdir()))} in {aside}, " if aside.is_dir() else ""
    return Check("leftovers", f"{quarantined}{owner or 'nobody writes there'}", findings)
