"""`fope evaluate`: runs the protocols on one checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from fope_jax.config import (
    Experiment,
    apply_overrides,
    build_experiment,
    differing_values,
    experiment_to_dict,
    split_override,
)
from fope_jax.evaluate.agreement import check_processes_agree
from fope_jax.evaluate.downstream.plan import (
    TaskRequest,
    read_tasks,
    task_protocols,
    without_repeats,
)
from fope_jax.evaluate.generation import Answerer, model_answerer
from fope_jax.evaluate.metrics import (
    METRICS,
    Row,
    non_finite_rows,
    read_rows,
    replace_rows,
    row_ids,
)
from fope_jax.evaluate.progress import Progress, progress_bar
from fope_jax.evaluate.protocol_plan import plan_protocols, unstated_settings
from fope_jax.evaluate.protocols import Protocol
from fope_jax.evaluate.restore import (
    NonFiniteError,
    check_weights,
    find_step,
    load_run,
    read_experiment,
    warn_where_bos_is_unknown,
)
from fope_jax.evaluate.run_data import find_run_data, record_cache_dir, warn_of_another_tokenizer
from fope_jax.evaluate.scoring import Scorer, model_scorer
from fope_jax.evaluate.text_model import RowPrograms, row_programs
from fope_jax.evaluate.variants import Variant, variant_experiment, variant_model
from fope_jax.model.sharding import MeshConfig, make_mesh
from fope_jax.position import fingerprint
from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import is_main_process, reached_preemption, wait_for_processes
from fope_jax.processes.signals import Stopped, is_distributed
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path

CACHE_KEY = "data.cache_dir"
NAMES_SHOWN = 20  # most names of too short documents in a row


def evaluate(
    workdir: str | Path,
    step: int | None = None,
    *,
    protocols: Sequence[str] | None = None,
    mesh: MeshConfig | None = None,
    force: bool = False,
    accept_position: str | None = None,
    overrides: Sequence[str] = (),
    variants: Sequence[Variant] = (),
    tasks: TaskRequest | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Runs protocols on one checkpoint and writes their rows to metrics.jsonl.

    A protocol whose rows for this step and these settings exist is skipped. Rows are written after
    each protocol, so an interrupted evaluation continues where it stopped.

    Args:
      workdir: directory of the run.
      step: of the checkpoint; None takes the newest valid one.
      protocols: names of ``PROTOCOLS`` or "all", in place of the run's ``evaluate.protocols``; none
        with ``tasks``, unless they are named.
      mesh: how devices share the work; None splits windows over all devices (``MeshConfig()``).
      force: whether to score protocols again whose rows exist.
      accept_position: see ``check_fingerprint``.
      overrides: values for the run's ``evaluate`` section, as ``"evaluate.texts=news"``. Rows
        record them; config.json does not change. ``"data.cache_dir=DIR"`` names the place of a
        token cache that was moved; run.json then keeps it.
      variants: other position embeddings to read the checkpoint with, in place of its own; their
        rows stand beside it (``Variant``).
      tasks: downstream tasks; what is written for them is kept in the run's directory "answers".
      progress: called as ``progress(batches, desc=...)``; None shows tqdm bars.
      say: called with one line for each protocol.

    Returns:
      The rows of these protocols at this step in the file, without time rows.

    Raises:
      LockError: another process writes into the run.
      Stopped: one of several processes was asked to stop; rows of finished protocols are kept.
      NonFiniteError: weights or scores are not finite; names arrays or documents.
      ValueError: an override is invalid, or of another section.
    """
    workdir = as_path(workdir)
    progress = _stopping(progress or progress_bar)
    say = say if is_main_process() else lambda line: None
    with fail_together():
        # Before the lock, which would create the directory for a mistyped name.
        experiment, stated = _with_overrides(read_experiment(workdir), overrides)
        data = find_run_data(workdir, experiment.data)
        request_tasks = tasks or TaskRequest()
        if request_tasks.names and protocols is None:
            protocols = ()
        loaded = read_tasks(request_tasks)
    with lock_run(workdir, "evaluate"):
        if "evaluate.add_bos_token" not in stated:
            warn_where_bos_is_unknown(workdir)
        warn_of_another_tokenizer(workdir, experiment.data)
        request = {
            "--step": step,
            "--protocols": protocols,
            "--mesh": str(mesh),
            "--force": force,
            "--accept-position": accept_position,
            "--as": [variant.label for variant in variants],
            "--tasks": [list(request_tasks.names), *(task.settings for task in loaded)],
        }
        check_processes_agree(experiment, request, experiment.evaluate.splits, data)

        # ------------------------------------------------------------ what is missing
        with contextlib.closing(CheckpointStore(workdir / "checkpoints")) as store:
            step = find_step(workdir, store, step)
            if data.fingerprint is None:  # run.json may be lost
                data = dataclasses.replace(data, fingerprint=store.metadata(step)["data"])
            with fail_together():
                unstated = unstated_settings(
                    experiment.evaluate, stated, is_extension=data.is_extension
                )
                subjects = []
                for variant in variants or [Variant("", experiment.position)]:
                    changed = variant_experiment(experiment, variant)
                    planned = []
                    if protocols is None or protocols:
                        planned += plan_protocols(changed, data, protocols, unstated)
                    planned += task_protocols(
                        loaded, request_tasks, changed, data, unstated, variant, workdir, step
                    )
                    planned = [protocol.under(variant) for protocol in without_repeats(planned)]
                    subjects.append(_Subject(variant, changed, planned))
        if CACHE_KEY in stated and is_main_process():
            record_cache_dir(workdir, data)
        path = workdir / METRICS
        rows = read_rows(path)
        planned = [protocol for subject in subjects for protocol in subject.protocols]
        missing = [p for p in planned if force or not _is_done(p, rows, step)]
        for label in [p.label for p in planned if p not in missing]:
            say(f"{label}: rows for step {step} exist in {path}; kept (force scores again)")
        for protocol in missing:
            if changes := _changed_settings(protocol, rows, step):
                say(f"{protocol.label}: its rows for step {step} give way to new ones: {changes}")

        # ------------------------------------------------------------ scored one by one
        if missing:
            started = time.perf_counter()
            has_mesh = mesh is not None or len(jax.devices()) > 1
            devices = make_mesh(mesh or MeshConfig()) if has_mesh else None
            model = load_run(workdir, step, devices, accept_position).model
            check_weights(model, f"{workdir}, step {step}")
            _write_time(path, "evaluate: restore", step, time.perf_counter() - started)
            for subject in subjects:
                wanted = [protocol for protocol in subject.protocols if protocol in missing]
                if not wanted:
                    continue
                changed = variant_model(model, subject.experiment, subject.variant, devices)
                scorer, answerer = model_scorer(changed, devices), model_answerer(changed, devices)
                programs = row_programs(changed, devices)
                for protocol in wanted:
                    reader = answerer if protocol.is_generative else scorer
                    reader = programs if protocol.reads_texts else reader
                    _run_protocol(protocol, reader, subject, step, path, progress, say)
            wait_for_processes("evaluated")
        return [row for row in read_rows(path) if any(p.owns(row, step) for p in planned)]


class _Subject(NamedTuple):
    """What is measured: a position embedding for the checkpoint, and by which protocols."""

    variant: Variant
    experiment: Experiment
    protocols: list[Protocol]


def _with_overrides(
    experiment: Experiment, overrides: Sequence[str]
) -> tuple[Experiment, frozenset[str]]:
    """The experiment with ``overrides``, and the keys that they state."""
    texts = dict(map(split_override, overrides))
    for key, text in texts.items():
        if not key.startswith("evaluate.") and key != CACHE_KEY:
            raise ValueError(
                f"--config.{key}={text}: a trained run keeps its configuration; accepted: "
                "values of its evaluate section, such as --config.evaluate.texts=news, and "
                f"--config.{CACHE_KEY}=DIR where its token cache was moved"
            )
    if overrides:
        values = ConfigDict(experiment_to_dict(experiment))
        experiment = build_experiment(apply_overrides(values, overrides))
    return experiment, frozenset(texts)


def _is_done(protocol: Protocol, rows: Iterable[Row], step: int) -> bool:
    written = [row for row in rows if protocol.owns(row, step)]
    # Earlier versions wrote NaN rows in which every target is a hit.
    return not non_finite_rows(written) and any(
        row["kind"] == "protocol" and row.get("settings") == protocol.settings for row in written
    )


def _changed_settings(protocol: Protocol, rows: Iterable[Row], step: int) -> str:
    """What differs from the rows that are there, which new ones replace; "" without any."""
    written = [row for row in rows if protocol.owns(row, step) and row["kind"] == "protocol"]
    before = written[0].get("settings", {}) if written else protocol.settings
    changes = differing_values(before, protocol.settings)
    return "; ".join(f"{key} {old!r:.60}, now {new!r:.60}" for key, old, new in changes)


def _run_protocol(
    protocol: Protocol,
    reader: Scorer | Answerer | RowPrograms,
    subject: _Subject,
    step: int,
    path: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    started, (variant, experiment, _) = time.perf_counter(), subject
    scores, windows = protocol.run(reader, progress)
    seconds = time.perf_counter() - started
    ids = row_ids(experiment, step)
    rows = [{"kind": protocol.kind, **protocol.row_fields, **ids, **row} for row in scores]
    _check_rows(rows, f"{path.parent}, step {step}: {protocol.label}", experiment.model.dtype)
    summary = {"kind": "protocol", **protocol.row_fields, **ids, "settings": protocol.settings}
    summary["bos"] = protocol.bos
    if variant.label:
        summary["position"] = fingerprint(variant.position, experiment.model.shape)._asdict()
        summary["frequencies"] = variant.text
    message = f"{protocol.label}: scored in {seconds:.1f} s"
    if protocol.bos_token:
        message += f", {protocol.bos}"
    if windows is not None:
        summary["windows"] = len(windows.stop)
        summary["too_short"] = len(windows.too_short)
        summary["too_short_names"] = list(windows.too_short[:NAMES_SHOWN])
        message += f", {len(windows.stop)} windows"
        if windows.too_short:
            message += f"; documents too short for them: {len(windows.too_short)}"
    if is_main_process():
        replace_rows(path, lambda row: protocol.owns(row, step), [*rows, summary])
    _write_time(path, f"evaluate {protocol.label}", step, seconds)
    say(message)


def _check_rows(rows: Iterable[Row], label: str, dtype: str) -> None:
    """Raises NonFiniteError, with contexts and documents, where scores are not finite."""
    names = {}  # an ordered set
    for row in non_finite_rows(rows):
        name = f"context {row['context']}"
        if "document" in row:
            name += f", document {row['document']!r}"
        elif row.get("depth") is not None:
            name += f", depth {row['depth']}"
        names[name] = None
    if names:
        shown, rest = list(names)[:3], len(names) - 3
        raise NonFiniteError(
            f"{label}: scores are not finite at {'; '.join(shown)}"
            f"{f' and {rest} more' if rest > 0 else ''}, though all weights are: activations or "
            f"logits overflow there (model.dtype = {dtype}). Nothing of this protocol was written"
        )


def _write_time(path: Path, phase: str, step: int, seconds: float) -> None:
    if is_main_process():
        key = {"kind": "time", "phase": phase, "step": step}
        row = key | {"seconds": round(seconds, 3)}
        replace_rows(path, lambda old: old.items() >= key.items(), [row])


def _stopping(progress: Progress) -> Progress:
    """``progress`` that raises Stopped in all of several processes after the same batch."""

    def stopping(batches: Iterable[int], **named: Any) -> Iterable[int]:
        for batch in progress(batches, **named):
            if is_distributed() and reached_preemption():
                raise Stopped(signal.SIGTERM, is_in_all_processes=True)
            yield batch

    return stopping
