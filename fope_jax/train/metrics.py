"""The metrics of a run: rows in metrics.jsonl, the source of truth, and TensorBoard beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fope_jax.evaluate.metrics import METRICS
from fope_jax.extras import require


class MetricsLog:
    """Appends rows to ``workdir/metrics.jsonl`` and the numbers of train rows to TensorBoard."""

    def __init__(self, workdir: Path, start_step: int):
        tensorboard = require("tensorboardX", "train")
        self._stream = (workdir / METRICS).open("a")
        # purge_step hides what an earlier, killed process wrote for the steps that come again.
        self._writer = tensorboard.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row; it is on its way to the file when this returns, whatever follows."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        if row["kind"] == "train":
            for name, value in row.items():
                if name not in ("kind", "step"):
                    self._writer.add_scalar(f"train/{name}", value, row["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._writer.close()
