"""Stops a training after a signal: it finishes its step, saves and exits."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from fope_jax.processes.collectives import reached_preemption
from fope_jax.processes.signals import Stopped, defer_signals, is_distributed, raise_on_signal


class Preempted(Exception):
    """A run was stopped by a signal and has saved a checkpoint."""

    is_in_all_processes = True

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports it


class Preemption:
    """Whether a training has to stop; all processes must ask equally often, and agree."""

    def __init__(self, received_signal: Callable[[], int | None]):
        self._received_signal = received_signal

    def is_requested(self) -> bool:
        """Whether to stop; called once after every step."""
        return reached_preemption() if is_distributed() else self._received_signal() is not None

    def raise_if_requested(self) -> None:
        """Raises `Stopped` if a stop is requested; called between parts of an evaluation."""
        if self.is_requested():
            raise Stopped(self.signal_number, is_in_all_processes=is_distributed())

    @property
    def signal_number(self) -> int:
        """The signal received; SIGTERM if another process received it."""
        return self._received_signal() or signal.SIGTERM

    @contextlib.contextmanager
    def stop_at_once(self) -> Iterator[None]:
        """Lets a signal interrupt the block, even a compilation; needs the last step saved."""
        if is_distributed():  # if one process left alone, the others would hang
            yield
            return
        with raise_on_signal():
            self.raise_if_requested()
            yield


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Catches signals in the block. Outside the main thread no stop is ever requested."""
    with defer_signals() as received_signal:
        yield Preemption(received_signal)
