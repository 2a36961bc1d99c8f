"""One thing that can go wrong, what is promised of it, and a trial of the promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """A row of the fault table.

    Attributes:
      name: "kill -9 at random times".
      promise: one sentence.
      trial: (fresh directory, seed); raises AssertionError where the promise is broken.
      trials: how many in the slow suite and in ``python -m tests.faults``.
      short: how many in the fast suite; 0 leaves the fault to the slow one.
    """

    name: str
    promise: str
    trial: Callable[[Path, int], None]
    trials: int
    short: int
