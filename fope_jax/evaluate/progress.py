"""Progress over the batches of an evaluation, shown or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fope_jax.extras import require
from fope_jax.logs import is_quiet
from fope_jax.processes.collectives import is_main_process

Progress = Callable[..., Iterable[int]]  # called as ``progress(batches, desc=desc)``


def no_progress(batches: Iterable[int], **_: Any) -> Iterable[int]:
    """A ``Progress`` that shows nothing."""
    return batches


def progress_bar(batches: Iterable[int], desc: str) -> Iterable[int]:
    """A ``Progress`` that shows a bar, in the main process and unless logs are quiet."""
    tqdm = require("tqdm", "train").tqdm
    is_hidden = is_quiet() or not is_main_process()
    return tqdm(batches, desc=desc, unit="batch", dynamic_ncols=True, disable=is_hidden)
