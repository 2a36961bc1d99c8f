"""Everything that a run consists of, looked at one after the other; nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fope_jax.data import manifest as manifests
from fope_jax.doctor.findings import Check, Finding, some
from fope_jax.doctor.rows import Due, check_metrics
from fope_jax.storage.directories import list_file_sizes
from fope_jax.storage.files import read_json
from fope_jax.storage.lock import LOCK, is_owner_alive, read_lock_owner
from fope_jax.storage.paths import as_path

CONFIG, RUN, LINEAGE, CHECKPOINTS = "config.json", "run.json", "lineage.json", "checkpoints"
IMPORTED = "imported"  # the key that run.json has where `fope import` made the run
QUARANTINE = "quarantine"
_TEMPORARY = (".orbax-checkpoint-tmp", ".tmp")


def examine(run: str | Path) -> list[Check]:
    """Everything that can be found out about a run without a device.

    Reads all of its checkpoints and of its token cache.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    run = as_path(run)
    if not run.is_dir():
        what = "is no directory" if run.exists() else "does not exist"
        raise FileNotFoundError(f"{run} {what}; name the --workdir of `fope train`")
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
        check_metrics(run, due, newest, _is_imported(run)),
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


def _is_imported(run: Path) -> bool:
    try:
        return IMPORTED in read_json(run / RUN)
    except (ValueError, OSError, ImportError):  # `_check_config` says what is wrong with it
        return False


def _check_checkpoints(run: Path, experiment: Any) -> tuple[Check, dict[int, dict[str, Any]]]:
    """The check, and what each sound checkpoint says of itself."""
    from fope_jax.evaluate.fingerprint import check_fingerprint
    from fope_jax.storage.checkpoint import MANIFEST, CheckpointError, CheckpointStore

    sound: dict[int, dict[str, Any]] = {}
    findings = []
    store = CheckpointStore(run / CHECKPOINTS)
    for step in steps_of(run):
        where = run / CHECKPOINTS / str(step)
        try:
            sound[step] = store.metadata(step)
        except CheckpointError as error:
            under_way = lock_owner(run) is not None and not (where / MANIFEST).exists()
            findings.append(Finding(str(error), f"fope doctor {run} --repair", under_way))
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
    summary = f"{len(sound)} sound ({some(sorted(sound))})" if sound else "none that is sound"
    return Check("checkpoints", summary, tuple(findings)), sound


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
            _ = cache.tokenizer
            caches.append(cache)
        except (RuntimeError, ValueError, OSError) as error:  # of cache, mirror and tokenizer
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
        problem = f"{cache.directory}: files that its manifest does not name: {some(strange)}"
        findings.append(Finding(problem, "nothing: they are never read", True))
    told = ", ".join(f"{one.split} {one.num_tokens:,} tokens" for one in caches)
    return Check("data", f"{told} in {cache.directory}", tuple(findings))


def _unlisted(directory: Path) -> list[str]:
    """Files of a cache that nothing reads."""
    manifest = manifests.read_manifest(directory)
    named = manifests.file_hashes(manifest) if manifest else {}
    known = {manifests.MANIFEST, "tokenizer.model", "tokenizer.json", *named}
    return sorted(list_file_sizes(directory).keys() - known)


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
        problem = f"{run}: left by a process that was killed: {some(temporary)}"
        found.append(Finding(problem, "nothing: the next save removes or replaces them", True))
    if owner is None and (run / LOCK).exists():
        problem = f"{run / LOCK}: its owner is gone"
        found.append(Finding(problem, "nothing: the next run takes it over", True))
    aside = directory / QUARANTINE
    quarantined = f"{len(list(aside.iterdir()))} in {aside}, " if aside.is_dir() else ""
    return Check("leftovers", f"{quarantined}{owner or 'nobody writes there'}", tuple(found))


def lock_owner(run: Path) -> str | None:
    """Who writes into a run directory now, as far as can be told from here; None where nobody."""
    owner = read_lock_owner(run)
    return f"written by {owner.text}" if owner is not None and is_owner_alive(owner) else None


def steps_of(run: Path) -> list[int]:
    """Steps whose checkpoints have a directory."""
    directory = run / CHECKPOINTS
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())
    return sorted(int(path.name) for path in found)
