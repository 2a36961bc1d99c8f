"""The metrics of a run: rows in metrics.jsonl, the source of truth, and TensorBoard beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fope_jax.evaluate.metrics import METRICS
from fope_jax.storage.files import open_line_writer
from fope_jax.storage.paths import is_in_bucket
from fope_jax.train.tensorboard import TensorBoardWriter

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to ``workdir/metrics.jsonl`` and the numbers of train rows to TensorBoard.

    There is no TensorBoard in a bucket, where nothing can be added to a file.

    Args:
      workdir: of the run.
      start_step: updates done before.
      tolerant: a row that cannot be written is kept until it can; `flush` still raises.
    """

    def __init__(self, workdir: Path, start_step: int, tolerant: bool = False):
        self._tolerant = tolerant
        self._lines = open_line_writer(workdir / METRICS)
        self._curves = None
        if is_in_bucket(workdir):
            log.info("no TensorBoard files in a bucket; %s has every number", workdir / METRICS)
        else:
            self._curves = TensorBoardWriter(workdir / "tensorboard", start_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row; on disk it is on its way to the file when this returns."""
        try:
            self._lines.write(json.dumps(row))
        except OSError as error:
            if not self._tolerant:
                raise
            log.warning("%s; the row is kept and written later", error)
        if self._curves and row["kind"] == "train":
            values = {name: x for name, x in row.items() if name not in ("kind", "step")}
            self._curves.add(row["step"], values)

    def flush(self) -> None:
        """Returns when every row is in the file."""
        self._lines.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._curves:
            self._curves.close()
        self._lines.close()
