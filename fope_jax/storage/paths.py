"""Local paths, and paths in buckets (gs://BUCKET/NAME) as `etils.epath.Path`, through gcsfs."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fope_jax.extras import require

LOCAL_PATHS = "a path of this machine"
SUPPORTED_PATHS = f"{LOCAL_PATHS}, or gs://BUCKET/PATH"
BUCKET_SCHEME = "gs://"
# Else epath reads buckets through TensorFlow if that is installed, which takes seconds and memory,
# and raises errors of its own. It decides at its first path of any kind, as when JAX keeps a
# compiled program: later is too late.
if importlib.util.find_spec("gcsfs"):
    os.environ.setdefault("EPATH_USE_TF", "0")
_ATTEMPTS, _SECONDS_TO_CONNECT = 3, 5.0  # before a bucket's service counts as unreachable


def is_in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKET_SCHEME)


def is_supported_path(path: str) -> bool:
    """Whether `as_path` accepts a path.

    >>> [is_supported_path(path) for path in ("runs/x", "gs://b/x", "gs:///x", "s3://b/x")]
    [True, True, False, False]
    """
    scheme, mark, rest = path.partition("://")
    return not mark or (f"{scheme}{mark}" == BUCKET_SCHEME and bool(rest.partition("/")[0]))


def expand_home(path: str | os.PathLike[str]) -> str:
    """``path`` with the home directory for a leading ``~``.

    A shell leaves it in ``--workdir=~/runs/x``, and a notebook has no shell: pathlib would make a
    directory called ``~``.
    """
    text = os.fspath(path)
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine, see `expand_home`; ValueError for a URL, such as a bucket's.

    As a Path it would make a directory called "gs:".
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text!r}; accepted: {LOCAL_PATHS}")
    return Path(expand_home(text))


def as_path(path: str | os.PathLike[str]) -> Path:
    """A local path, see `expand_home`, or one in a bucket, which pathlib would take for ``gs:``.

    Raises:
      ValueError: another scheme, such as ``s3://``.
      ImportError: a bucket without gcsfs; the message has the pip command.
    """
    text = os.fspath(path)
    if not is_supported_path(text):
        raise ValueError(f"{text!r}; accepted: {SUPPORTED_PATHS}")
    if not is_in_bucket(text):
        return Path(expand_home(path))
    _import_fsspec()
    return require("etils.epath", "buckets").Path(text)


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """`as_path`, independent of the working directory."""
    found = as_path(path)
    return found if is_in_bucket(found) else found.absolute()


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """`absolute_path` with links resolved: one spelling for each local file."""
    found = as_path(path)
    try:
        return found if is_in_bucket(found) else found.resolve()
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise OSError(str(error)) from error


def path_within(directory: Path, name: Any) -> Path:
    """``directory / name`` for an untrusted name, such as one read from a file.

    Raises:
      ValueError: the name is not relative, or leads out of the directory.

    >>> path_within(Path("runs"), "a/b.txt").as_posix()
    'runs/a/b.txt'
    """
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [""]
    if any(part in ("", "..") for part in parts) or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{name!r:.80} is no path within {directory}")
    return directory / name


def user_cache_dir() -> Path:
    """$FOPE_CACHE, or ``fope_jax`` in the user's cache directory."""
    if directory := os.environ.get("FOPE_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fope_jax"


def gcs_file_system() -> Any:
    """The gcsfs file system that epath uses too."""
    return _import_fsspec().filesystem("gcs")


def _import_fsspec() -> Any:
    require("gcsfs", "buckets")
    fsspec: Any = require("fsspec", "buckets")
    # TensorStore and other processes write too: a cached listing would miss their objects.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec


def bucket_name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).removeprefix(BUCKET_SCHEME).partition("/")[0]


def check_bucket(path: str | os.PathLike[str]) -> None:
    """Raises a one-line OSError if a path's bucket is absent or refuses access."""
    if not is_in_bucket(path):
        return
    bucket = bucket_name(path)
    with bucket_errors(f"{os.fspath(path)}: bucket gs://{bucket}"):
        _check_reachable(urlsplit(gcs_file_system().base))
        gcs_file_system().call("GET", "b/{}/o", bucket, maxResults="1")


def _check_reachable(service: SplitResult) -> None:
    """Raises OSError if nothing answers; gcsfs alone would retry for a minute."""
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
    """Creates an object in a bucket; False if it exists. The service decides, so this is atomic."""
    with bucket_errors(os.fspath(path)), contextlib.suppress(FileExistsError):
        gcs_file_system().pipe_file(os.fspath(path), text.encode(), mode="create")
        return True
    return False


@contextlib.contextmanager
def bucket_errors(place: str) -> Iterator[None]:
    """Turns any error of a bucket library into one OSError that begins with ``place``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place} does not exist") from error
    except Exception as error:  # aiohttp, google.auth and gcsfs raise more than OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{place} refuses or cannot be reached: {reason}") from error


def glob_paths(pattern: str, kind: str = "file") -> list[Path]:
    """Files or directories (``kind``) that match a glob; ``**`` is any number of directories.

    A link to nothing counts as a file: to read it fails, and to leave it out nobody would notice.
    """
    if is_in_bucket(pattern):
        check_bucket(pattern)
        found = gcs_file_system().glob(pattern, detail=True)
        return [
            as_path(BUCKET_SCHEME + name) for name, info in found.items() if info["type"] == kind
        ]
    paths = map(Path, glob.glob(expand_home(pattern), recursive=True))
    if kind == "directory":
        return [path for path in paths if path.is_dir()]
    return [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]
