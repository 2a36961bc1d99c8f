"""Training curves as TensorBoard reads them, beside metrics.jsonl, which has every number."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fope_jax.extras import require

log = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes scalars into an event file, and gives up with one warning where that fails.

    tensorboardX's own SummaryWriter hands them to a thread through a short queue. Where the disk is
    full, or the clock is set back by a month, that thread ends and training waits for it for ever.

    Args:
      directory: of the event files.
      start_step: updates done before; what an earlier, killed process wrote for later ones is
        hidden, since those steps come again.
    """

    def __init__(self, directory: Path, start_step: int):
        self._events: Any = require("tensorboardX.event_file_writer", "train")
        self._summary: Any = require("tensorboardX.summary", "train")
        self._writer: Any = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            earlier = start_step or any(directory.iterdir())
            self._writer = self._events.EventsWriter(str(directory / "events"))
            if earlier:
                event = self._events.event_pb2
                again = event.SessionLog(status=event.SessionLog.START)
                self._writer.write_event(event.Event(step=start_step + 1, session_log=again))
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each of the named curves."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if not math.isfinite(value):  # a row of skipped steps alone; a gap says it best
                    continue
                summary = self._summary.scalar(f"train/{name}", value)
                self._writer.write_event(
                    self._events.event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
                )
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("no TensorBoard files from here on (%s); metrics.jsonl goes on", error)
        self._writer = None
