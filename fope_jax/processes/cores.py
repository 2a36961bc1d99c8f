"""The cores of this machine that a process may use."""

from __future__ import annotations

import os


def available_cores() -> list[int]:
    """Their numbers; all cores where the system does not tell, as on macOS.

    >>> len(available_cores()) >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
