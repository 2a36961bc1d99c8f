"""Saves and restores the checkpoints of a training run, and detects lost ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fope_jax.config import Experiment
from fope_jax.evaluate.fingerprint import check_fingerprint
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.lock import RunLock
from fope_jax.train.bad_steps import ADVICE, BadStepError
from fope_jax.train.metrics import MetricsWriter
from fope_jax.train.state import StatePlan, init_guard_state
from fope_jax.train.step import TrainState, all_finite
from fope_jax.train.workdir import CHECKPOINTS, is_save_row

log = logging.getLogger(__name__)

_WIDENED = (jnp.dtype("bfloat16"), jnp.dtype("float32"))


def save_checkpoint(
    store: CheckpointStore,
    step: int,
    state: TrainState,
    constants: Any,
    metadata: dict[str, Any],
    *,
    writer: MetricsWriter | None,
    lock: RunLock | None,
    may_fail: bool,
) -> bool:
    """Writes a checkpoint, after all metric rows before it; returns whether it was written.

    Args:
      metadata: stored with the arrays; the guard's state is added.
      writer, lock: of the run directory; None except in the main process.
      may_fail: log a failed write and return False instead of raising.

    Raises:
      BadStepError: a parameter is not finite.
      CheckpointError, OSError: the write failed and ``may_fail`` is False.
      LockError: another process has taken over the run.
    """
    if not all_finite(state):
        raise BadStepError(f"a parameter is not finite after step {step}; {ADVICE}")
    if lock:
        lock.check()
    items = {"params": state.params, "constants": constants, "optimizer": state.optimizer}
    guard = [x.item() for x in jax.device_get(tuple(state.guard))]
    try:
        if writer:
            writer.flush()
        store.save(step, items, metadata | {"guard": guard})
    except (CheckpointError, OSError) as error:
        if not may_fail:
            raise
        log.warning("%s; training goes on without (train.on_save_error = continue)", error)
        return False
    return True


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
