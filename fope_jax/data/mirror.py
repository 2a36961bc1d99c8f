"""Copies a directory from a bucket and back; its manifest, written last, marks it as complete."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fope_jax.extras import require
from fope_jax.logs import is_quiet, report_progress
from fope_jax.storage.directories import (
    PARALLEL_TRANSFERS,
    list_file_sizes,
    make_directory,
    remove_empty_directories,
)
from fope_jax.storage.files import file_sha256
from fope_jax.storage.paths import is_in_bucket, path_within, user_cache_dir

log = logging.getLogger(__name__)

_CHUNK = 2**22


class MirrorError(RuntimeError):
    """A file in a bucket is missing or not what its manifest says."""


@contextlib.contextmanager
def exclusive_lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """One process at a time; the system releases the lock of a killed process.

    ``waiting`` is called before waiting. If the body fails, the lock file and its new directories
    are removed.
    """
    made: list[Path] = []
    while True:
        made += make_directory(path.parent)  # its holder may have failed and removed it
        with open(path, "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream.fileno(), path):
                continue  # its holder failed and removed it
            try:
                yield
            except BaseException:
                path.unlink(missing_ok=True)
                remove_empty_directories(made)
                raise
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def local_directory(path: Path) -> Path:
    """The local directory for the files of ``path``: itself, or a cache directory for a bucket."""
    if not is_in_bucket(path):
        return path
    digest = hashlib.sha256(str(path).rstrip("/").encode()).hexdigest()
    return user_cache_dir() / "buckets" / digest[:12]


def copy_directory(remote: Path, manifest: bytes, hashes: Mapping[str, str]) -> Path:
    """Where the copy of ``remote`` with that manifest is on this machine, if there is one."""
    digest = hashlib.sha256(manifest + json.dumps(sorted(hashes.items())).encode()).hexdigest()
    return user_cache_dir() / "mirrors" / f"{remote.name}-{digest[:12]}"


def copy_checked(
    source: Path,
    target: Path,
    expected: str | None,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Copies a file, which gets its name when it is complete and has the ``expected`` sha256.

    MirrorError if it has another. ``progress`` is called with the bytes of each piece.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        _copy(source, unfinished, progress)
    except OSError:
        unfinished.unlink(missing_ok=True)  # it may have filled the disk
        raise
    if expected and (actual := file_sha256(unfinished)) != expected:
        unfinished.unlink()
        raise MirrorError(
            f"{source} is damaged: sha256 {actual[:16]}..., expected {expected[:16]}..."
        )
    os.replace(unfinished, target)


def download(remote: Path, manifest: str, content: bytes, hashes: Mapping[str, str]) -> Path:
    """Copies ``remote`` to this machine, once for all processes and later runs.

    Copies are keyed by the manifest's ``content``, so an older one is not reused. An interrupted
    download continues. Files without a sha256 in ``hashes`` are copied unchecked. MirrorError if a
    file is missing or has another sha256.
    """
    local = copy_directory(remote, content, hashes)
    if local.is_dir():
        return local

    def waiting() -> None:
        report_progress(f"another process downloads {remote}: waiting for it", log)

    with exclusive_lock(local.with_name(local.name + ".lock"), waiting):
        if local.is_dir():
            return local
        partial = local.with_name(local.name + ".partial")
        sizes = {name: size for name, size in list_file_sizes(remote).items() if name != manifest}
        absent = sorted(hashes.keys() - sizes.keys())
        if absent:
            raise MirrorError(f"{remote / absent[0]} is missing")

        def copy(name: str, progress: Callable[[int], Any]) -> None:
            target, expected = path_within(partial, name), hashes.get(name)
            if expected and target.is_file() and file_sha256(target) == expected:
                progress(target.stat().st_size)
                return
            copy_checked(remote / name, target, expected, progress)

        _transfer(f"download {remote.name}", sizes, copy)
        (partial / manifest).write_bytes(content)
        partial.rename(local)
    return local


def upload(local: Path, remote: Path, manifest: str) -> None:
    """Copies the directory ``local`` to ``remote`` and removes other files there."""
    (remote / manifest).unlink(missing_ok=True)
    sizes = {name: size for name, size in list_file_sizes(local).items() if name != manifest}
    for name in list_file_sizes(remote).keys() - sizes.keys():
        (remote / name).unlink()

    def copy(name: str, progress: Callable[[int], Any]) -> None:
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(local / name, remote / name, progress)

    _transfer(f"upload {remote.name}", sizes, copy)
    _copy(local / manifest, remote / manifest, lambda _: None)


def _copy(source: Path, target: Path, progress: Callable[[int], Any]) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            progress(len(chunk))


def _transfer(
    label: str, sizes: Mapping[str, int], copy: Callable[[str, Callable[[int], Any]], None]
) -> None:
    """Runs ``copy(name, progress)`` for all files in parallel, with a progress bar of bytes."""
    tqdm = require("tqdm", "train").tqdm
    total = sum(sizes.values())
    with (
        tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=is_quiet()) as bar,
        ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool,
    ):
        for _ in pool.map(lambda name: copy(name, bar.update), sizes):
            pass  # waits for all and raises the first exception
