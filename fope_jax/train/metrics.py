"""The metrics of a run: rows in metrics.jsonl, the source of truth, and TensorBoard beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fope_jax.evaluate.metrics import METRICS
from fope_jax.extras import require
from fope_jax.files import in_bucket, open_lines

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to ``workdir/metrics.jsonl`` and the numbers of train rows to TensorBoard.

    There is no TensorBoard in a bucket: its writer stops reading its queue where an upload fails,
    and training would wait for it for ever. On a disk that is full it does the same and is left.

    Args:
      workdir: of the run.
      start_step: updates done before.
      tolerant: a row that cannot be written is kept until it can; `flush` still raises.
    """

    def __init__(self, workdir: Path, start_step: int, tolerant: bool = False):
        self._tolerant = tolerant
        tensorboard = require("tensorboardX", "train")
        self._lines = open_lines(workdir / METRICS)
        self._writer: Any = None
        if in_bucket(workdir):
            log.info("no TensorBoard files in a bucket; %s has every number", workdir / METRICS)
            return
        # purge_step hides what an earlier, killed process wrote for the steps that come again.
        self._writer = tensorboard.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row; on disk it is on its way to the file when this returns."""
        try:
            self._lines.write(json.dumps(row))
        except OSError as error:
            if not self._tolerant:
                raise
            log.warning("%s; the row is kept and written later", error)
        for name, value in row.items() if row["kind"] == "train" else ():
            if name not in ("kind", "step") and (curves := self._curves()):
                curves.add_scalar(f"train/{name}", value, row["step"])

    def _curves(self) -> Any:
        """TensorBoard's writer; None where there is none, or it has failed."""
        if self._writer and not self._writer.file_writer.event_writer._worker.is_alive():
            log.warning("TensorBoard's writer has failed; %s goes on with every number", METRICS)
            self._writer = None
        return self._writer

    def flush(self) -> None:
        """Returns when every row is in the file."""
        self._lines.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if curves := self._curves():
            curves.close()
        self._lines.close()
