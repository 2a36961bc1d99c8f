"""The lock of a run directory: a second writer stops at once and names the first.

``run.lock`` holds the owner as JSON. On one machine the kernel holds the lock (flock, through
filelock) until the process ends. Process id and start time tell whether an owner lives: ids are
reused.

Other machines see only the file, in which the owner increments a counter. A lock without a change
for a lease is taken over. In a bucket the object is created only if absent, so one process gets it.
If two take over a dead lock at once, the overwritten one notices before its next checkpoint and
stops.
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
LEASE_SECONDS = 45.0  # an owner on another machine without a heartbeat for this long is dead
SHARED_SECONDS = 20.0  # a lock not visible after this long is in another directory
_WIDTH = 512  # bytes of the file, constant so that it is overwritten in place


class LockError(OSError):
    """Another process writes into the run directory; the message names it."""


class LockOwner(NamedTuple):
    """The process that writes into a run directory, and its verb ("train").

    ``began``: start of the process in clock ticks since boot, 0 if unknown; ``started``: when it
    took the lock.
    """

    host: str
    pid: int
    began: int
    started: str
    verb: str

    @property
    def text(self) -> str:
        """``fope train, host box, pid 12, since 2026-01-01T10:00:00+00:00``."""
        return f"fope {self.verb}, host {self.host}, pid {self.pid}, since {self.started}"

    def is_same_process(self, other: LockOwner | None) -> bool:
        return other is not None and self[:3] == other[:3]


class RunLock:
    """The right to write into one run directory, until `release`."""

    def __init__(self, directory: Path, owner: LockOwner):
        self.path, self.owner = directory / LOCK, owner
        self._directory, self._beats = directory, 0
        filelock = require("filelock", "train")
        self._kernel_lock = None if is_in_bucket(directory) else filelock.FileLock(self.path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name=LOCK, daemon=True)

    def acquire(self, lease_seconds: float) -> None:
        """Takes the lock, also from a dead owner; raises LockError if the owner is alive."""
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
        """Raises LockError if another process took the lock over."""
        try:
            owner = read_lock_owner(self._directory)
        except Exception:  # of any bucket library; the next write reports it
            return
        if owner is not None and owner != self.owner:
            raise LockError(
                f"{self.path} belongs to another process now ({owner.text}): this one did not "
                "answer for too long, and stops before it writes over the other's files"
            )

    def release(self) -> None:
        """Removes the lock, unless another process owns it by now."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            if read_lock_owner(self._directory) == self.owner:
                self.path.unlink()
        self._release_kernel_lock()

    def _wait_for_death(self, last: LockOwner, lease_seconds: float) -> None:
        """Returns if ``last`` is dead; raises LockError if it is alive."""
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
            # The run's own writes report a full disk; the heartbeat must not end the run.
            with contextlib.suppress(Exception):
                if read_lock_owner(self._directory) == self.owner:
                    self._write()

    def _record(self) -> str:
        self._beats += 1
        return json.dumps(self.owner._asdict() | {"beats": self._beats}).ljust(_WIDTH - 1) + "\n"

    def _write(self) -> None:
        if self._kernel_lock is None:
            write_text(self.path, self._record())
        else:  # in place: replacing the file would drop the kernel's lock
            with self.path.open("r+", newline="\n") as stream:
                stream.write(self._record())
                stream.truncate()  # a longer file was damaged

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
    """Holds the lock of a run directory, which is made if missing and removed if left empty.

    Process 0 takes it for all; the others check that they see it. A process that has it already
    (it evaluates during training) keeps it.

    Yields:
      The lock; None in other processes, and in a process that has it already.

    Raises:
      LockError: another process writes there.
      OSError: the directory cannot be written, or differs between processes.
      DistributedError: another process of the run raised one of these.
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
    """Raises OSError in all processes unless they share a directory: Orbax would wait forever."""
    holder = LockOwner(*json.loads(gather_texts(json.dumps(owner), AGREE_SECONDS)[0]))
    with fail_together():
        deadline = time.monotonic() + SHARED_SECONDS
        # A network file system may show a new file late.
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
    """The owner in the lock file, dead or alive; None without a readable one."""
    path = directory / LOCK
    try:
        content: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        owner = LockOwner(**{name: content[name] for name in LockOwner._fields})
        return owner if 0 < owner.pid < 2**31 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def is_owner_alive(owner: LockOwner) -> bool:
    """Whether the process exists; True for one on another machine."""
    return owner.host != socket.gethostname() or _start_ticks(owner.pid) == owner.began


def _start_ticks(pid: int) -> int | None:
    """When a local process began, in clock ticks; None if it is gone, 0 without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # a process of another user
        pass
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *fields = status.rpartition(")")[2].split()  # the name in () may contain anything
    return None if state in ("Z", "X") else int(fields[18])
