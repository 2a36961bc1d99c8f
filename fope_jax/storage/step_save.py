"""Writes one checkpoint step while training goes on.

The arrays are on the host when `StepSave` is constructed; a thread writes them. Each process hashes
the files that it wrote. Process 0 joins them, hashes the few that are left and writes the manifest,
last of all. A step without one that has the file ``unfinished`` is no step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from fope_jax.processes.agreement import AGREE_SECONDS
from fope_jax.processes.collectives import is_main_process, wait_in_thread
from fope_jax.storage.directories import link_tree, list_file_sizes, remove_tree, tree_sha256
from fope_jax.storage.files import read_json, write_json, write_text
from fope_jax.storage.paths import is_in_bucket

log = logging.getLogger(__name__)

MANIFEST, METADATA, UNFINISHED = "manifest.json", "metadata.json", "unfinished"
NOT_LISTED = (MANIFEST, UNFINISHED)  # files of a step that are not in its manifest
_CHECKSUMS = "checksums"  # of one process, until the manifest has them
_SEEN_SECONDS = 20.0  # a network file system may show another host's new file late
_saves = itertools.count()  # the name of a barrier can be used once


class StoredItem(NamedTuple):
    """An item of a valid step: its directory, bytes and ``{name: "float32[8,64]"}``."""

    directory: Path
    size: int
    arrays: dict[str, str]


def begin_step(path: Path, names: Mapping[str, Any]) -> None:
    """Makes the directory of a step and of its items, marked as unfinished; by process 0."""
    if not is_in_bucket(path):
        path.mkdir(parents=True)
    write_text(path / UNFINISHED, "")  # first: without it the rest would pass for a damaged step
    if not is_in_bucket(path):
        for name in names:
            (path / name).mkdir()


def remove_unfinished_step(path: Path) -> None:
    """Removes a step; killed in the middle of it, the rest is still marked as unfinished."""
    if path.is_dir():
        for item in path.iterdir():
            if item.name != UNFINISHED:
                remove_tree(item) if item.is_dir() else item.unlink()
    remove_tree(path)


def is_unfinished(path: Path) -> bool:
    """Whether a save of this step is under way, or was cut off."""
    return (path / UNFINISHED).exists() and not (path / MANIFEST).exists()


class StepSave:
    """One step on its way to storage; the arrays may change once this is constructed.

    All processes construct it together. None raises: what fails is in ``error`` after `join`.

    Args:
      handler: writes the arrays.
      path: directory of the step, after `begin_step`.
      trees: name of each item -> pytree of arrays, none empty.
      content: what metadata.json gets.
      shared: items of another run that get a second name here.
      end: called by process 0 with the error, or None, before any process goes on.

    Attributes:
      error: why the step is not valid in this process; None before the end and after a success.
      seconds: from the construction to the manifest.
      size: bytes of all files; in process 0.
    """

    def __init__(
        self,
        handler: ocp.StandardCheckpointHandler,
        path: Path,
        trees: Mapping[str, Any],
        content: Mapping[str, Any],
        shared: Mapping[str, StoredItem],
        end: Callable[[Exception | None], None],
    ):
        self.path, self.step = path, int(path.name)
        self.error: Exception | None = None
        self.seconds, self.size = 0.0, 0
        self._handler, self._names, self._content = handler, [*trees], content
        self._shared, self._end = shared, end
        self._barrier, self._began = f"fope/save/{next(_saves)}", time.perf_counter()
        self._writes: list[Any] = []  # Orbax futures
        # In a thread: a notebook's main thread has an event loop that is running.
        with self._keep_error(), ThreadPoolExecutor(1) as pool:
            pool.submit(self._copy_arrays, trees).result()
        self._thread = threading.Thread(target=self._run, name=f"save {self.step}", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        """Waits until the step is valid, or has failed."""
        self._thread.join()

    def _copy_arrays(self, trees: Mapping[str, Any]) -> None:
        loop = asyncio.new_event_loop()  # `asyncio.run` may fail beside that of another thread
        try:
            for name, tree in trees.items():
                save = self._handler.async_save(
                    epath.Path(self.path / name), args=ocp.args.StandardSave(tree)
                )
                self._writes += loop.run_until_complete(save) or []
        finally:
            loop.close()

    def _run(self) -> None:
        for write in self._writes:  # all of them: a failed save is removed only when none writes
            with self._keep_error():
                write.result()
        self._writes.clear()  # they hold the arrays
        digests: dict[str, dict[str, Any]] = {}
        if self.error is None:
            with self._keep_error():
                digests = self._hash_written()
        with self._keep_error():
            self._hand_over(digests)
        self._wait("written")
        if is_main_process():
            if self.error is None:
                with self._keep_error():
                    self._complete(digests)
            with self._keep_error():
                self._end(self.error)
        self._wait("complete")
        if self.error is None and not is_main_process():
            with self._keep_error():
                self._wait_for(MANIFEST, "process 0 has not completed it: see its output")
        self.seconds = time.perf_counter() - self._began

    def _hash_written(self) -> dict[str, dict[str, Any]]:
        """sha256 and bytes of the files of this process, which no other changes."""
        digests, process = {}, jax.process_index()
        for name in self._names:
            own = f"{name}/ocdbt.process_{process}"
            found = tree_sha256(self.path / own)
            digests |= {f"{own}/{file}": digest for file, digest in found.items()}
        return digests

    def _hand_over(self, digests: dict[str, dict[str, Any]]) -> None:
        """Tells process 0 what this one has written, or why not."""
        if process := jax.process_index():
            error = "" if self.error is None else str(self.error) or type(self.error).__name__
            content = {"error": error, "files": digests}
            write_json(self.path / f"{_CHECKSUMS}.{process}", content)

    def _complete(self, digests: dict[str, dict[str, Any]]) -> None:
        path = self.path
        for process in range(1, jax.process_count()):
            part = f"{_CHECKSUMS}.{process}"
            self._wait_for(part, f"process {process} has not written its part: see its output")
            content = read_json(path / part)
            if content["error"]:
                raise OSError(f"process {process}: {content['error']}")
            digests |= content["files"]
            (path / part).unlink()
        for name in self._names:
            self._handler.finalize(epath.Path(path / name))
        for name, item in self._shared.items():
            link_tree(item.directory, path / name)
        write_json(path / METADATA, self._content)
        sizes = list_file_sizes(path)
        if absent := [file for file in digests if sizes.get(file) != digests[file]["bytes"]]:
            raise OSError(f"{absent[0]} is not as a process of the run has written it")
        self.size = sum(sizes.values())
        write_json(path / MANIFEST, {"files": tree_sha256(path, NOT_LISTED, digests)})
        (path / UNFINISHED).unlink()

    def _wait(self, part: str) -> None:
        """All processes come to each wait, also those that have failed."""
        with self._keep_error():
            wait_in_thread(f"{self._barrier}/{part}", AGREE_SECONDS)

    @contextlib.contextmanager
    def _keep_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any bucket library
            self.error = self.error or error

    def _wait_for(self, name: str, problem: str) -> None:
        """Waits for a file of another process; not for long once the step has been given up."""
        deadline = time.monotonic() + _SEEN_SECONDS
        while not (self.path / name).exists():
            if not (self.path / UNFINISHED).exists():
                deadline = min(deadline, time.monotonic() + 1)
            if time.monotonic() > deadline:
                raise OSError(f"{name} is not there: {problem}")
            time.sleep(0.1)
