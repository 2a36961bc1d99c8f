"""The metrics of a run: rows in metrics.jsonl, and curves in TensorBoard and a tracker."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fope_jax.config import Experiment
from fope_jax.evaluate.metrics import METRICS
from fope_jax.evaluate.validation import VALIDATION
from fope_jax.extras import require
from fope_jax.storage.files import open_line_writer
from fope_jax.storage.paths import is_in_bucket
from fope_jax.train.bad_steps import BadStep, BadStepCounter
from fope_jax.train.optim import learning_rate
from fope_jax.train.step import StepMetrics
from fope_jax.train.tracker import SafeTracker
from fope_jax.typing import Batch

log = logging.getLogger(__name__)


class MetricsBuffer:
    """Collects step metrics on the device, without waiting for it, and turns them into rows.

    Args:
      experiment: the experiment of the run.
      seconds_before: by the clock of the run up to the last row, with its saves and evaluations.
      saved: `state` from the checkpoint that the run resumes from, if any.
    """

    def __init__(
        self, experiment: Experiment, seconds_before: float, saved: Mapping[str, Any] | None
    ):
        self._config = experiment.train
        self._on_device: list[StepMetrics] = []
        saved = saved or {"steps": [], "seconds": 0.0, "waited": 0.0, "skipped": 0, "bad": []}
        self._steps = np.array(saved["steps"], np.float64).reshape(-1, 4)
        bad_steps = [BadStep(*bad) for bad in saved["bad"]]
        self._bad_steps = BadStepCounter(self._config, saved["skipped"], bad_steps)
        self._seconds, self._waited = saved["seconds"], saved["waited"]  # in this row
        self.restart_clock()
        self._run_began = self._began - seconds_before - self._seconds

    def add(self, metrics: StepMetrics) -> None:
        self._on_device.append(metrics)

    def restart_clock(self) -> None:
        """Restarts the clock, to exclude time that is not training, such as a save."""
        self._waited_now, self._began = 0.0, time.perf_counter()

    def time_waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields ``batches`` and measures the time spent waiting for them."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited_now += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def fetch(self, step: int) -> tuple[float, float]:
        """Waits for the steps up to ``step``; raises BadStepError if a bad one ends the run.

        Returns:
          Seconds since the last call or `restart_clock`: waiting for data, and the rest.
        """
        new = np.asarray(jax.device_get(self._on_device), np.float64).reshape(-1, 4)
        elapsed, waited = time.perf_counter() - self._began, self._waited_now
        self._on_device = []
        self.restart_clock()
        for number, (nats, tokens, norm, skipped) in enumerate(new, start=step - len(new) + 1):
            loss = float(nats / (tokens or 1.0))  # 0 of a batch without a scored token
            self._bad_steps.record(number, loss, float(norm), bool(skipped))
        self._steps = np.concatenate([self._steps, new])
        self._seconds += elapsed
        self._waited += waited
        return waited, elapsed - waited

    def state(self) -> dict[str, Any]:
        """The unfinished row as JSON values, so that a resumed run writes the same rows."""
        return {
            "steps": self._steps.tolist(),
            "seconds": self._seconds,
            "waited": self._waited,
            "skipped": self._bad_steps.total,
            "bad": [list(bad) for bad in self._bad_steps.in_a_row],
        }

    def take_row(self, step: int) -> dict[str, Any]:
        """The train row of the steps since the last row, without skipped ones; `fetch` first.

        Without a scored token in any of them ``loss`` and ``grad_norm`` are None, and NaN if all
        were skipped.
        """
        config, sequences = self._config, len(self._steps) * self._config.batch_size
        good = self._steps[self._steps[:, 3] == 0]
        scored = good[good[:, 1] != 0]  # a norm of 0 would lower the mean
        nats, tokens, norms, _ = scored.T
        unknown = None if len(good) else float("nan")
        skipped_before = self._bad_steps.total - int(self._steps[-1, 3])
        total = float(tokens.sum())
        row = {
            "kind": "train",
            "step": step,
            "tokens_seen": step * config.batch_size * config.length,
            "nats": float(nats.sum()),
            "tokens": total,
            "loss": float(nats.sum() / total) if len(scored) else unknown,
            "grad_norm": float(norms.mean()) if len(scored) else unknown,
            "learning_rate": float(learning_rate(config, step - 1 - skipped_before)),
            "tokens_per_second": sequences * config.length / self._seconds,
            "data_wait_fraction": self._waited / self._seconds,
            "seconds": self._began - self._run_began,
        }
        if config.on_bad_step == "skip":
            row["skipped"] = len(self._steps) - len(good)
        self._steps, self._seconds, self._waited = self._steps[:0], 0.0, 0.0
        return row


def curve_points(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of rows of one step, by the names of their curves; a None is in no curve.

    >>> train = {"kind": "train", "step": 3, "loss": 2.5}
    >>> scored = {"kind": "validation", "split": "validation", "context": 64}
    >>> curve_points([train, scored | {"nats": 6.0, "tokens": 2}])
    {'train/loss': 2.5, 'validation/loss_64': 3.0}
    """
    points: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "train":
            numbers = {key: x for key, x in row.items() if key not in ("kind", "step")}
            points |= {f"train/{key}": x for key, x in numbers.items() if x is not None}
        elif row["kind"] == VALIDATION and row["tokens"]:
            split = "" if row["split"] == "validation" else f"{row['split']}_"
            points[f"validation/{split}loss_{row['context']}"] = row["nats"] / row["tokens"]
    return points


class MetricsWriter:
    """Appends rows to ``workdir/metrics.jsonl``; their numbers go to TensorBoard and a tracker.

    Args:
      workdir: directory of the run; in a bucket, where files cannot grow, without TensorBoard.
      start_step: updates done before.
      is_tolerant: keep a row that cannot be written and retry later; `flush` still raises.
      tracker: takes the numbers too, see ``train.tracker``; closed at the end.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        is_tolerant: bool = False,
        tracker: SafeTracker | None = None,
    ):
        self._is_tolerant, self._tracker = is_tolerant, tracker
        self._lines = open_line_writer(workdir / METRICS)
        self._tensorboard = None
        if is_in_bucket(workdir):
            log.info("no TensorBoard files in a bucket; %s has every number", workdir / METRICS)
        else:
            self._tensorboard = TensorBoardWriter(workdir / "tensorboard", start_step)
            log.info("curves: tensorboard --logdir %s", workdir / "tensorboard")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows of one step."""
        for row in rows:
            self._write_line(row)
        if points := curve_points(rows):
            step = rows[0]["step"]
            if self._tensorboard:
                self._tensorboard.write(step, points)
            if self._tracker:
                self._tracker(step, points)

    def _write_line(self, row: Mapping[str, Any]) -> None:
        try:
            self._lines.write(json.dumps(row))
        except OSError as error:
            if not self._is_tolerant:
                raise
            log.warning("%s; the row is kept and written later", error)

    def flush(self) -> None:
        """Waits until every row is in the file."""
        self._lines.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker:
            self._tracker.close()
        if self._tensorboard:
            self._tensorboard.close()
        self._lines.close()


class TensorBoardWriter:
    """Writes scalars into an event file; on an error it warns once and stops writing.

    With tensorboardX's SummaryWriter a full disk, or a clock set back far, ends the writer thread,
    and training blocks on its queue. TensorBoard hides old points after ``start_step``.
    """

    def __init__(self, directory: Path, start_step: int):
        self._events: Any = require("tensorboardX.event_file_writer", "train")
        self._summary: Any = require("tensorboardX.summary", "train")
        self._writer: Any = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            has_earlier = start_step or any(directory.iterdir())
            self._writer = self._events.EventsWriter(str(directory / "events"))
            if has_earlier:
                event = self._events.event_pb2
                session = event.SessionLog(status=event.SessionLog.START)
                self._writer.write_event(event.Event(step=start_step + 1, session_log=session))
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each named curve, except where the value is not finite."""
        if self._writer is None:
            return
        event_class = self._events.event_pb2.Event
        try:
            for name, value in values.items():
                if math.isfinite(value):
                    summary = self._summary.scalar(name, value)
                    event = event_class(wall_time=time.time(), step=step, summary=summary)
                    self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("no TensorBoard files from here on (%s); metrics.jsonl goes on", error)
        self._writer = None
