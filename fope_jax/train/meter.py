"""Metrics of single steps on the device, turned into rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fope_jax.config import Experiment
from fope_jax.train.bad_steps import BadStep, BadSteps
from fope_jax.train.optim import learning_rate
from fope_jax.train.step import StepMetrics
from fope_jax.typing import Batch


class TimedIterator:
    """Hands on batches and adds up the seconds spent waiting for them in ``waited``."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = iter(batches)
        self.waited = 0.0

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - began


class MetricsBuffer:
    """Collects the metrics of steps on the device and turns them into one row.

    Fetching them every step would make the host wait for the device each time. A checkpoint in the
    middle of a row carries what it has so far, so that the row of a resumed run is the unbroken
    one's.

    Args:
      experiment: of the run.
      seconds_before: the clock of the run at its last row.
      carried: what `carry` gave to the checkpoint that the run goes on from.
    """

    def __init__(
        self, experiment: Experiment, seconds_before: float, carried: Mapping[str, Any] | None
    ):
        self._config = experiment.train
        self._pending: list[StepMetrics] = []
        carried = carried or {"steps": [], "seconds": 0.0, "waited": 0.0, "skipped": 0, "bad": []}
        self._steps = np.array(carried["steps"], np.float64).reshape(-1, 4)
        self._bad = BadSteps(
            self._config, carried["skipped"], [BadStep(*bad) for bad in carried["bad"]]
        )
        self._seconds, self._waited = carried["seconds"], carried["waited"]  # of the row, before
        self._waiting_began, self._began = 0.0, time.perf_counter()
        self._run_began = self._began - seconds_before - self._seconds

    def add(self, metrics: StepMetrics) -> None:
        """Remembers the metrics of one more step, without fetching them."""
        self._pending.append(metrics)

    def restart(self, batches: TimedIterator) -> None:
        """Goes on with the clock now: what came before, such as a save, is not training."""
        self._waiting_began, self._began = batches.waited, time.perf_counter()

    def fetch(self, step: int, batches: TimedIterator) -> tuple[float, float]:
        """Waits for the steps up to ``step`` and looks at their losses and gradients.

        Returns:
          Seconds since the last call or `restart`: waiting for data, and all others.

        Raises:
          BadStepError: one of them ends the run; the message names it.
        """
        new = np.asarray(jax.device_get(self._pending), np.float64).reshape(-1, 4)
        elapsed = time.perf_counter() - self._began
        waited = batches.waited - self._waiting_began
        self._pending = []
        self.restart(batches)
        first = step - len(new) + 1
        for number, (nats, tokens, norm, skipped) in enumerate(new, start=first):
            loss = float(nats / tokens) if tokens else float("nan")
            self._bad.see(number, loss, float(norm), bool(skipped))
        self._steps = np.concatenate([self._steps, new])
        self._seconds += elapsed
        self._waited += waited
        return waited, elapsed - waited

    def carry(self) -> dict[str, Any]:
        """What a checkpoint keeps of the row that is under way, as JSON values; after `fetch`."""
        return {
            "steps": self._steps.tolist(),
            "seconds": self._seconds,
            "waited": self._waited,
            "skipped": self._bad.total,
            "bad": [list(bad) for bad in self._bad.in_a_row],
        }

    def row(self, step: int) -> dict[str, Any]:
        """The train row of the steps since the last row, of which ``step`` is the newest.

        After `fetch`. Sums and ``grad_norm``, a mean, are over the steps that were not skipped; of
        a row with none the loss is nan. ``learning_rate`` is that of the newest.
        """
        config, positions = self._config, len(self._steps) * self._config.batch_size
        good = self._steps[self._steps[:, 3] == 0]
        nats, tokens, norms, _ = good.T
        behind = self._bad.total - int(self._steps[-1, 3])  # updates that were not made before it
        total = float(tokens.sum())
        row = {
            "kind": "train",
            "step": step,
            "tokens_seen": step * config.batch_size * config.length,
            "nats": float(nats.sum()),
            "tokens": total,
            "loss": float(nats.sum() / total) if total else float("nan"),
            "grad_norm": float(norms.mean()) if len(good) else float("nan"),
            "learning_rate": float(learning_rate(config, step - 1 - behind)),
            "tokens_per_second": positions * config.length / self._seconds,
            "data_wait_fraction": self._waited / self._seconds,
            "seconds": self._began - self._run_began,
        }
        if config.on_bad_step == "skip":
            row["skipped"] = len(self._steps) - len(good)
        self._steps, self._seconds, self._waited = self._steps[:0], 0.0, 0.0
        return row
