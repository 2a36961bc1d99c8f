"""Files that a reader finds whole: the old one or the new one, whatever happens in between.

On this machine or in a bucket. A path in a bucket (``gs://BUCKET/NAME``) is an `etils.epath.Path`,
which has the methods of pathlib and which Orbax takes as well; gcsfs does the work. Where the two
kinds differ, the difference is in this file: an object in a bucket appears whole by itself, nothing
can be added to it, and there are no directories.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from fope_jax.extras import require

ACCEPTED = "a path of this machine, or gs://BUCKET/PATH"
TRANSFERS = 8  # files read or written at once; one alone does not fill a network
_BUCKET = "gs://"
_SECONDS_BETWEEN_WRITES = 10.0
_ATTEMPTS, _SECONDS_TO_CONNECT = 3, 5.0  # before a bucket's service counts as out of reach


# ---------------------------------------------------------------------------- paths


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads into a bucket."""
    return os.fspath(path).startswith(_BUCKET)


def is_accepted(path: str) -> bool:
    """Whether `as_path` takes a path.

    >>> [is_accepted(path) for path in ("runs/x", "gs://b/x", "gs:///x", "s3://b/x")]
    [True, True, False, False]
    """
    scheme, mark, rest = path.partition("://")
    return not mark or (f"{scheme}{mark}" == _BUCKET and bool(rest.partition("/")[0]))


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine as it is, one in a bucket with the same methods.

    pathlib's own ``Path("gs://b/x")`` is a local directory ``gs:``, so this is what makes a path
    of everything that a user may give.

    Raises:
      ValueError: another scheme, such as ``s3://``.
      ImportError: a bucket, and gcsfs is not installed; the message holds the pip line.
    """
    text = os.fspath(path)
    if not is_accepted(text):
        raise ValueError(f"{text!r}; accepted: {ACCEPTED}")
    if not in_bucket(text):
        return Path(path)
    _file_system()
    return require("etils.epath", "buckets").Path(text)


def absolute(path: str | os.PathLike[str]) -> Path:
    """`as_path`, independent of the working directory."""
    found = as_path(path)
    return found if in_bucket(found) else found.absolute()


def resolved(path: str | os.PathLike[str]) -> Path:
    """`absolute`, the same for all spellings and links of one place of this machine."""
    found = as_path(path)
    try:
        return found if in_bucket(found) else found.resolve()
    except RuntimeError as error:  # what pathlib before Python 3.13 says of a loop of links
        raise OSError(str(error)) from error


def _file_system() -> Any:
    """The gcsfs file system that epath uses as well."""
    require("gcsfs", "buckets")
    # epath would rather import TensorFlow where it is installed; that takes seconds, and memory.
    os.environ.setdefault("EPATH_USE_TF", "0")
    fsspec: Any = require("fsspec", "buckets")
    # TensorStore and other processes write too: a remembered listing would miss their objects.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


def check_bucket(path: str | os.PathLike[str]) -> None:
    """Asks for one object, so that a wrong bucket is found before any work; local paths pass.

    Raises:
      OSError: in one line, that there is no such bucket or that it refuses.
    """
    if not in_bucket(path):
        return
    bucket = os.fspath(path).removeprefix(_BUCKET).partition("/")[0]
    with _one_line(f"{os.fspath(path)}: bucket gs://{bucket}"):
        _check_reachable(urlsplit(_file_system().base))
        _file_system().call("GET", "b/{}/o", bucket, maxResults="1")


def _check_reachable(service: SplitResult) -> None:
    """Raises OSError where nothing answers; gcsfs alone would try again for a minute."""
    port = service.port or (80 if service.scheme == "http" else 443)
    for attempt in range(_ATTEMPTS):
        try:
            with socket.create_connection((service.hostname or "", port), _SECONDS_TO_CONNECT):
                return
        except OSError as error:
            if attempt == _ATTEMPTS - 1:
                raise OSError(f"no connection to {service.hostname}:{port}: {error}") from error
            time.sleep(1)


@contextlib.contextmanager
def _one_line(place: str) -> Iterator[None]:
    """Whatever a bucket's libraries raise, as one OSError that begins with ``place``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place} does not exist") from error
    except Exception as error:  # of aiohttp, google.auth, gcsfs: only some are OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{place} refuses or cannot be reached: {reason}") from error


def check_writable(directory: Path) -> None:
    """Finds out whether files can be written to ``directory``, and leaves nothing behind.

    Where it is not there, whether it can be made: whether its nearest parent can be written.

    Raises:
      OSError: they cannot; the message is the system's.
    """
    if in_bucket(directory):
        make_writable(directory)
        return
    for place in (directory, *directory.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()  # `exists` would pass over a name that is too long, or a loop of links
            break
    else:
        return
    with tempfile.TemporaryFile(dir=place):
        pass


def check_output(directory: Path, what: str) -> None:
    """`check_writable` before long work whose result goes there.

    Args:
      directory: of this machine or in a bucket.
      what: that is written, for the message: "the report".

    Raises:
      OSError: in one line, that ``what`` cannot be written there and why.
    """
    try:
        check_writable(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write {what} to {directory}: {reason}") from error


def check_space(directory: Path, size: int, what: str) -> None:
    """Raises OSError where the disk of ``directory`` has no room for ``size`` bytes of ``what``.

    What a bucket has room for is not known.
    """
    if in_bucket(directory):
        return
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise OSError(
            f"{directory}: {what} takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        )


def make_directory(directory: Path) -> list[Path]:
    """Makes ``directory`` with its parents; those that were not there, the innermost first."""
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes what `make_directory` made, where nothing was begun in it."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def make_writable(directory: Path) -> None:
    """Makes ``directory`` and finds out whether files can be written there.

    Raises:
      OSError: they cannot.
    """
    if in_bucket(directory):
        bucket = os.fspath(directory).removeprefix(_BUCKET).partition("/")[0]
        with _one_line(f"bucket gs://{bucket}"):
            probe = directory / ".writable"
            probe.write_bytes(b"?")
            probe.unlink()
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def inside(directory: Path, name: Any) -> Path:
    """``directory / name``, for a name that comes from a file and not from the user.

    Raises:
      ValueError: it is no relative path, or leads out of the directory.

    >>> inside(Path("runs"), "a/b.txt").as_posix()
    'runs/a/b.txt'
    """
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [""]
    if any(part in ("", "..") for part in parts) or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{name!r:.80} is no path within {directory}")
    return directory / name


def user_cache() -> Path:
    """What is kept between runs of this user: $FOPE_CACHE, or the user's cache directory."""
    own = os.environ.get("FOPE_CACHE")
    root = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(root) if root else Path.home() / ".cache") / "fope_jax"


# ---------------------------------------------------------------------------- what a file holds

UTF8_MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before a text
HEAD_BYTES = 1024


class Content(NamedTuple):
    """What a file holds, as a noun, and what to do about it, as an order."""

    what: str
    advice: str


POINTER = Content(
    "a Git LFS pointer, not the file that it stands for", "fetch that with `git lfs pull`"
)
_UNPACK, _CONVERT = "unpack it first", "convert it first"
_MAGIC = (
    (rb"version https://git-lfs[^\n]*\noid sha256:", *POINTER),
    (
        rb"(\.\./)*(\.git)?/annex/objects/",
        "a git-annex pointer, not the file that it stands for",
        "fetch that with `git annex get`",
    ),
    (rb"\x1f\x8b", "gzip data", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "Zstandard data", _UNPACK),
    (rb"\xfd7zXZ\x00", "xz data", _UNPACK),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2 data", _UNPACK),
    (rb"\x04\x22\x4d\x18", "LZ4 data", _UNPACK),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb".{257}ustar(\x00|  \x00)", "a tar archive", _UNPACK),
    (rb"PAR1\x15", "a Parquet file", _CONVERT),
    (rb"ARROW1\x00\x00", "an Arrow file", _CONVERT),
    (rb"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (rb"%PDF-", "a PDF file", _CONVERT),
    (rb"\0{256}", "a file that begins with zero bytes, as a broken copy does", "fetch it again"),
)
_ENCODINGS = (
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "text in UTF-32", "convert it, as with iconv"),
    (
        # Without a mark as well: in UTF-8 that would be text with a zero byte after each letter.
        rb"\xff\xfe|\xfe\xff|([\x01-\x7f]\0){4}|(\0[\x01-\x7f]){4}",
        "text in UTF-16",
        "convert it, as with iconv",
    ),
)
# What servers send in place of a file that they do not give.
_MARKUP = (
    (rb"(\xef\xbb\xbf)?\s*(?i:<!doctype html|<html)", "an HTML page", "fetch it again"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML document", "fetch it again"),
)


def content_of(head: bytes, text: bool = False) -> Content | None:
    """What a file holds that is neither text nor JSON, by its first ``HEAD_BYTES`` bytes.

    Args:
      head: the bytes.
      text: whether any text in UTF-8 is accepted, pages of markup too.

    >>> content_of(b"PK\\3\\4...")
    Content(what='a zip archive', advice='unpack it first')
    """
    for pattern, what, advice in (*_MAGIC, *_ENCODINGS, *(() if text else _MARKUP)):
        if re.match(pattern, head, re.DOTALL):
            return Content(what, advice)
    return None


def is_other_encoding(content: Content) -> bool:
    """Whether a file is text, but not in UTF-8."""
    return content in [Content(what, advice) for _, what, advice in _ENCODINGS]


def read_head(path: Path) -> bytes:
    """The first ``HEAD_BYTES`` bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError:
        return b""


# ---------------------------------------------------------------------------- whole files


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` under another name, flushes it to disk, then takes the name of ``path``.

    An object in a bucket is replaced as a whole by the service.
    """
    if in_bucket(path):
        with _one_line(os.fspath(path)):
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
    """The JSON object in a file.

    Raises:
      ValueError: it holds something else; the message names the file.
    """
    stored = path.read_bytes()
    try:
        content = json.loads(stored)
    except (ValueError, RecursionError) as error:
        if found := content_of(stored[:HEAD_BYTES]):
            raise ValueError(f"{path} is {found.what}; {found.advice}") from error
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: {content!r:.60}")
    return content


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


class LineFile:
    """A text file that grows line by line; what it held before stays.

    Lines that cannot be written, as on a full disk, are kept and written before the next one.
    """

    def __init__(self, path: Path):
        self._path, self._left = path, b""
        # Without a buffer: one that cannot be written would be lost, or written twice.
        self._stream = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Adds a line; it is on its way to the file when this returns, whatever follows.

        Raises:
          OSError: it cannot be written; the file ends in a whole line.
        """
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


class ObjectLines(LineFile):
    """The same in a bucket, where nothing can be added to an object: it is written whole again.

    Not for each line, which a bucket would refuse as too often; a killed process loses the lines
    of the last seconds, but none from before a `flush`.

    Args:
      path: the object.
      seconds: least time between two writes that nobody asked for.
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


def open_lines(path: Path) -> LineFile:
    """Opens a file to add lines to it."""
    return ObjectLines(path) if in_bucket(path) else LineFile(path)


# ---------------------------------------------------------------------------- many files


def list_tree(directory: Path) -> dict[str, int]:
    """Sizes of all files below ``directory`` by their path within it, sorted."""
    if in_bucket(directory):
        top = os.fspath(directory).removeprefix(_BUCKET).rstrip("/") + "/"
        found = _file_system().find(top, detail=True)
        sizes = {name.removeprefix(top): info["size"] for name, info in found.items()}
    else:
        files = (path for path in directory.rglob("*") if path.is_file())
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    return dict(sorted(sizes.items()))


def remove_tree(directory: Path) -> None:
    """Removes ``directory`` with all below it, where it is there."""
    if in_bucket(directory):
        with contextlib.suppress(FileNotFoundError):
            directory.rmtree()  # type: ignore[attr-defined]
    elif directory.exists():
        shutil.rmtree(directory)


def move_tree(directory: Path, target: Path) -> None:
    """Gives ``directory`` another name, which is free; in a bucket, objects are copied there."""
    if in_bucket(directory):
        for name in list_tree(directory):
            _file_system().cp_file(os.fspath(directory / name), os.fspath(target / name))
        remove_tree(directory)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(target)


def glob_files(pattern: str) -> list[Path]:
    """The files that a glob matches; ``**`` stands for any number of directories."""
    if in_bucket(pattern):
        check_bucket(pattern)
        found = _file_system().glob(pattern, detail=True)
        return [as_path(_BUCKET + name) for name, info in found.items() if info["type"] == "file"]
    return [Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]


def glob_directories(pattern: str) -> list[Path]:
    """The directories that a glob matches."""
    if in_bucket(pattern):
        found = _file_system().glob(pattern, detail=True)
        return [as_path(_BUCKET + n) for n, info in found.items() if info["type"] == "directory"]
    return [Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_dir()]


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it was changed in nanoseconds."""
    if in_bucket(path):
        status: Any = path.stat()
        return status.length, status.mtime * 10**9
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_sha256(directory: Path, skip: str) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of all files below ``directory`` but the one called ``skip``."""
    sizes = {name: size for name, size in list_tree(directory).items() if name != skip}
    with ThreadPoolExecutor(TRANSFERS) as pool:
        digests = pool.map(file_sha256, (directory / name for name in sizes))
        return {
            name: {"sha256": digest, "bytes": size}
            for (name, size), digest in zip(sizes.items(), digests, strict=True)
        }
