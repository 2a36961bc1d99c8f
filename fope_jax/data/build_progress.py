"""The progress bar of a split that is being built."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from fope_jax.data.documents import TokenizedDocuments
from fope_jax.extras import require
from fope_jax.logs import is_quiet

_SECONDS = 5.0  # the time shown goes on while a long part is tokenized


class SplitBar:
    """Tokens or documents where the split ends at so many, else bytes of its files; a context.

    Args:
      size: bytes of the files, 0 where they are not known.
      limits: the tokens and documents at which the split ends; None: there is no such limit.
      left: those that are still to come. With two limits the tokens are shown.
    """

    def __init__(
        self,
        split: str,
        size: int,
        limits: Sequence[int | None] = (None, None),
        left: Sequence[int | None] = (None, None),
    ):
        total, done, self._unit = size, 0, "B"
        for unit, limit, to_come in zip((" tokens", " documents"), limits, left, strict=True):
            if limit is not None:
                total, done, self._unit = limit, limit - max(to_come or 0, 0), unit
                break
        self._bar = require("tqdm", "train").tqdm(
            desc=f"tokenize {split}",
            total=total or None,
            initial=done,
            unit=self._unit,
            unit_scale=True,
            disable=is_quiet(),
        )
        self._is_done = threading.Event()
        self._clock = threading.Thread(target=self._refresh, name="progress", daemon=True)

    def __enter__(self) -> SplitBar:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._clock.join()
        self._bar.close()

    def read(self, size: int) -> None:
        """Bytes of files have been read."""
        if self._unit == "B":
            self._bar.update(size)

    def wrote(self, group: TokenizedDocuments, num_tokens: int) -> None:
        """Documents have been written; the split has ``num_tokens`` now."""
        if self._unit != " tokens":
            self._bar.set_postfix_str(f"{num_tokens:,} tokens", refresh=False)
        if self._unit == "B":
            return
        has_text = group.bytes > 0
        sizes = group.lengths if self._unit == " tokens" else np.ones_like(group.lengths)
        # The last document may go beyond the limit, where the bar would lose its end.
        self._bar.update(min(int(sizes[has_text].sum()), self._bar.total - self._bar.n))

    def _refresh(self) -> None:
        while not self._is_done.wait(_SECONDS):
            self._bar.refresh()
