"""What a sweep has done, what comes, and how long that takes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fope_jax.evaluate.metrics import METRICS
from fope_jax.sweep.runs import PlannedRun

_TAIL = 4096  # bytes read at the end of a metrics file, longer than a row
_SHARE_OF_TRAINING = 0.75  # of a run's time, until a run like it is done


class SweepProgress:
    """A line for each run that ends, and a bar with what runs and the time that is left.

    The time of a run is that of finished runs of the same model and updates; before there is one,
    that of a run under way, by its share of the updates.

    Args:
      planned: all runs of the sweep.
      seconds: of the runs that were done before, by name.
      jobs: runs at once.
      say: called with each line.
    """

    def __init__(
        self,
        planned: Sequence[PlannedRun],
        workdir: Path,
        seconds: Mapping[str, float],
        jobs: int,
        say: Callable[[str], None],
    ):
        self._planned, self._workdir, self._jobs, self._say = planned, workdir, jobs, say
        self._seconds = dict(seconds)
        self._began: dict[str, float] = {}
        self._failed: set[str] = set()
        is_terminal = sys.stderr.isatty()
        self.interval = 2.0 if is_terminal else 30.0  # seconds between looks at the runs
        self._bar = tqdm(
            total=len(planned), initial=len(seconds), desc="sweep", unit="run", mininterval=0
        )

    def __enter__(self) -> SweepProgress:
        names = [run.name for run in self._waiting()]
        if names:
            at_once = f", {self._jobs} at once" if self._jobs > 1 else ""
            self._say(f"{count(names)} to make{at_once}: {', '.join(names)}")
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def begin(self, run: PlannedRun) -> None:
        self._began[run.name] = time.monotonic()

    def end(self, run: PlannedRun, phases: Mapping[str, float]) -> None:
        """``phases`` are the seconds of each verb."""
        del self._began[run.name]
        self._seconds[run.name] = sum(phases.values())
        parts = ", ".join(f"{verb} {duration(seconds)}" for verb, seconds in phases.items())
        line = f"{run.name} is done in {duration(self._seconds[run.name])} ({parts})"
        line += f"; {len(self._seconds)} of {len(self._planned)}"
        if self._waiting() or self._began:
            line += f"; {self._left()} left"
        self._say(line)
        self._bar.update()

    def fail(self, run: PlannedRun) -> None:
        self._began.pop(run.name, None)
        self._failed.add(run.name)

    def show(self) -> None:
        """Brings the bar up to date."""
        under_way = [
            f"{run.name} {self._step(run):,}/{run.experiment.train.steps:,}"
            for run in self._planned
            if run.name in self._began
        ]
        self._bar.set_postfix_str(f"{', '.join(under_way)}; {self._left()} left")

    def _waiting(self) -> list[PlannedRun]:
        known = self._seconds.keys() | self._began.keys() | self._failed
        return [run for run in self._planned if run.name not in known]

    def _step(self, run: PlannedRun) -> int:
        return last_step(self._workdir / run.name / METRICS)

    def _left(self) -> str:
        """The time until all are done, in words."""
        estimates = self._estimates()
        if not estimates:
            return "unknown time"
        usual = sum(estimates.values()) / len(estimates)
        expected = {run.name: estimates.get(_likeness(run), usual) for run in self._planned}
        waiting = [expected[run.name] for run in self._waiting()]
        now = time.monotonic()
        running = [max(0.0, expected[name] - (now - at)) for name, at in self._began.items()]
        spread = (sum(waiting) + sum(running)) / self._jobs
        return f"about {duration(max([spread, *running, *waiting]))}"

    def _estimates(self) -> dict[Hashable, float]:
        """Seconds of a run, by what decides them."""
        done: dict[Hashable, list[float]] = {}
        under_way: dict[Hashable, list[float]] = {}
        for run in self._planned:
            if run.name in self._seconds:
                done.setdefault(_likeness(run), []).append(self._seconds[run.name])
            elif run.name in self._began and (step := self._step(run)):
                share = _SHARE_OF_TRAINING * step / run.experiment.train.steps
                elapsed = time.monotonic() - self._began[run.name]
                under_way.setdefault(_likeness(run), []).append(elapsed / share)
        return {key: sum(values) / len(values) for key, values in (under_way | done).items()}


def _likeness(run: PlannedRun) -> Hashable:
    """What mostly decides the time of a run: all but its position embedding and seed."""
    return run.experiment.model, run.experiment.train


def last_step(metrics: Path) -> int:
    """The updates that the last row of training counts; 0 where there is none."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - _TAIL))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut off at either end
            continue
    return 0


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(41.4), duration(200), duration(7500)
    ('41 s', '3 min 20 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(names: Sequence[str]) -> str:
    """How many runs.

    >>> count(["a"]), count(["a", "b"])
    ('1 run', '2 runs')
    """
    return f"{len(names)} run" + ("" if len(names) == 1 else "s")
