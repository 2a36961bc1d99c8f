"""Time of a run by phase, as rows of kind "time" that the report sums.

Phases: "start" (up to the first step, without "compile" and "restore"), "data" (waiting for
batches), "step", "save", and "lost" (training by an earlier process after its last save).
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
    """Seconds by phase since the last `take_rows`; ``seconds_before`` count as "start"."""

    def __init__(self, seconds_before: float = 0.0):
        self._seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter() - seconds_before

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def end_startup(self) -> None:
        """Counts the time so far that is in no other phase as "start"."""
        elapsed = time.perf_counter() - self._began
        known = sum(seconds for name, seconds in self._seconds.items() if name != "lost")
        self.add("start", max(0.0, elapsed - known))

    def take_rows(self, step: int) -> list[dict[str, Any]]:
        """Returns one row a phase and resets all phases."""
        rows = [
            {"kind": "time", "phase": phase, "step": step, "seconds": round(seconds, 4)}
            for phase, seconds in self._seconds.items()
        ]
        self._seconds.clear()
        return rows


def process_age() -> float:
    """Seconds since this process began; 0 if the system does not report it."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
