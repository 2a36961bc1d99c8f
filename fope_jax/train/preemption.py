"""A signal asks a training to end: it ends its step, saves and stops. See `processes.signals`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from fope_jax.processes.collectives import reached_preemption
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

    def __init__(self, received_signal: Callable[[], int | None]):
        self._received_signal = received_signal

    def is_requested(self) -> bool:
        """Whether to stop; asked once after every step."""
        return reached_preemption() if is_distributed() else self._received_signal() is not None

    def raise_if_requested(self) -> None:
        """Raises `Stopped` where it is to stop: between two parts of an evaluation."""
        if self.is_requested():
            raise Stopped(self.signal_number, is_in_all_processes=is_distributed())

    @property
    def signal_number(self) -> int:
        """Of the signal; that which another process got is taken for a SIGTERM."""
        return self._received_signal() or signal.SIGTERM

    @contextlib.contextmanager
    def stop_at_once(self) -> Iterator[None]:
        """Where the last step has been saved: a signal ends what is under way, also a compilation.

        Of several processes one alone must not leave; there it waits for the next question.
        """
        if is_distributed():
            yield
            return
        with raise_on_signal():
            self.raise_if_requested()
            yield


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Notes signals; what handled them before does so again afterwards.

    A thread that is not the main one cannot catch signals and is never asked to stop.
    """
    with defer_signals() as received_signal:
        yield Preemption(received_signal)
