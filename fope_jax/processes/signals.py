"""SIGTERM, SIGINT and SIGHUP: how a process ends on request.

All three are handled alike. In `raise_on_signal`, where every verb of `fope` runs, the main thread
raises `Stopped`. In `defer_signals` the signal is noted for a caller that checks when it can stop,
such as training, which saves first.

A second Ctrl-C ends the process at once, except in `keep_process`. An ignored SIGHUP (nohup) or
SIGINT (a background job) stays ignored.
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
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 10.0
PARENT_VARIABLE = "FOPE_PARENT"  # parent process id, see `end_with_parent`


class _State:
    """Signal state; a second `Stopped` while ``is_ending`` would interrupt the cleanup."""

    raising, is_ending, is_deferring = 0, False, False
    second_interrupt: Any = signal.SIG_DFL  # handles a second Ctrl-C


_state = _State()


class Stopped(KeyboardInterrupt):
    """This process was asked to end.

    ``exit_code`` is 128 + the signal's ``number``, as in shells. ``is_in_all_processes``: every
    process of the run raises it at the same step.
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
    """Whether this process is one of several; then JAX's SIGTERM handler must stay in use."""
    # A signal may come while the module is being imported.
    is_initialized = getattr(sys.modules.get("jax.distributed"), "is_initialized", None)
    return is_initialized is not None and is_initialized()


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raises `Stopped` in the main thread on a signal inside the block."""

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
    """Notes a signal inside the block without interrupting it.

    Yields a function that returns the first signal's number or None; None in other threads than
    the main one, which get no signals.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        _let_the_next_one_kill(number)
        if is_distributed():
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it and informs the other processes

    was_deferring, _state.is_deferring = _state.is_deferring, True
    try:
        with _handle_signals(note):
            yield lambda: noted[0] if noted else None
    finally:
        _state.is_deferring = was_deferring


@contextlib.contextmanager
def keep_process() -> Iterator[None]:
    """In the block a second Ctrl-C raises KeyboardInterrupt: it must not end a user's notebook."""
    before, _state.second_interrupt = _state.second_interrupt, signal.default_int_handler
    try:
        yield
    finally:
        _state.second_interrupt = before


@contextlib.contextmanager
def exit_after_grace_period(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Ends the process if a signal has not done so in time.

    Python handles signals between bytecodes: a device program, a compilation or a dead file system
    may take minutes to return.
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
        number = os.read(reader, 1)[0]  # the kernel's signal number, before Python's handler runs
        if over.is_set():
            return
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline:
        if over.wait(0.1):
            return
        if _state.is_deferring:  # a save may take longer
            deadline = time.monotonic() + grace_seconds
    line = f"fope: stopped by {signal_name(number)}, in the middle of what was under way\n"
    os.write(2, line.encode())
    os._exit(128 + number)


def end_with_parent() -> None:
    """Where FOPE_PARENT names the parent, the kernel sends SIGTERM when the parent dies.

    Linux and main thread only. The kernel watches the parent's thread that started this process.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")  # not inherited by child processes
    if not parent or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
    if os.getppid() != int(parent):  # the parent was already gone
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def handle(number: int, frame: FrameType | None) -> None:
        for stream in terminals:
            if not os.isatty(stream):  # closed: a progress bar would fail before the save
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
            signal.signal(number, old or signal.SIG_DFL)  # None: not set from Python


def _let_the_next_one_kill(number: int) -> None:
    """Changes the handler of Ctrl-C only: some senders repeat SIGTERM."""
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, _state.second_interrupt)
