"""One writer a run directory: the second stops at once and names the first.

``run.lock`` in the directory holds who writes there, as JSON. On one machine the kernel keeps it
(flock, through filelock), so it falls with its process however that ends. Whose it was is told by
the process id together with the time that process began: an id that came again is not the owner.

Other machines see the file alone. Its owner counts it up every few seconds; a lock that nobody
counts up for a lease is taken over. In a bucket that is all there is: the object is created only
where it is absent, so one of two that begin together gets it. Two that take over a dead one in the
same moment may both think they have it; the one whose name was overwritten finds out before its
next checkpoint and stops.
"""

from __future__ import annotations

import contextlib
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

from fope_jax.extras import require
from fope_jax.processes.agreement import AGREE_SECONDS, fail_together
from fope_jax.processes.collectives import gather_texts, is_main_process
from fope_jax.storage.directories import (
    check_writable,
    make_directory,
    make_writable,
    remove_empty_directories,
)
from fope_jax.storage.files import write_text
from fope_jax.storage.paths import create_object, is_in_bucket

log = logging.getLogger(__name__)

LOCK = "run.lock"
HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 45.0  # without a heartbeat, after which an owner on another machine counts as dead
SHARED_SECONDS = 20.0  # after which a lock that another process cannot see is in another directory
_WIDTH = 512  # of the file: always the same, so that it is written over and never cut


class LockError(OSError):
    """Another process writes into the run directory; the message names it."""


class LockOwner(NamedTuple):
    """Who writes into a run directory.

    ``began`` is when the process did, in clock ticks since its machine did, 0 where the system does
    not tell; ``started`` when it took the lock, for people; ``verb`` what it does there: "train".
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

    def is_same_process(self, other: LockOwner | None) -> bool:
        """Whether both are of one process, whatever it does."""
        return other is not None and self[:3] == other[:3]


class RunLock:
    """The right to write into one run directory, held until `release`."""

    def __init__(self, directory: Path, owner: LockOwner):
        self.path, self.owner = directory / LOCK, owner
        self._directory, self._beats = directory, 0
        filelock = require("filelock", "train")
        self._kernel_lock = None if is_in_bucket(directory) else filelock.FileLock(self.path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name=LOCK, daemon=True)

    def acquire(self, lease_seconds: float) -> None:
        """Takes the lock, also that of a dead owner; LockError where its owner is alive."""
        if self._kernel_lock is not None:
            try:
                self._kernel_lock.acquire(timeout=0)
            except TimeoutError:
                raise self._refusal(read_lock_owner(self._directory)) from None
        try:
            is_new = self._kernel_lock is None and create_object(self.path, self._record())
            if not is_new:
                last = read_lock_owner(self._directory)
                if last is not None:
                    self._wait_for_death(last, lease_seconds)
                self._write()
        except BaseException:
            self._release_kernel_lock()
            raise
        self._thread.start()

    def check(self) -> None:
        """Raises LockError where another process has taken the lock over meanwhile."""
        try:
            owner = read_lock_owner(self._directory)
        except Exception:  # of any library of buckets: what is written next tells it better
            return
        if owner is not None and owner != self.owner:
            raise LockError(
                f"{self.path} belongs to another process now ({owner.text}): this one did not "
                "answer for too long, and stops before it writes over the other's files"
            )

    def release(self) -> None:
        """Gives the lock back, unless it is another's by now."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            if read_lock_owner(self._directory) == self.owner:
                self.path.unlink()
        self._release_kernel_lock()

    def _wait_for_death(self, last: LockOwner, lease_seconds: float) -> None:
        """Returns where ``last``, whom the file names, is dead."""
        if last.host == self.owner.host:
            if is_owner_alive(last):
                raise self._refusal(last)
            log.warning("taking over %s: its process is gone (%s)", self.path, last.text)
            return
        watched = "%s is held from another machine (%s); watching it for %g s"
        log.info(watched, self.path, last.text, lease_seconds)
        before, deadline = self.path.read_bytes(), time.monotonic() + lease_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, lease_seconds / 4))
            if not self.path.exists() or self.path.read_bytes() != before:
                raise self._refusal(last)
        taken = "taking over %s: no sign of life for %g s (%s)"
        log.warning(taken, self.path, lease_seconds, last.text)

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            # A failure to write is told by what the run itself writes; the lock is only for others.
            with contextlib.suppress(Exception):
                if read_lock_owner(self._directory) == self.owner:
                    self._write()

    def _record(self) -> str:
        self._beats += 1
        return json.dumps(self.owner._asdict() | {"beats": self._beats}).ljust(_WIDTH - 1) + "\n"

    def _write(self) -> None:
        if self._kernel_lock is None:
            write_text(self.path, self._record())
        else:  # into the very file that the kernel keeps, which another one must not replace
            with self.path.open("r+", newline="\n") as stream:
                stream.write(self._record())
                stream.truncate()  # a file longer than that was damaged before

    def _release_kernel_lock(self) -> None:
        if self._kernel_lock is not None:
            self._kernel_lock.release()

    def _refusal(self, owner: LockOwner | None) -> LockError:
        who = f"another process ({owner.text})" if owner else "another process"
        return LockError(
            f"{self._directory} is written by {who}; wait for it or end it, or use another "
            f"--workdir. Where no such process runs any more, delete {self.path}"
        )


@contextlib.contextmanager
def lock_run(
    directory: Path, verb: str, lease_seconds: float = LEASE_SECONDS
) -> Iterator[RunLock | None]:
    """Holds the lock of a run directory, made where it is not there and removed if left empty.

    Process 0 of several takes it for all, and the others look whether they see it: their directory
    is then the same. A process that has it already keeps it: one that evaluates while it trains.

    Yields:
      The lock; None in the other processes, and where this one has it already.

    Raises:
      LockError: another process writes there.
      OSError: the directory cannot be written, or is not the same for all processes.
      DistributedError: one of these, in the processes where it did not come about.
    """
    pid, started = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
    owner = LockOwner(socket.gethostname(), pid, _start_ticks(pid) or 0, started, verb)
    lock, made = None, []
    with fail_together():
        if is_main_process():
            made = _make_workdir(directory)
            if not owner.is_same_process(read_lock_owner(directory)):
                lock = RunLock(directory, owner)
                lock.acquire(lease_seconds)
    try:
        _check_shared(directory, owner)
        yield lock
    finally:
        if lock is not None:
            lock.release()
        remove_empty_directories(made)


def _make_workdir(directory: Path) -> list[Path]:
    """The directories that were made, the innermost first."""
    made: list[Path] = []
    try:
        if not is_in_bucket(directory):
            check_writable(directory)
            made = make_directory(directory)
        make_writable(directory)
    except OSError as error:
        remove_empty_directories(made)
        raise OSError(f"cannot write to workdir {directory}: {error.strerror or error}") from error
    return made


def _check_shared(directory: Path, owner: LockOwner) -> None:
    """Raises OSError in every process where not all of them see the lock that process 0 holds.

    Orbax would wait for ever for the files of a process that writes into a directory of its own.
    """
    holder = LockOwner(*json.loads(gather_texts(json.dumps(owner), AGREE_SECONDS)[0]))
    with fail_together():
        deadline = time.monotonic() + SHARED_SECONDS
        # A file system of several machines may show a new file late.
        while not holder.is_same_process(read_lock_owner(directory)):
            if time.monotonic() > deadline:
                raise OSError(
                    f"workdir {directory} is not the directory of process 0 (host {holder.host}): "
                    f"the {LOCK} that it holds there is not to be seen here after "
                    f"{SHARED_SECONDS:g} s. All processes need one directory that they share, on "
                    "a network file system or in a bucket: --workdir gs://BUCKET/PATH"
                )
            time.sleep(0.2)


def read_lock_owner(directory: Path) -> LockOwner | None:
    """Who holds the lock of a run directory, dead or alive; None where nobody does, or where the
    file was cut off."""
    path = directory / LOCK
    try:
        content: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        owner = LockOwner(**{name: content[name] for name in LockOwner._fields})
        return owner if 0 < owner.pid < 2**31 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def is_owner_alive(owner: LockOwner) -> bool:
    """Whether that process is there; True for one on another machine, which cannot be seen."""
    return owner.host != socket.gethostname() or _start_ticks(owner.pid) == owner.began


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks; None where there is none.

    0 where the system has no /proc: the id alone must do.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it is another user's
        pass
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *fields = status.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in ("Z", "X") else int(fields[18])
