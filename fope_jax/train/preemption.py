"""A training that is asked to end: the step under way ends, its checkpoint is written, it stops.

That is how a spot machine, Slurm or Kubernetes announces that it takes a machine away, see
``fope_jax.processes.signals``.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from fope_jax.processes.ending import reached_preemption
from fope_jax.processes.signals import Stopped, defer_signals, is_distributed, raise_on_signal


class Preempted(Exception):
    """A run that was asked to stop, and has saved where it stands.

    Attributes:
      exit_code: what the process ends with, 128 + the signal's number, as a shell reports it.
    """

    is_in_all_processes = True

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + number


class Preemption:
    """Whether a training is to stop.

    Several processes get the same answer at the same place, whichever of them the signal reached;
    so all of them have to ask equally often.
    """

    def __init__(self, noted: Callable[[], int | None]):
        self._noted = noted

    def __call__(self, step: int) -> bool:
        """Whether to stop after ``step``; asked once after every step."""
        return reached_preemption() if is_distributed() else self._noted() is not None

    def check(self) -> None:
        """Raises `Stopped` where it is to stop: between two parts of an evaluation."""
        if self(0):
            raise Stopped(self.number, is_in_all_processes=is_distributed())

    @property
    def number(self) -> int:
        """Of the signal; that which another process got is taken for a SIGTERM."""
        return self._noted() or signal.SIGTERM

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Where the last step has been saved: a signal ends what is under way, also a compilation.

        Of several processes one alone must not leave; there it waits for the next question.
        """
        if is_distributed():
            yield
            return
        with raise_on_signal():
            self.check()
            yield


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Notes signals; what handled them before does so again afterwards.

    A thread that is not the main one cannot catch signals and is never told to stop.
    """
    with defer_signals() as noted:
        yield Preemption(noted)
