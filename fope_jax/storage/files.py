"""Atomic file writes: a reader sees the old file or the new one, also in a bucket."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fope_jax.storage.content import HEAD_BYTES, detect_content
from fope_jax.storage.paths import bucket_errors, is_in_bucket

_SECONDS_BETWEEN_WRITES = 10.0


def write_text(path: Path, text: str) -> None:
    """Writes a temporary file, flushes it to disk and renames it to ``path``."""
    if is_in_bucket(path):
        with bucket_errors(os.fspath(path)):
            path.write_bytes(text.encode())
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; the ValueError for anything else names the file."""
    stored = path.read_bytes()
    try:
        content = json.loads(stored)
    except (ValueError, RecursionError) as error:
        if found := detect_content(stored[:HEAD_BYTES]):
            raise ValueError(f"{path} is {found.kind}; {found.advice}") from error
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: {content!r:.60}")
    return content


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """`read_json`; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with line numbers from 1, without a cut-off last line.

    Raises:
      ValueError: another line is no JSON object; names the line.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, row
        elif line.endswith((b"\n", b"\r")):
            text = line[:60].decode(errors="replace").rstrip()
            raise ValueError(f"{path}, line {number} is no JSON object: {text!r}")


class LineWriter:
    """Appends lines to a file; lines that cannot be written are kept for the next try."""

    def __init__(self, path: Path):
        self._path, self._left = path, b""
        # Unbuffered: after an error a buffer's lines would be lost or written twice.
        self._stream = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Appends a line; after an OSError the file still ends in a whole line."""
        self._left += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes all kept lines; raises OSError as `write` does."""
        if not self._left:
            return
        size = os.fstat(self._stream.fileno()).st_size
        try:
            text = memoryview(self._left)
            while text:
                text = text[self._stream.write(text) :]
        except OSError as error:
            self._stream.truncate(size)
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"cannot write {self._path}: {reason}") from error
        self._left = b""

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._stream.close()


class BucketLineWriter(LineWriter):
    """Rewrites the object, which cannot grow, at most every ``seconds``: buckets limit updates.

    A killed process loses the lines since the last flush.
    """

    def __init__(self, path: Path, seconds: float = _SECONDS_BETWEEN_WRITES):
        self._path, self._seconds = path, seconds
        self._text = path.read_bytes().decode() if path.exists() else ""
        self._written, self._last = self._text, time.monotonic()

    def write(self, line: str) -> None:
        self._text += line + "\n"
        if time.monotonic() - self._last >= self._seconds:
            self.flush()

    def flush(self) -> None:
        if self._text != self._written:
            write_text(self._path, self._text)
            self._written, self._last = self._text, time.monotonic()

    def close(self) -> None:
        self.flush()


def open_line_writer(path: Path) -> LineWriter:
    return BucketLineWriter(path) if is_in_bucket(path) else LineWriter(path)


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Bytes, and time of the last change in nanoseconds."""
    if is_in_bucket(path):
        status: Any = path.stat()
        return status.length, status.mtime * 10**9
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
