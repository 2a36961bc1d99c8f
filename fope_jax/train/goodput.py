"""Where the time of a run goes: rows of kind "time", which the report adds up.

Phases: "start", to the first step but for "compile" and "restore" of a checkpoint; "data", waiting
for batches; "step"; "save"; and "lost", what an earlier process had trained after its last save.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class PhaseTimer:
    """Seconds by phase since the last rows.

    Args:
      seconds_before: that this process has spent on the run already, for "start".
    """

    def __init__(self, seconds_before: float = 0.0):
        self._seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter() - seconds_before

    def add(self, phase: str, seconds: float) -> None:
        """Adds to a phase."""
        self._seconds[phase] += seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside, also where it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def end_startup(self) -> None:
        """Counts as "start" what no other phase has had so far."""
        elapsed = time.perf_counter() - self._began
        known = sum(seconds for name, seconds in self._seconds.items() if name != "lost")
        self.add("start", max(0.0, elapsed - known))

    def take_rows(self, step: int) -> list[dict[str, Any]]:
        """A row for each phase; begins anew."""
        rows = [
            {"kind": "time", "phase": phase, "step": step, "seconds": round(seconds, 4)}
            for phase, seconds in self._seconds.items()
        ]
        self._seconds.clear()
        return rows


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
