"""Where the time of a run goes: rows of kind "time", which the report adds up.

start     from the start of the process to the first step, but for the next two
compile   the program of a step
restore   reading the checkpoint
data      waiting for batches
step      the steps themselves
save      checkpoints
lost      what an earlier process had trained after its last checkpoint
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class PhaseTimer:
    """Seconds by phase since the last rows.

    Args:
      before: seconds that this process has spent on the run already, for "start".
    """

    def __init__(self, before: float = 0.0):
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter() - before

    def add(self, phase: str, seconds: float) -> None:
        """Adds to a phase."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside, also where it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def started(self) -> None:
        """Ends "start": what no other phase has had so far."""
        now, others = time.perf_counter(), self._seconds.items()
        known = sum(seconds for name, seconds in others if name != "lost")
        self.add("start", max(0.0, now - self._began - known))

    def rows(self, step: int) -> list[dict[str, Any]]:
        """A row for each phase; begins anew."""
        found, self._seconds = self._seconds, {}
        return [
            {"kind": "time", "phase": phase, "step": step, "seconds": round(seconds, 4)}
            for phase, seconds in found.items()
        ]


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
