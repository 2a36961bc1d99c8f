"""How far a run is: its last train row and its newest checkpoint, without checking either."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.doctor.checks import checkpoint_steps, read_lines
from fope_jax.evaluate.metrics import METRICS
from fope_jax.storage.files import read_json, size_and_mtime
from fope_jax.storage.run_paths import (
    CHECKPOINTS,
    CONFIG,
    describe_weights,
    is_of_weights,
    split_step,
)


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
      run: its directory.
      steps: steps that it is to train.
      step: of the last train row; 0 if there is none.
      loss: of that row, nats per token; None where no token of its steps was scored.
      tokens_per_second: of that row, of all devices.
      row_age: seconds since that row, or another one, was written.
      saved: step of the newest complete checkpoint; None if there is none.
      saved_age: seconds since it was complete.
    """

    run: str
    steps: int
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    row_age: float | None = None
    saved: int | None = None
    saved_age: float | None = None

    @property
    def text(self) -> str:
        """One line for people.

        >>> Progress("runs/x", 200, 100, 3.25, 2e6, 12.0, 50, 700.0).text
        'runs/x: step 100 of 200 (50%), loss 3.250, 2,000,000 tokens/s, 12 s ago; \
last checkpoint 50, 12 min ago'
        """
        loss = "none" if self.loss is None else f"{self.loss:.3f}"
        if self.tokens_per_second is None or self.row_age is None:
            line = f"{self.run}: no train row yet, of {self.steps:,} steps"
        else:
            line = (
                f"{self.run}: step {self.step:,} of {self.steps:,} "
                f"({self.step / self.steps:.0%}), loss {loss}, "
                f"{self.tokens_per_second:,.0f} tokens/s, {_age(self.row_age)} ago"
            )
        if self.saved is None or self.saved_age is None:
            return f"{line}; no checkpoint yet"
        return f"{line}; last checkpoint {self.saved:,}, {_age(self.saved_age)} ago"


def _age(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 3 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def read_progress(run: str | Path) -> Progress:
    """Reads the progress of a run, also in a bucket and while it is written.

    Raises:
      FileNotFoundError: it has no config.json, so that it has not begun.
    """
    from fope_jax.storage.checkpoint import MANIFEST

    run, now = split_step(run)[0], time.time()
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run / CONFIG} does not exist: no run has begun there")
    config = read_json(run / CONFIG)
    if is_of_weights(config):
        raise ValueError(describe_weights(run))
    progress = Progress(str(run), config["train"]["steps"])
    if (run / METRICS).exists():
        rows = [line.row for line in read_lines(run / METRICS) if line.is_train and line.row]
        if rows:
            row = max(rows, key=lambda row: row["step"])
            keys = ("step", "loss", "tokens_per_second")
            progress = progress._replace(
                **{key: _number(row.get(key)) for key in keys}, row_age=now - _mtime(run / METRICS)
            )
    for step in reversed(checkpoint_steps(run)):
        manifest = run / CHECKPOINTS / str(step) / MANIFEST
        if manifest.exists():
            return progress._replace(saved=step, saved_age=now - _mtime(manifest))
    return progress


def _number(value: Any) -> Any:
    """A number of a row; None for what is none, or not finite, which no JSON can say."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _mtime(path: Path) -> float:
    """Time of the last change, in seconds since the epoch."""
    return size_and_mtime(path)[1] / 1e9
