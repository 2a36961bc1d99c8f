"""Is a run sound, and what is to be done where it is not: `fope doctor`.

Looks at everything a run consists of, changes nothing, and goes on after each finding. `repair` is
a second, explicit step: it moves and copies, and deletes nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data import manifest as manifests
from fope_jax.data.manifest import CacheError
from fope_jax.evaluate.metrics import METRICS
from fope_jax.files import as_path, in_bucket, list_tree, read_json, write_text

CONFIG, RUN, LINEAGE, CHECKPOINTS = "config.json", "run.json", "lineage.json", "checkpoints"
QUARANTINE, LOCK = "quarantine", "run.lock"
_TEMPORARY = (".orbax-checkpoint-tmp", ".tmp")
_SHOWN = 5
_REPAIR = "fope doctor {run} --repair"


class Finding(NamedTuple):
    """One thing that is not as it should be.

    Attributes:
      problem: what, with the file.
      advice: what to do, with the command.
      harmless: the next `fope train` or a reader copes with it by itself.
    """

    problem: str
    advice: str
    harmless: bool = False


class Check(NamedTuple):
    """One part of a run: what it is called, what was seen, and what is wrong with it."""

    name: str
    summary: str
    findings: tuple[Finding, ...] = ()


class Due(NamedTuple):
    """Where a run's train rows end: after so many updates, at saves, and at the ends of stages."""

    log_every: int
    save_every: int
    stops: tuple[int, ...]

    def after(self, step: int) -> int | None:
        """The step of the row that follows one of ``step``; None after the last.

        >>> due = Due(log_every=3, save_every=4, stops=(5, 10))
        >>> [due.after(step) for step in (0, 3, 4, 5, 9, 10)]
        [3, 4, 5, 6, 10, None]
        """
        if step >= self.stops[-1]:
            return None
        ends = [stop for stop in self.stops if stop > step]
        return min(*(step - step % n + n for n in (self.log_every, self.save_every)), *ends)


# ---------------------------------------------------------------------------- the checks


def examine(run: str | Path) -> list[Check]:
    """Everything that can be found out about a run without a device.

    Reads all of its checkpoints and of its token cache.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    run = as_path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist; name the --workdir of `fope train`")
    config, experiment = _check_config(run)
    checkpoints, metadata = _check_checkpoints(run, experiment)
    newest = max(metadata, default=None)
    due = None
    if experiment is not None:
        train = experiment.train
        stops = tuple(stage.stop for stage in train.stages)
        due = Due(train.log_every, train.save_every, stops)
    done = due is not None and newest is not None and newest >= due.stops[-1]
    return [
        config,
        checkpoints,
        check_metrics(run, due, newest),
        _check_data(run, experiment, metadata),
        _check_lineage(run, done),
        _check_leftovers(run),
    ]


def _check_config(run: Path) -> tuple[Check, Any]:
    from fope_jax.config import build_experiment

    path, name = run / CONFIG, "config"
    if not path.is_file():
        advice = f"name a --workdir, or bring {CONFIG} back: fope train --config CONFIG makes it"
        return Check(name, "missing", (Finding(f"{path} does not exist", advice),)), None
    try:
        experiment = build_experiment(read_json(path))
    except ValueError as error:
        told = str(error) if str(path) in str(error) else f"{path}: {error}"
        advice = "bring the file back, or put the value right"
        return Check(name, "cannot be built", (Finding(told, advice),)), None
    findings = []
    try:
        read_json(run / RUN) if (run / RUN).exists() else None
    except ValueError as error:
        findings.append(Finding(str(error), f"move it away: mv {run / RUN} {run / RUN}.bak"))
    summary = f"{experiment.name}, seed {experiment.seed}, {experiment.train.steps:,} steps"
    return Check(name, summary, tuple(findings)), experiment


def _check_checkpoints(run: Path, experiment: Any) -> tuple[Check, dict[int, dict[str, Any]]]:
    """The check, and what each sound checkpoint says of itself."""
    from fope_jax.checkpoint import MANIFEST, CheckpointError, CheckpointStore
    from fope_jax.evaluate.identity import check_fingerprint

    sound: dict[int, dict[str, Any]] = {}
    findings = []
    store = CheckpointStore(run / CHECKPOINTS)
    for step in _steps(run):
        where = run / CHECKPOINTS / str(step)
        try:
            sound[step] = store.metadata(step)
        except CheckpointError as error:
            under_way = lock_owner(run) is not None and not (where / MANIFEST).exists()
            findings.append(Finding(str(error), _REPAIR.format(run=run), under_way))
            continue
        if experiment is not None:
            try:
                check_fingerprint(
                    sound[step], experiment.position, experiment.model.shape, None, str(where)
                )
            except CheckpointError as error:
                findings.append(Finding(str(error), f"bring the run's own {CONFIG} back"))
    store.close()
    if len(hashes_of := {one.get("position") for one in sound.values()}) > 1:
        told = ", ".join(map(str, sorted(map(str, hashes_of))))
        findings.append(
            Finding(
                f"{run / CHECKPOINTS}: checkpoints of several position embeddings, {told}",
                "move those of other runs away",
            )
        )
    if findings and not sound:
        advice = "bring one back from a copy: without one the run cannot go on"
        findings = [finding._replace(advice=advice) for finding in findings]
    summary = f"{len(sound)} sound ({_some(sorted(sound))})" if sound else "none that is sound"
    return Check("checkpoints", summary, tuple(findings)), sound


def check_metrics(run: Path, due: Due | None, newest: int | None) -> Check:
    """The rows of metrics.jsonl: whole, finite, each step once, none left out.

    Args:
      run: the directory.
      due: where train rows end; None does not look for rows that were left out.
      newest: step of the newest sound checkpoint.
    """
    path = run / METRICS
    if not path.exists():
        findings = () if not newest else (Finding(f"{path} does not exist", "bring it back"),)
        return Check("metrics", "no rows", findings)
    findings = []

    def add(problem: str, advice: str, harmless: bool = False) -> None:
        findings.append(Finding(f"{path}: {problem}", advice, harmless))

    lines = list(_lines(path))
    repair = _REPAIR.format(run=run)
    bad = [line.number for line in lines if line.row is None and line.whole]
    if bad:
        add(f"no JSON object in line {_some(bad)}", repair)
    if lines and lines[-1].row is None and not lines[-1].whole:
        add(f"line {lines[-1].number} was cut off", "nothing: the next row replaces it", True)
    rows = [line.row for line in lines if line.row is not None]
    numbers = [(line.number, k) for line in lines for k in _not_finite(line.row or {})]
    if numbers:
        named = [f"{number} ({key})" for number, key in numbers]
        add(f"numbers that are not finite in line {_some(named)}", "lower train.learning_rate")
    steps = [row["step"] for row in rows if _is_train(row)]
    twice = sorted(step for step, count in Counter(steps).items() if count > 1)
    if twice:
        add(f"several train rows of step {_some(twice)}", repair)
    back = [b for a, b in itertools.pairwise(steps) if b < a]
    if back:
        add(f"train rows out of order at step {_some(back)}", repair)
    if due is not None:
        _add_missing(add, sorted(set(steps)), due, newest or 0)
    later = sorted({step for row in rows if (step := _step(row)) > (newest or 0)})
    if later:
        saved = f"the newest checkpoint, {newest}" if newest else "any checkpoint"
        told = f"rows of steps beyond {saved}: {_some(later)}"
        add(told, "nothing: training again writes them again", harmless=True)
    summary = f"{len(rows):,} rows" + (f", train rows to step {max(steps):,}" if steps else "")
    return Check("metrics", summary, tuple(findings))


def _add_missing(add: Callable[..., None], steps: list[int], due: Due, newest: int) -> None:
    """Adds a finding where a train row is missing up to the newest checkpoint."""
    missing = []
    for before, step in itertools.pairwise([0, *steps]):
        expected = due.after(before)
        if expected is not None and step > expected:
            missing.append(f"after step {before}")
    last = steps[-1] if steps else 0
    if last < newest:
        missing.append(f"from step {last} to the checkpoint {newest}")
    if missing:
        add(
            f"train rows are missing {_some(missing)} (one every {due.log_every} steps)",
            "bring the file back from a copy; nothing else has these numbers. Where train.log_every"
            " was larger then, nothing is missing",
        )


def _check_data(run: Path, experiment: Any, metadata: dict[int, dict[str, Any]]) -> Check:
    from fope_jax.data.cache import open_cache
    from fope_jax.data.config import SPLITS

    if experiment is None:
        return Check("data", f"not looked for without {CONFIG}")
    findings, caches = [], []
    build = f"fope data build --config {run / CONFIG}"
    for split in SPLITS:
        try:
            cache = open_cache(experiment.data, split)
            cache.verify()
            caches.append(cache)
        except (CacheError, OSError) as error:
            findings.append(Finding(f"{split}: {error}", build))
    if not caches:
        return Check("data", "no sound token cache", tuple(findings))
    cache = caches[0]
    for step, stored in metadata.items():
        own = stored.get("data")
        if own is not None and own != cache.fingerprint:
            findings.append(
                Finding(
                    f"{run / CHECKPOINTS / str(step)}: its data fingerprint is {own}, that of"
                    f" {cache.directory} is {cache.fingerprint}: the text has changed",
                    f"bring the text back that it was trained on, then: {build}",
                )
            )
    strange = _unlisted(cache.directory)
    if strange:
        problem = f"{cache.directory}: files that its manifest does not name: {_some(strange)}"
        findings.append(Finding(problem, "nothing: they are never read", True))
    told = ", ".join(f"{one.split} {one.num_tokens:,} tokens" for one in caches)
    return Check("data", f"{told} in {cache.directory}", tuple(findings))


def _unlisted(directory: Path) -> list[str]:
    """Files of a cache that nothing reads."""
    manifest = manifests.read_manifest(directory)
    named = manifests.hashes(manifest) if manifest else {}
    known = {manifests.MANIFEST, "tokenizer.model", "tokenizer.json", *named}
    return sorted(list_tree(directory).keys() - known)


def _check_lineage(run: Path, done: bool) -> Check:
    path = run / LINEAGE
    if not path.exists():
        return Check("lineage", "trained from the beginning")
    try:
        parent = read_json(path).get("parent")
        source = parent.get("run") if isinstance(parent, dict) else None
        if not isinstance(source, str):
            raise ValueError(f"{path} names no run under parent.run")
        there = (as_path(source) / CONFIG).is_file()
    except (ValueError, OSError, ImportError) as error:
        return Check("lineage", "cannot be read", (Finding(str(error), "bring the file back"),))
    if there:
        return Check("lineage", f"goes on from {source}")
    finding = Finding(
        f"{path}: its parent {source} is not there",
        "bring it back before `fope extend` goes on; a finished run needs it for the report alone",
        harmless=done,
    )
    return Check("lineage", "the parent is missing", (finding,))


def _check_leftovers(run: Path) -> Check:
    directory, owner, found = run / CHECKPOINTS, lock_owner(run), []
    entries = [*run.iterdir(), *(directory.iterdir() if directory.is_dir() else ())]
    temporary = sorted(p.name for p in entries if any(mark in p.name for mark in _TEMPORARY))
    if temporary and owner is None:
        problem = f"{run}: left by a process that was killed: {_some(temporary)}"
        found.append(Finding(problem, "nothing: the next save removes or replaces them", True))
    if owner is None and (run / LOCK).exists():
        problem = f"{run / LOCK}: its owner is gone"
        found.append(Finding(problem, "nothing: the next run takes it over", True))
    aside = directory / QUARANTINE
    quarantined = f"{len(list(aside.iterdir()))} in {aside}, " if aside.is_dir() else ""
    return Check("leftovers", f"{quarantined}{owner or 'nobody writes there'}", tuple(found))


def lock_owner(run: Path) -> str | None:
    """Who writes into a run directory now, as far as can be told from here; None where nobody."""
    path = run / LOCK
    try:
        owner = read_json(path) if path.exists() else {}
    except ValueError:
        return None
    host, pid = owner.get("host"), owner.get("pid")
    if not isinstance(host, str) or not isinstance(pid, int) or pid < 1:
        return None
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return None
        except PermissionError:
            pass  # it is there, and another user's
    return f"written by host {host}, pid {pid}"


# ---------------------------------------------------------------------------- rows


class _Line(NamedTuple):
    """A line of a file: its number, its object or None, and whether it has an end."""

    number: int
    row: dict[str, Any] | None
    whole: bool
    text: bytes


def _lines(path: Path) -> Iterator[_Line]:
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        yield _Line(number, row if isinstance(row, dict) else None, text.endswith(b"\n"), text)


def _step(row: dict[str, Any]) -> int:
    """The step of a row; -1 where it has none."""
    step = row.get("step")
    return step if isinstance(step, int) else -1


def _is_train(row: dict[str, Any]) -> bool:
    return row.get("kind") == "train" and _step(row) >= 0


def _not_finite(row: dict[str, Any]) -> list[str]:
    return [key for key, x in row.items() if isinstance(x, float) and not math.isfinite(x)]


def _some(values: Iterable[Any]) -> str:
    values = list(values)
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more


def _steps(run: Path) -> list[int]:
    directory = run / CHECKPOINTS
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())
    return sorted(int(path.name) for path in found)


# ---------------------------------------------------------------------------- repair


def repair(run: str | Path) -> list[str]:
    """Moves damaged checkpoints to the quarantine, and writes metrics.jsonl without what is wrong.

    Nothing is deleted: the metrics are copied to ``metrics.jsonl.bak-N`` first. Of several train
    rows of one step the last stays.

    Returns:
      A line for each thing done.

    Raises:
      ValueError: a process writes into the run, or it is in a bucket.
    """
    run = as_path(run)
    if in_bucket(run):
        raise ValueError(f"{run} is in a bucket: repair a copy on this machine and upload it")
    owner = lock_owner(run)
    if owner is not None:
        raise ValueError(f"{run} is {owner}: stop that process before --repair")
    return [*_set_aside(run), *_rewrite_metrics(run)]


def _set_aside(run: Path) -> Iterator[str]:
    from fope_jax.checkpoint import CheckpointError, CheckpointStore

    store = CheckpointStore(run / CHECKPOINTS)
    for step in _steps(run):
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
    lines = list(_lines(path)) if path.exists() else []
    last = {line.row["step"]: line.number for line in lines if line.row and _is_train(line.row)}
    kept = [
        line
        for line in lines
        if line.row and (not _is_train(line.row) or last[line.row["step"]] == line.number)
    ]
    train = iter(sorted((x for x in kept if _is_train(x.row or {})), key=lambda x: x.row["step"]))
    ordered = [next(train) if _is_train(line.row or {}) else line for line in kept]
    if [line.number for line in ordered] == [line.number for line in lines]:
        return
    copy = _free(path.with_name(f"{path.name}.bak"), "-", first=1)
    shutil.copy2(path, copy)
    write_text(path, "".join(json.dumps(line.row) + "\n" for line in ordered))
    dropped = len(lines) - len(ordered)
    yield f"copied {path} to {copy}; {dropped} of {len(lines)} lines are left out of it now"


def _free(path: Path, mark: str, first: int = 0) -> Path:
    """``path``, or with a number after it, under a name that nothing has."""
    names = (path.with_name(f"{path.name}{mark}{n}" if n else path.name)
             for n in itertools.count(first))  # fmt: skip
    return next(name for name in names if not name.exists())


# ---------------------------------------------------------------------------- for people


def exit_code(checks: Iterable[Check]) -> int:
    """0 where a run is sound, 1 where it is not; what is harmless does not count."""
    return int(any(not finding.harmless for check in checks for finding in check.findings))


def text(run: str | Path, checks: Iterable[Check]) -> str:
    """A table of the checks, and below it what was found with what to do."""
    checks = list(checks)
    lines = [str(run)]
    for check in checks:
        problems = [finding for finding in check.findings if not finding.harmless]
        state = "PROBLEM" if problems else ("note" if check.findings else "sound")
        lines.append(f"  {check.name:<12} {state:<8} {check.summary}")
    findings = [finding for check in checks for finding in check.findings]
    for finding in sorted(findings, key=lambda finding: finding.harmless):
        mark = "note" if finding.harmless else "PROBLEM"
        lines += [f"{mark}: {finding.problem}", f"  do: {finding.advice}"]
    return "\n".join(lines)


def as_json(run: str | Path, checks: Iterable[Check]) -> dict[str, Any]:
    """The same for programs."""
    described = [
        {"name": c.name, "summary": c.summary, "findings": [f._asdict() for f in c.findings]}
        for c in checks
    ]
    return {"run": str(run), "exit_code": exit_code(checks), "checks": described}
