"""When a checkpoint is written, what goes into it, and whether those that were are still there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from fope_jax.config import TrainConfig
from fope_jax.evaluate.metrics import METRICS, read_rows
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.lock import RunLock
from fope_jax.train.bad_steps import ADVICE, BadStepError
from fope_jax.train.metrics import MetricsWriter
from fope_jax.train.step import TrainState, all_finite
from fope_jax.train.workdir import CHECKPOINTS

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run.

    Args:
      store: where.
      config: says what becomes of a run whose checkpoint cannot be written.
      identity: what the metadata of every checkpoint says.
      lock: of the run directory, in the process that has it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: TrainConfig,
        identity: dict[str, Any],
        lock: RunLock | None,
    ):
        self._store, self._identity, self._lock = store, identity, lock
        # The processes of one run would have to agree on what could be written.
        self.tolerant = config.on_save_error == "continue" and jax.process_count() == 1

    def save(
        self,
        step: int,
        state: TrainState,
        constants: Any,
        carried: dict[str, Any],
        metrics_log: MetricsWriter | None,
        last: bool,
    ) -> bool:
        """Writes one checkpoint, after every row that came before it.

        Args:
          step: updates done.
          state, constants: its arrays.
          carried: of the row that is under way, from `MetricsBuffer.carry`.
          metrics_log: in the process that has it.
          last: this process will write no other, so this one must be written.

        Returns:
          Whether it has been written; False where the run goes on without it.

        Raises:
          BadStepError: a parameter is not finite.
          CheckpointError, OSError: it cannot be written, and the run must not go on without.
          LockError: another process has taken the run over.
        """
        if not all_finite(state):
            raise BadStepError(f"a parameter is not finite after step {step}; {ADVICE}")
        if self._lock:
            self._lock.check()
        items = {"params": state.params, "constants": constants, "optimizer": state.optimizer}
        means = [x.item() for x in jax.device_get(tuple(state.guard))]
        metadata = self._identity | {"row": carried, "guard": means}
        try:
            if metrics_log:
                metrics_log.flush()
            self._store.save(step, items, metadata)
        except (CheckpointError, OSError) as error:
            if not self.tolerant or last:
                raise
            log.warning("%s; training goes on without (train.on_save_error = continue)", error)
            return False
        return True


def check_checkpoints_present(workdir: Path, found: int | None) -> None:
    """Compares the newest valid checkpoint with the newest one that was ever written.

    Warns where an older one is left.

    Raises:
      CheckpointError: none is left; beginning again from nothing would throw the run away.
    """
    rows = read_rows(workdir / METRICS)
    saved = [r["step"] for r in rows if (r.get("kind"), r.get("phase")) == ("time", "save")]
    newest = max(saved, default=0)
    if found is None and newest:
        raise CheckpointError(
            f"{workdir} has trained {newest} steps and saved them, but no valid checkpoint is left "
            f"in {workdir / CHECKPOINTS}; bring one back, or move {workdir} away to start over"
        )
    if found is not None and found < newest:
        log.warning(
            "checkpoint %d of %s is gone; going on from %d, the newest valid one",
            newest,
            workdir,
            found,
        )
