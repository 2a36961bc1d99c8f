"""One writer a run directory: the second stops at once and names the first.

``run.lock`` in the directory holds who writes there, as JSON. On one machine the kernel keeps it
(flock), so it falls with its process however that ends, and whose it was is told by the process id
together with the time that process began: an id that came again is not taken for the owner.

Other machines see the file alone. Its owner counts it up every few seconds; one that nobody counts
up for a lease is taken over. In a bucket that is all there is, so two that begin in the same
moment may both think they have it; the one whose name was overwritten finds out before its next
checkpoint and stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.processes.agreement import agree, fail_together
from fope_jax.processes.collectives import is_main_process
from fope_jax.storage.directories import (
    check_writable,
    make_directory,
    make_writable,
    remove_empty_directories,
)
from fope_jax.storage.files import write_text
from fope_jax.storage.paths import is_in_bucket

log = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT_SECONDS = 10.0
LEASE_SECONDS = 45.0  # without a beat, after which an owner on another machine counts as dead
SHARED_SECONDS = 20.0  # after which a lock that another process cannot see is in another directory
_WIDTH = 512  # of the file: always the same, so that it is written over and never cut


class LockError(OSError):
    """Another process writes into the run directory; the message names it."""


class LockOwner(NamedTuple):
    """Who writes into a run directory.

    Attributes:
      host: of the machine.
      pid: of the process.
      began: when that process began, in clock ticks since its machine did; 0 where the system
        does not tell.
      started: when it took the lock, for people.
      verb: what it does there: "train".
    """

    host: str
    pid: int
    began: int
    started: str
    verb: str

    @property
    def text(self) -> str:
        """For people: ``fope train, host box, pid 12, since 2026-01-01T10:00:00+00:00``."""
        return f"fope {self.verb}, host {self.host}, pid {self.pid}, since {self.started}"


class RunLock:
    """The right to write into one run directory, held until `release`."""

    def __init__(self, directory: Path, owner: LockOwner):
        self.path = directory / LOCK
        self.owner = owner
        self._descriptor: int | None = None
        self._beats = 0
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name=LOCK, daemon=True)

    def acquire(self, lease_seconds: float) -> None:
        """Takes the lock, from a dead owner too.

        Raises:
          LockError: its owner is alive.
        """
        if not is_in_bucket(self.path):
            self._descriptor = _locked_file(self.path)
        try:
            last = _owner(self._read())
            if last is not None:
                self._judge(last, lease_seconds)
            self._write()
        except BaseException:
            self._close()
            raise
        self._beating.start()

    def check(self) -> None:
        """Raises LockError where another process has taken the lock over meanwhile."""
        try:
            now = _owner(self._read())
        except Exception:  # of any library of buckets: what is written next tells it better
            return
        if now is not None and now != self.owner:
            raise LockError(
                f"{self.path} belongs to another process now ({now.text}): this one did not "
                "answer for too long, and stops before it writes over the other's files"
            )

    def release(self) -> None:
        """Gives the lock back, unless it is another's by now."""
        self._stop.set()
        self._beating.join()
        with contextlib.suppress(Exception):
            if _owner(self._read()) == self.owner:
                self.path.unlink()
        self._close()

    def _judge(self, last: LockOwner, lease_seconds: float) -> None:
        """Returns where ``last``, whom the file names, is dead."""
        if last.host == self.owner.host:
            if is_owner_alive(last):
                raise LockError(_refusal(self.path, last))
            log.warning("taking over %s: its process is gone (%s)", self.path, last.text)
            return
        log.info(
            "%s is held from another machine (%s); watching it for %g s",
            self.path,
            last.text,
            lease_seconds,
        )
        before, deadline = self._read(), time.monotonic() + lease_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, lease_seconds / 4))
            if self._read() != before:
                raise LockError(_refusal(self.path, last))
        log.warning(
            "taking over %s: no sign of life for %g s (%s)", self.path, lease_seconds, last.text
        )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # A failure to write is told by what the run itself writes; the lock is only for others.
            with contextlib.suppress(Exception):
                if _owner(self._read()) == self.owner:
                    self._write()

    def _read(self) -> str:
        if self._descriptor is not None:
            return os.pread(self._descriptor, _WIDTH, 0).decode(errors="replace")
        return self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""

    def _write(self) -> None:
        self._beats += 1
        text = json.dumps(self.owner._asdict() | {"beats": self._beats}).ljust(_WIDTH - 1) + "\n"
        if self._descriptor is None:
            write_text(self.path, text)
        else:
            os.pwrite(self._descriptor, text.encode(), 0)
            os.ftruncate(self._descriptor, _WIDTH)  # of a file longer than that, damaged before

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def lock_run(
    directory: Path, verb: str, lease_seconds: float = LEASE_SECONDS
) -> Iterator[RunLock | None]:
    """Holds the lock of a run directory, made where it is not there and removed if left empty.

    The first of several processes takes it for all, and the others look whether they see it: their
    directory is then the same. A process that has it already keeps it: one that evaluates while it
    trains.

    Args:
      directory: of the run.
      verb: what is done there, for the message that others get.
      lease_seconds: see ``LEASE_SECONDS``.

    Yields:
      The lock; None in the other processes, and where this one has it already.

    Raises:
      LockError: another process writes there.
      OSError: the directory cannot be written, or is not the same for all processes.
      DistributedError: one of these, in the processes where it did not come about.
    """
    own, lock, made = _this_process(verb), None, []
    with fail_together():
        if is_main_process():
            lock, made = _take(directory, own, lease_seconds)
    try:
        _check_shared(directory, own)
        yield lock
    finally:
        if lock is not None:
            lock.release()
        remove_empty_directories(made)


def _take(
    directory: Path, own: LockOwner, lease_seconds: float
) -> tuple[RunLock | None, list[Path]]:
    """The lock, None where this process has it already; and the directories made for it."""
    made: list[Path] = []
    try:
        if not is_in_bucket(directory):
            check_writable(directory)
            made = make_directory(directory)
        make_writable(directory)
    except OSError as error:
        remove_empty_directories(made)
        raise OSError(f"cannot write to workdir {directory}: {error.strerror or error}") from error
    if _same_process(read_lock_owner(directory), own):
        return None, made
    lock = RunLock(directory, own)
    lock.acquire(lease_seconds)
    return lock, made


def _check_shared(directory: Path, own: LockOwner) -> None:
    """Raises OSError in every process where not all of them see the lock that the first one holds.

    Orbax would wait for ever for the files of a process that writes into a directory of its own.
    """
    first = agree(json.dumps(own), lambda texts: texts[0])
    with fail_together():
        holder, deadline = LockOwner(*json.loads(first)), time.monotonic() + SHARED_SECONDS
        # A file system of several machines may show a new file late.
        while not _same_process(read_lock_owner(directory), holder):
            if time.monotonic() > deadline:
                raise OSError(
                    f"workdir {directory} is not the directory of process 0 (host {holder.host}): "
                    f"the {LOCK} that it holds there is not to be seen here after "
                    f"{SHARED_SECONDS:g} s. All processes need one directory that they share, on "
                    "a network file system or in a bucket: --workdir gs://BUCKET/PATH"
                )
            time.sleep(0.2)


def read_lock_owner(directory: Path) -> LockOwner | None:
    """Who holds the lock of a run directory, dead or alive; None where nobody does."""
    path = directory / LOCK
    return _owner(path.read_bytes().decode(errors="replace")) if path.exists() else None


def is_owner_alive(owner: LockOwner) -> bool:
    """Whether that process is there; True for one on another machine, which cannot be seen."""
    return owner.host != socket.gethostname() or _began(owner.pid) == owner.began


def _same_process(one: LockOwner | None, other: LockOwner) -> bool:
    return one is not None and one[:3] == other[:3]


def _this_process(verb: str) -> LockOwner:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return LockOwner(socket.gethostname(), os.getpid(), _began(os.getpid()) or 0, started, verb)


def _owner(text: str) -> LockOwner | None:
    """Whom the content of the file names; None where it is empty or was cut off."""
    try:
        content: dict[str, Any] = json.loads(text)
        return LockOwner(**{name: content[name] for name in LockOwner._fields})
    except (ValueError, KeyError, TypeError, RecursionError):  # nested too deeply is not ours
        return None


def _began(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks; None where there is none.

    0 where the system has no /proc: the id alone must do.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    state, *fields = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in ("Z", "X") else int(fields[18])


def _locked_file(path: Path) -> int:
    """Opens the lock's file and has the kernel keep it for this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            last = _owner(os.pread(descriptor, _WIDTH, 0).decode(errors="replace"))
            os.close(descriptor)
            raise LockError(_refusal(path, last)) from None
        except OSError:  # a file system without locks: the names in the file must do
            return descriptor
        # Its last owner may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        os.close(descriptor)


def _refusal(path: Path, owner: LockOwner | None) -> str:
    who = f"another process ({owner.text})" if owner else "another process"
    return (
        f"{path.parent} is written by {who}; wait for it or end it, or use another --workdir. "
        f"Where no such process runs any more, delete {path}"
    )
