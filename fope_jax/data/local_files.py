"""Reads ranges of the files of a directory, of which some stay open."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_OPEN_FILES = 256  # a process may often have 1,024, and a cache has three for each shard


class _OpenFile:
    """Closed when nobody reads it any more, so that a thread may read what another one drops."""

    def __init__(self, path: str):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, begin: int, end: int) -> bytes:
        # The call holds `self`: a descriptor alone would be closed, and its number given to
        # another file, once the cache of open files has dropped its owner.
        return os.pread(self._descriptor, end - begin, begin)

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)


class LocalFiles:
    """The files of ``directory``; any number of threads may read."""

    def __init__(self, directory: Path):
        prefix = f"{directory}/"
        self._open = functools.lru_cache(_OPEN_FILES)(lambda file: _OpenFile(prefix + file))

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Bytes ``[begin, end)``, fewer where the file ends; FileNotFoundError, OSError."""
        return self._open(file).read(begin, end)
