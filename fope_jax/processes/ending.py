"""How processes end together."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils


class _StopPoint:
    """The place at which all processes stop.

    JAX wants a number that grows with every question, the same in all processes, and says yes to
    one of them alone.
    """

    def __init__(self):
        self._questions = itertools.count(1)
        self._reached = False

    def __call__(self) -> bool:
        question = next(self._questions)
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(question)
        return self._reached


_stop_point = _StopPoint()


def reached_preemption() -> bool:
    """Whether any process has been asked to stop, by SIGTERM: one answer in all of them, which ask
    equally often. JAX looks for the signal once a second."""
    return _stop_point()


_END, _HEARD = "fope/end", "fope/heard"
_REASON = 600  # characters shown of a reason
_listening = threading.Event()


def watch_for_failures() -> None:
    """Ends this process, in a line that says why, when another one of the run has failed.

    Without it one that waits for the other, to write a file or to send its part of an array, would
    wait for minutes, and deaf to SIGTERM.
    """
    if jax.process_count() == 1 or _listening.is_set():
        return
    _listening.set()
    listener = threading.Thread(target=_listen, name="ends", daemon=True)
    listener.start()

    def stop() -> None:
        _listening.clear()
        listener.join(5)

    atexit.register(stop)  # before JAX's own, which takes the connection away


def announce_failure(reason: str, code: int, report: Callable[[], None] = lambda: None) -> None:
    """Tells the other processes that this one has failed, and ends it.

    Returns where it is the only one, or nobody listens.

    Args:
      reason: for people; shown in one line.
      code: that all end with.
      report: says more, where no other process failed before: what fails here after that is mostly
        a connection that the other has left.
    """
    if not _listening.is_set():
        return
    _listening.clear()
    reason = " ".join(reason.split())[:_REASON]
    said = {"process": jax.process_index(), "reason": reason, "code": code}
    client = _service()
    try:
        client.key_value_set(_END, json.dumps(said))  # refused where it is there
        report()
    except Exception:
        with contextlib.suppress(Exception):  # the first process is gone, and what it knew with it
            said = json.loads(client.blocking_key_value_get(_END, 1000))
        _say_end(said)
    _leave(said["code"])


def _service() -> Any:
    """What JAX's processes find each other by: here, a few words that all of them may read."""
    return distributed.global_state.client


def _listen() -> None:
    client, own = _service(), jax.process_index()
    while _listening.is_set():
        try:
            said = json.loads(client.blocking_key_value_get(_END, 1000))
        except Exception:  # nothing within a second, or no answer: JAX ends the process for that
            time.sleep(0.1)
            continue
        # What fails in all of them each tells itself; the first writes what is left besides.
        time.sleep(10 if own == 0 else 1)
        if _listening.is_set():
            _say_end(said)
            _leave(said["code"])


def _say_end(said: dict[str, Any]) -> None:
    print(f"fope: process {said['process']} has ended: {said['reason']}", file=sys.stderr)


def _leave(code: int) -> None:
    """Ends the process without JAX's farewell, which waits for those who cannot come."""
    sys.stdout.flush()
    sys.stderr.flush()
    client, own = _service(), jax.process_index()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_HEARD}/{own}", "")
        if own == 0:  # the others hear it through this process
            deadline = time.monotonic() + 5
            for other in range(1, jax.process_count()):
                left = max(0.1, deadline - time.monotonic())
                client.blocking_key_value_get(f"{_HEARD}/{other}", round(1000 * left))
    os._exit(code)
