"""The shards of a token cache in a bucket: read by range, and copied to this machine meanwhile.

    FOPE_CACHE/mirrors/NAME-DIGEST.shards/
        train-00000.index               whole from the first read on: it has the checksums
        train-00000.tokens              once the copy is complete; until then ranges are read
        train-00001.tokens.unfinished   a copy that is under way

A file gets its name when its sha256 is the manifest's. So a file that is there was checked, by
whichever process and run of this machine.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fope_jax.data.local_files import LocalFiles
from fope_jax.data.mirror import MirrorError, copy_checked, exclusive_lock
from fope_jax.storage.directories import PARALLEL_TRANSFERS
from fope_jax.storage.paths import bucket_errors, gcs_file_system, path_within

log = logging.getLogger(__name__)


class Range(NamedTuple):
    """Bytes ``[begin, end)`` of a file of a cache."""

    file: str
    begin: int
    end: int


class BucketShards:
    """Reads the files of one cache; any number of threads and processes may.

    Args:
      remote: the directory of the cache in a bucket.
      directory: for the copies, on this machine.
      hashes: sha256 of the files by name; others are copied unchecked.
      copies: whether files that ranges are read of are copied meanwhile.
    """

    def __init__(self, remote: Path, directory: Path, hashes: Mapping[str, str], copies: bool):
        self.remote, self.directory = remote, directory
        self._hashes, self._copies = hashes, copies
        self._files = LocalFiles(directory)
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._waiting: collections.deque[str] = collections.deque()
        self._threads = 0
        self._changed: dict[str, MirrorError] = {}

    def fetch(self, files: Iterable[str]) -> None:
        """Copies whole files, unless they are here.

        Raises:
          MirrorError: a file has another sha256.
          FileNotFoundError, OSError: it is missing; the bucket or this disk fails.
        """
        absent = [file for file in files if not (self.directory / file).exists()]
        if not absent:
            return
        with ThreadPoolExecutor(min(PARALLEL_TRANSFERS, len(absent))) as pool:
            for _ in pool.map(self._copy, absent):
                pass  # raises the first exception

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, fewer where a file ends; errors as of `fetch`.

        What has to come from the bucket is asked for together.
        """
        found: list[bytes | None] = [self._read_copy(part) for part in ranges]
        absent = [number for number, data in enumerate(found) if data is None]
        if absent:
            data = self._read_remote([ranges[number] for number in absent])
            for number, part in zip(absent, data, strict=True):
                found[number] = part
            if self._copies:
                self._begin_copies(ranges[number].file for number in absent)
        return [data for data in found if data is not None]

    def _read_copy(self, part: Range) -> bytes | None:
        if part.file in self._changed:
            raise self._changed[part.file]
        with contextlib.suppress(FileNotFoundError):
            return self._files.read(*part)
        return None

    def _read_remote(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        places = [os.fspath(self.remote / part.file) for part in ranges]
        found = gcs_file_system().cat_ranges(
            places, [part.begin for part in ranges], [part.end for part in ranges]
        )
        for place, data in zip(places, found, strict=True):
            if isinstance(data, BaseException):
                with bucket_errors(place):
                    raise data
            yield data

    def _copy(self, file: str) -> None:
        """Copies a file for all processes of this machine, once."""
        # The name may be any that an object in a bucket has.
        source, target = self.remote / file, path_within(self.directory, file)
        lock = target.with_name(f".{target.name}.lock")
        with exclusive_lock(lock, waiting=lambda: None):
            try:
                if not target.exists():
                    copy_checked(source, target, self._hashes.get(file))
            except (MirrorError, OSError):
                raise
            except Exception:  # of the bucket's library
                with bucket_errors(os.fspath(source)):
                    raise
            lock.unlink()

    # ------------------------------------------------------------------ copies beside the reading

    def _begin_copies(self, files: Iterable[str]) -> None:
        with self._lock:
            for file in files:
                if file in self._asked:
                    continue
                self._asked.add(file)
                self._waiting.append(file)
                if self._threads < PARALLEL_TRANSFERS:
                    self._threads += 1
                    # Daemons: a program that is done does not wait for copies that it began.
                    threading.Thread(target=self._copy_waiting, daemon=True).start()

    def _copy_waiting(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                file = self._waiting.popleft()
            try:
                self._copy(file)
            except MirrorError as error:
                self._changed[file] = error  # raised by the next read of the file
            except OSError as error:  # the disk is full, or the bucket is out of reach
                with self._lock:
                    self._waiting.clear()
                    if self._copies:
                        log.warning("no more shards are copied, but read by range: %s", error)
                    self._copies = False
