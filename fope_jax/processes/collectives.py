"""What one of many processes does for all: files are written once, and the rest waits.

With a single process every function here is free and changes nothing.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main_process() -> bool:
    """Whether this process writes what is written once: logs, rows, manifests."""
    return jax.process_index() == 0


def wait_for_processes(name: str) -> None:
    """Returns when every process has come to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_process_0(number: int) -> int:
    """The first process's ``number``, in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_to_host(x: jax.Array) -> np.ndarray:
    """All of an array whose parts may lie on devices of other processes."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
