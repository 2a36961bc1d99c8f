"""SIGTERM while training: the step under way ends, its checkpoint is written, the run stops.

That is how a spot machine, Slurm or Kubernetes announces that it takes a machine away.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """A run that was asked to stop, and has saved where it stands.

    ``exit_code`` is what the process ends with: 128 + SIGTERM, as a shell reports that signal.
    """

    exit_code = 128 + signal.SIGTERM


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Catches SIGTERM; what handled it before does so again afterwards.

    Yields:
      step -> whether to stop after it; asked once after every step. Several processes get the same
      answer for the same step, whichever of them the signal reached. A thread that is not the main
      one cannot catch signals and is never told to stop.
    """
    if jax.distributed.is_initialized():
        # JAX has caught it since then, and lets all processes agree on a step in the background.
        yield multihost_utils.reached_preemption_sync_point
        return
    noticed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: set by no one in Python
