"""SIGTERM, SIGINT and SIGHUP: how a process ends that is asked to.

A machine that is taken away, Slurm and Kubernetes send SIGTERM, a terminal sends SIGINT for Ctrl-C
and SIGHUP when it is closed. They are heeded alike, in one of two ways:

`raise_on_signal`: the main thread gets `Stopped`, as Python gives it KeyboardInterrupt for Ctrl-C.
What is under way cleans up and ends. Every verb of `fope` runs so.

`defer_signals`: the signal is noted, for what asks where it can end: training, which saves first.

A second Ctrl-C ends the process at once. A SIGHUP that is ignored, as under nohup, stays so, and so
does the SIGINT of what a shell runs in the background.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 10.0
PARENT_VARIABLE = (
    "FOPE_PARENT"  # the process id without which this one is to end, see `end_with_parent`
)


class _State:
    """What this process does about signals: one at a time, for all of its threads.

    Attributes:
      raising: blocks of `raise_on_signal`, one inside the other.
      is_ending: `Stopped` is on its way; a second one would break into what the first cleans up.
      is_deferring: inside `defer_signals`.
    """

    raising, is_ending, is_deferring = 0, False, False


_state = _State()


class Stopped(KeyboardInterrupt):
    """This process was asked to end.

    Attributes:
      number: of the signal.
      exit_code: 128 + that number, as a shell reports it.
      is_in_all_processes: whether the other processes of the run raise it too, at the same place.
    """

    def __init__(self, number: int, is_in_all_processes: bool = False):
        super().__init__(f"stopped by {signal_name(number)}")
        self.number = number
        self.exit_code = 128 + number
        self.is_in_all_processes = is_in_all_processes


def signal_name(number: int) -> str:
    """
    >>> signal_name(15)
    'SIGTERM'
    """
    return signal.Signals(number).name


def is_distributed() -> bool:
    """Whether this process is one of several. JAX has caught SIGTERM since they joined, and must
    go on to, or they would not agree on a step."""
    # A signal may come in the middle of importing it.
    is_initialized = getattr(sys.modules.get("jax.distributed"), "is_initialized", None)
    return is_initialized is not None and is_initialized()


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raises `Stopped` in the main thread where a signal comes while it is in the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        _let_the_next_one_kill(number)
        if not _state.is_ending:
            _state.is_ending = True
            raise Stopped(number)

    was_deferring, _state.is_deferring = _state.is_deferring, False
    _state.raising += 1
    try:
        with _handle_signals(stop):
            yield
    finally:
        _state.is_deferring = was_deferring
        _state.raising -= 1
        _state.is_ending = _state.is_ending and _state.raising > 0


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], int | None]]:
    """Notes a signal that comes in the block, and lets what is under way go on.

    Yields:
      What gives the number of the first signal, or None. In a thread that is not the main one,
      which no signal reaches, always None.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        _let_the_next_one_kill(number)
        if is_distributed():
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which tells the other processes

    was_deferring, _state.is_deferring = _state.is_deferring, True
    try:
        with _handle_signals(note):
            yield lambda: noted[0] if noted else None
    finally:
        _state.is_deferring = was_deferring


@contextlib.contextmanager
def exit_after_grace_period(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Ends the process where a signal that is raised has not done so in time.

    Python runs a handler only between two of its own steps, and a program on the device, a
    compilation or a file system that is gone may take minutes to return to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_exit_when_late, args=(reader, over, grace_seconds), name="signals", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.write(writer, b"\0")
        watcher.join()
        os.close(writer)
        os.close(reader)


def _exit_when_late(reader: int, over: threading.Event, grace_seconds: float) -> None:
    number = 0
    while number not in SIGNALS:
        number = os.read(reader, 1)[0]  # of each signal, when the kernel has sent it
        if over.is_set():
            return
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline:
        if over.wait(0.1):
            return
        if _state.is_deferring:  # a save takes the time that it takes
            deadline = time.monotonic() + grace_seconds
    line = f"fope: stopped by {signal_name(number)}, in the middle of what was under way\n"
    os.write(2, line.encode())
    os._exit(128 + number)


def end_with_parent() -> None:
    """Where FOPE_PARENT names the parent, has the kernel send SIGTERM when that one is gone.

    On Linux alone, in the main thread. The parent's thread that began this process must live on.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")  # of this process, not of those that it starts
    if not parent or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
    if os.getppid() != int(parent):  # it was gone before
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def handle(number: int, frame: FrameType | None) -> None:
        for stream in terminals:
            if not os.isatty(stream):  # it is closed: a progress bar would fail before the save
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        handler(number, frame)

    before = {}
    for number in SIGNALS:
        ignored = number != signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN
        if not ignored and not (number == signal.SIGTERM and is_distributed()):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)  # None: set by no one in Python


def _let_the_next_one_kill(number: int) -> None:
    """After a first Ctrl-C. Not after a SIGTERM, which some send twice to end a run once."""
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
