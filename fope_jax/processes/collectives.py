"""Collectives of the processes of a run; with a single process all are free."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

_barriers = itertools.count()  # a barrier's name can be used once
_questions = itertools.count(1)
_is_preempted = False


class DistributedError(RuntimeError):
    """Processes cannot go on as one; the message names the setting or the processes."""


def is_main_process() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def wait_for_processes(name: str) -> None:
    """Barrier: returns when every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_process_0(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_to_host(x: jax.Array) -> np.ndarray:
    """The whole array, also if shards are on devices of other processes."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather_texts(text: str, timeout_seconds: float) -> list[str]:
    """The texts of all processes by process id; all must call it equally often.

    Raises:
      DistributedError: a process did not come in time; has the message of JAX's barrier.
    """
    if jax.process_count() == 1:
        return [text]
    # An all-gather alone waits forever and names no one.
    wait_in_thread(f"fope/{next(_barriers)}", timeout_seconds)
    encoded = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(encoded))).max())
    size = 1 << max(10, longest.bit_length())  # powers of two: each size is compiled
    rows = multihost_utils.process_allgather(np.pad(encoded, (0, size - len(encoded))))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def wait_in_thread(name: str, timeout_seconds: float) -> None:
    """Barrier that uses no device, so that a thread may wait while another computes.

    Raises:
      DistributedError: a process did not come in time; has the message of JAX's barrier.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=round(1000 * timeout_seconds))
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise DistributedError(
            f"waited {timeout_seconds:g} s at most for processes that have started: {reason}"
        ) from error


def reached_preemption() -> bool:
    """Whether any process got SIGTERM; the same in all, which must call it equally often.

    JAX polls the signal once a second and answers True for one question only, so it is remembered.
    """
    global _is_preempted
    question = next(_questions)
    if not _is_preempted:
        _is_preempted = multihost_utils.reached_preemption_sync_point(question)
    return _is_preempted
