"""Paths on this machine and in buckets.

A path in a bucket (``gs://BUCKET/NAME``) is an `etils.epath.Path`, which has the methods of pathlib
and which Orbax takes as well; gcsfs does the work.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fope_jax.extras import require

SUPPORTED_PATHS = "a path of this machine, or gs://BUCKET/PATH"
BUCKET_SCHEME = "gs://"
_ATTEMPTS, _SECONDS_TO_CONNECT = 3, 5.0  # before a bucket's service counts as out of reach


def is_in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads into a bucket."""
    return os.fspath(path).startswith(BUCKET_SCHEME)


def is_supported_path(path: str) -> bool:
    """Whether `as_path` takes a path.

    >>> [is_supported_path(path) for path in ("runs/x", "gs://b/x", "gs:///x", "s3://b/x")]
    [True, True, False, False]
    """
    scheme, mark, rest = path.partition("://")
    return not mark or (f"{scheme}{mark}" == BUCKET_SCHEME and bool(rest.partition("/")[0]))


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user gives; pathlib's own ``Path("gs://b/x")`` is a directory ``gs:`` here.

    Raises:
      ValueError: another scheme, such as ``s3://``.
      ImportError: a bucket, and gcsfs is not installed; the message holds the pip line.
    """
    text = os.fspath(path)
    if not is_supported_path(text):
        raise ValueError(f"{text!r}; accepted: {SUPPORTED_PATHS}")
    if not is_in_bucket(text):
        return Path(path)
    _import_fsspec()
    return require("etils.epath", "buckets").Path(text)


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """`as_path`, independent of the working directory."""
    found = as_path(path)
    return found if is_in_bucket(found) else found.absolute()


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """`absolute_path`, the same for all spellings and links of one place of this machine."""
    found = as_path(path)
    try:
        return found if is_in_bucket(found) else found.resolve()
    except RuntimeError as error:  # what pathlib before Python 3.13 says of a loop of links
        raise OSError(str(error)) from error


def path_within(directory: Path, name: Any) -> Path:
    """``directory / name``, for a name that comes from a file and not from the user.

    Raises:
      ValueError: it is no relative path, or leads out of the directory.

    >>> path_within(Path("runs"), "a/b.txt").as_posix()
    'runs/a/b.txt'
    """
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [""]
    if any(part in ("", "..") for part in parts) or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{name!r:.80} is no path within {directory}")
    return directory / name


def user_cache_dir() -> Path:
    """What is kept between runs of this user: $FOPE_CACHE, or the user's cache directory."""
    if directory := os.environ.get("FOPE_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fope_jax"


def gcs_file_system() -> Any:
    """The gcsfs file system that epath uses as well."""
    return _import_fsspec().filesystem("gcs")


def _import_fsspec() -> Any:
    require("gcsfs", "buckets")
    # epath would rather import TensorFlow where it is installed; that takes seconds, and memory.
    os.environ.setdefault("EPATH_USE_TF", "0")
    fsspec: Any = require("fsspec", "buckets")
    # TensorStore and other processes write too: a remembered listing would miss their objects.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec


def bucket_name(path: str | os.PathLike[str]) -> str:
    """The bucket of a path in one."""
    return os.fspath(path).removeprefix(BUCKET_SCHEME).partition("/")[0]


def check_bucket(path: str | os.PathLike[str]) -> None:
    """Raises OSError, in one line, where a path leads into a bucket that is absent or refuses."""
    if not is_in_bucket(path):
        return
    bucket = bucket_name(path)
    with bucket_errors(f"{os.fspath(path)}: bucket gs://{bucket}"):
        _check_reachable(urlsplit(gcs_file_system().base))
        gcs_file_system().call("GET", "b/{}/o", bucket, maxResults="1")


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


def create_object(path: Path, text: str) -> bool:
    """Writes an object of a bucket where it is absent; whether it was, decided by the service."""
    with bucket_errors(os.fspath(path)), contextlib.suppress(FileExistsError):
        gcs_file_system().pipe_file(os.fspath(path), text.encode(), mode="create")
        return True
    return False


@contextlib.contextmanager
def bucket_errors(place: str) -> Iterator[None]:
    """Whatever a bucket's libraries raise, as one OSError that begins with ``place``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place} does not exist") from error
    except Exception as error:  # of aiohttp, google.auth, gcsfs: only some are OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{place} refuses or cannot be reached: {reason}") from error


def glob_paths(pattern: str, kind: str = "file") -> list[Path]:
    """What a glob matches, "file" or "directory"; ``**`` stands for any number of directories."""
    if is_in_bucket(pattern):
        check_bucket(pattern)
        found = gcs_file_system().glob(pattern, detail=True)
        return [
            as_path(BUCKET_SCHEME + name) for name, info in found.items() if info["type"] == kind
        ]
    paths = map(Path, glob.glob(pattern, recursive=True))
    return [path for path in paths if (path.is_file() if kind == "file" else path.is_dir())]
