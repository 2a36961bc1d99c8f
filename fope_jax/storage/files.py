"""Files that a reader finds whole: the old one or the new one, whatever happens in between.

An object in a bucket appears whole by itself, and nothing can be added to it.
"""

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
    """Writes ``text`` under another name, flushes it to disk, then takes the name of ``path``."""
    if is_in_bucket(path):
        with bucket_errors(os.fspath(path)):
            path.write_bytes(text.encode())
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_text` of ``content`` as indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; the ValueError of one that holds something else names it."""
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


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with a JSON object a line, with the numbers of their lines from 1 on.

    A last line without an end was cut off when its writer was killed and is left out, unless it
    holds a whole object.

    Raises:
      ValueError: another line is no JSON object, with its number.
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
    """A text file that grows line by line; what it held before stays.

    Lines that cannot be written, as on a full disk, are kept and written before the next one.
    """

    def __init__(self, path: Path):
        self._path, self._left = path, b""
        # Without a buffer: one that cannot be written would be lost, or written twice.
        self._stream = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Adds a line; where the OSError says that it cannot be written, the file ends in a whole
        line."""
        self._left += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Returns when every line is in the file; raises OSError as `write` does."""
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
        """Closes the file after a last attempt to write what is left."""
        try:
            self.flush()
        finally:
            self._stream.close()


class BucketLineWriter(LineWriter):
    """The same in a bucket, where nothing can be added to an object: it is written whole again.

    Every ``seconds`` at most, as a bucket would refuse it for each line: a killed process loses the
    lines of the last seconds, but none from before a `flush`.
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
    """Opens a file to add lines to it."""
    return BucketLineWriter(path) if is_in_bucket(path) else LineWriter(path)


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it was changed in nanoseconds."""
    if is_in_bucket(path):
        status: Any = path.stat()
        return status.length, status.mtime * 10**9
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
