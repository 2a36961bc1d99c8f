"""What the processes of one run do together: wait, share values, stop at the same step.

With a single process every function here is free and changes nothing.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

_barriers = itertools.count()  # a barrier of a name is used once
_questions = itertools.count(1)
_is_preempted = False


class DistributedError(RuntimeError):
    """Processes that cannot go on as one; the message names the setting or the processes."""


def is_main_process() -> bool:
    """Whether this process writes what is written once: logs, rows, manifests."""
    return jax.process_index() == 0


def wait_for_processes(name: str) -> None:
    """Returns when every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_process_0(number: int) -> int:
    """The number of process 0, in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_to_host(x: jax.Array) -> np.ndarray:
    """All of an array whose shards may be on devices of other processes."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather_texts(text: str, timeout_seconds: float) -> list[str]:
    """The texts of all processes in the order of their ids; all call it equally often.

    Raises:
      DistributedError: a process has not come in time; the message is that of JAX's barrier.
    """
    if jax.process_count() == 1:
        return [text]
    from orbax.checkpoint import multihost

    try:  # an all-gather alone would wait for ever, and could not say for whom
        wait_at_barrier = multihost.get_barrier_sync_fn()
        wait_at_barrier(key=f"fope/{next(_barriers)}", timeout_ms=round(1000 * timeout_seconds))
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise DistributedError(
            f"waited {timeout_seconds:g} s at most for processes that have started: {reason}"
        ) from error
    encoded = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(encoded))).max())
    size = 1 << max(10, longest.bit_length())  # few sizes, as each is compiled
    rows = multihost_utils.process_allgather(np.pad(encoded, (0, size - len(encoded))))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def reached_preemption() -> bool:
    """Whether any process was sent SIGTERM: one answer in all of them, which ask equally often.

    JAX looks for the signal once a second. It numbers the questions, and says yes to one alone.
    """
    global _is_preempted
    question = next(_questions)
    if not _is_preempted:
        _is_preempted = multihost_utils.reached_preemption_sync_point(question)
    return _is_preempted
