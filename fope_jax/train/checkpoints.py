"""Saves and restores the checkpoints of a training run, and detects lost ones."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fope_jax.config import Experiment, TrainConfig
from fope_jax.evaluate.fingerprint import check_fingerprint
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import DistributedError, is_main_process
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.lock import RunLock
from fope_jax.storage.step_save import StepSave
from fope_jax.train.bad_steps import ADVICE, BadStepError
from fope_jax.train.metrics import MetricsWriter
from fope_jax.train.save_time import describe_grace, format_bytes
from fope_jax.train.state import StatePlan, init_guard_state
from fope_jax.train.step import TrainState, all_finite
from fope_jax.train.workdir import CHECKPOINTS, is_save_row

log = logging.getLogger(__name__)

_WIDENED = (jnp.dtype("bfloat16"), jnp.dtype("float32"))


class CheckpointSaver:
    """Saves the checkpoints of a training, which goes on while they are written.

    All processes call `start` and `finish` at the same steps. A save that fails is reported by the
    next of these calls, with its step; one process alone finds it in `poll` after the next update.

    Args:
      store: of the run's checkpoints.
      writer, lock: of the run directory; None except in the main process.
      config: ``on_save_error`` tells whether to log a save that fails and go on; ``grace_seconds``
        is what the first save is compared with, in the log.
    """

    def __init__(
        self,
        store: CheckpointStore,
        writer: MetricsWriter | None,
        lock: RunLock | None,
        config: TrainConfig,
    ):
        self._store, self._writer, self._lock = store, writer, lock
        self._is_tolerant = config.on_save_error == "continue"
        self._grace_seconds = config.grace_seconds
        self._save: StepSave | None = None
        self._stood_still = 0.0  # seconds of training
        self._is_reported = self._has_measured = False

    def start(
        self,
        step: int,
        state: TrainState,
        constants: Any,
        metadata: dict[str, Any],
        is_ordinary: bool = True,
    ) -> bool:
        """Begins to write a checkpoint, after all metric rows before it; whether it has begun.

        Args:
          metadata: stored with the arrays; the guard's state is added.
          is_ordinary: False for the last checkpoint of a process, which must be written, whatever
            became of the one before.

        Raises:
          BadStepError: a parameter is not finite.
          CheckpointError, OSError, DistributedError: it cannot be written, or an ordinary save
            before it has failed, and that is not tolerated.
          LockError: another process has taken over the run.
        """
        self.finish(may_fail=self._is_tolerant or not is_ordinary)
        began = time.perf_counter()
        if not all_finite(state):
            raise BadStepError(f"a parameter is not finite after step {step}; {ADVICE}")
        with fail_together():
            if self._lock:
                self._lock.check()
        items = {"params": state.params, "constants": constants, "optimizer": state.optimizer}
        guard = [x.item() for x in jax.device_get(tuple(state.guard))]
        try:
            with fail_together():
                if self._writer:
                    self._writer.flush()
            self._save = self._store.start_save(step, items, metadata | {"guard": guard})
        except (CheckpointError, OSError, DistributedError) as error:
            self._note_failure(step, time.perf_counter() - began)
            if not (self._is_tolerant and is_ordinary):
                raise
            self._warn_of_failure(error)
        self._is_reported, self._stood_still = False, time.perf_counter() - began
        return self._save is not None

    def poll(self) -> None:
        """Notes a save that has ended since; does not wait."""
        save = self._save
        if save is None or not save.is_done or self._is_reported:
            return
        if save.error is None:
            self._report(save)
        elif jax.process_count() == 1:
            self.finish(self._is_tolerant)
        else:  # the others do not know it yet
            self._is_reported = True
            log.warning("%s: %s", save.path, save.error)

    def finish(self, may_fail: bool = False) -> bool:
        """Waits until the save under way, if any, is whole; whether it is.

        Raises:
          CheckpointError: it has failed, and not ``may_fail``.
        """
        save, began = self._save, time.perf_counter()
        if save is None:
            return True
        self._save = None
        try:
            self._store.wait()
        except CheckpointError as error:
            self._stood_still += time.perf_counter() - began
            self._note_failure(save.step, self._stood_still)
            if not may_fail:
                raise
            self._warn_of_failure(error)
            return False
        self._stood_still += time.perf_counter() - began
        self._report(save)
        return True

    def close(self) -> None:
        """Waits for what an error has left under way, without the other processes."""
        if self._save is not None:
            self._save.join()
            if self._save.error is None:
                self._report(self._save)

    def _report(self, save: StepSave) -> None:
        if self._is_reported:
            return
        self._is_reported = True
        facts = {"written_seconds": round(save.seconds, 4), "bytes": save.size}
        self._write_row(save.step, self._stood_still, facts | {"processes": jax.process_count()})
        if not self._has_measured and is_main_process():
            log.log(
                logging.WARNING if save.seconds > self._grace_seconds else logging.INFO,
                "checkpoint %d: %s written in %.2f s; training stood still for %.2f s; %s",
                save.step,
                format_bytes(save.size),
                save.seconds,
                self._stood_still,
                describe_grace(save.seconds, self._grace_seconds),
            )
        self._has_measured = True

    def _warn_of_failure(self, error: Exception) -> None:
        goes_on = "training goes on without (train.on_save_error = continue)"
        log.warning("%s; %s", error, goes_on if self._is_tolerant else "a later step is saved now")

    def _note_failure(self, step: int, seconds: float) -> None:
        with contextlib.suppress(OSError):  # the same full disk; the save's error says it
            self._write_row(step, seconds, {"failed": True})

    def _write_row(self, step: int, seconds: float, facts: dict[str, Any]) -> None:
        if self._writer:
            row = {"kind": "time", "phase": "save", "step": step, "seconds": round(seconds, 4)}
            self._writer.write([row | facts])


def restore_checkpoint(
    store: CheckpointStore,
    step: int,
    experiment: Experiment,
    plan: StatePlan,
    data_fingerprint: str,
    accept_position: str | None,
) -> tuple[TrainState, Any, dict[str, Any] | None]:
    """State, constants and unfinished metrics row (``MetricsBuffer.state``) of a checkpoint.

    Raises:
      CheckpointError: its model, position embedding or corpus differs.
    """
    metadata, where = store.metadata(step), store.directory / str(step)
    if metadata["data"] != data_fingerprint:
        raise CheckpointError(
            f"{where}: its data fingerprint is {metadata['data']}, this run's is "
            f"{data_fingerprint}; the data has changed since the checkpoint was written"
        )
    arrays = restore_checked(store, step, experiment, plan, accept_position)
    config = experiment.train
    if config.first_lengths and 0 < step < config.stages[-1].start and "window" not in metadata:
        log.warning(
            "%s was written when each length had an order of its own: the rest of "
            "train.first_lengths is cut from windows of %d tokens, in another order, so that some "
            "of this epoch's text comes again and some does not come",
            where,
            config.length,
        )
    guard = init_guard_state(plan, metadata.get("guard"))
    state = TrainState(arrays["params"], arrays["optimizer"], guard)
    return state, arrays["constants"], metadata.get("row")


def restore_checked(
    store: CheckpointStore,
    step: int,
    experiment: Experiment,
    plan: StatePlan,
    accept_position: str | None,
    with_optimizer: bool = True,
) -> dict[str, Any]:
    """`restore_arrays` after a check; raises CheckpointError if the position embedding differs."""
    metadata, where = store.metadata(step), str(store.directory / str(step))
    position, shape = experiment.position, experiment.model.shape
    # Checked first without constants: with another method, reading would fail on array shapes.
    check_fingerprint(metadata, position, shape, None, where, accept_position)
    arrays = restore_arrays(store, step, plan, with_optimizer)
    check_fingerprint(metadata, position, shape, arrays["constants"], where, accept_position)
    return arrays


def restore_arrays(
    store: CheckpointStore, step: int, plan: StatePlan, with_optimizer: bool = True
) -> dict[str, Any]:
    """Arrays of a checkpoint, sharded as in ``plan``; see ``CheckpointStore.restore``."""
    items = {"params": plan.state.params, "constants": plan.constants}
    if not with_optimizer:
        return store.restore(step, items)
    wanted = plan.state.optimizer  # old checkpoints of bfloat16 parameters have bfloat16 moments
    stored = jax.tree.map(
        lambda old, new: old if (old.dtype, new.dtype) == _WIDENED else new,
        store.with_stored_dtypes(step, "optimizer", wanted),
        wanted,
    )
    arrays = store.restore(step, items | {"optimizer": stored})
    arrays["optimizer"] = jax.tree.map(
        lambda x, leaf: x.astype(leaf.dtype), arrays["optimizer"], wanted
    )
    return arrays


def check_checkpoints_present(workdir: Path, newest_valid: int | None) -> None:
    """Warns if a saved checkpoint is lost; raises CheckpointError if no valid one is left."""
    saved = max(
        (row["step"] for row in read_rows(workdir / METRICS) if is_save_row(row)), default=0
    )
    if newest_valid is None and saved:
        raise CheckpointError(
            f"{workdir} has trained {saved} steps and saved them, but no valid checkpoint is left "
            f"in {workdir / CHECKPOINTS}; bring one back, or move {workdir} away to start over"
        )
    if newest_valid is not None and newest_valid < saved:
        log.warning(
            "checkpoint %d of %s is gone; going on from %d, the newest valid one",
            saved,
            workdir,
            newest_valid,
        )
