"""Directories on this machine and in buckets, where an object's name merely has slashes in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fope_jax.storage.files import file_sha256
from fope_jax.storage.paths import (
    BUCKET_SCHEME,
    bucket_errors,
    bucket_name,
    gcs_file_system,
    is_in_bucket,
)

PARALLEL_TRANSFERS = 8  # files read or written at once; one alone does not fill a network


def check_writable(directory: Path) -> None:
    """Raises OSError where files cannot be written to ``directory``; leaves nothing behind.

    Where it is not there, its nearest parent must be writable.
    """
    if is_in_bucket(directory):
        make_writable(directory)
        return
    for nearest in (directory, *directory.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            nearest.lstat()  # `exists` would pass over a name that is too long, or a loop of links
            break
    with tempfile.TemporaryFile(dir=nearest):
        pass


def make_writable(directory: Path) -> None:
    """Makes ``directory``, and raises OSError where files cannot be written there."""
    if is_in_bucket(directory):
        with bucket_errors(f"bucket gs://{bucket_name(directory)}"):
            probe = directory / ".writable"
            probe.write_bytes(b"?")
            probe.unlink()
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def check_output(directory: Path, what: str) -> None:
    """`check_writable` before long work; the OSError says that ``what`` cannot be written there."""
    try:
        check_writable(directory)
    except OSError as error:
        raise OSError(f"cannot write {what} to {directory}: {error.strerror or error}") from error


def check_space(directory: Path, size: int, what: str) -> None:
    """Raises OSError where the disk of ``directory`` has no room for ``size`` bytes of ``what``."""
    if is_in_bucket(directory):
        return
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < size:
        raise OSError(
            f"{directory}: {what} takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        )


def make_directory(directory: Path) -> list[Path]:
    """Makes ``directory`` with its parents; those that were not there, the innermost first."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty_directories(directories: Iterable[Path]) -> None:
    """Removes what `make_directory` made, where nothing was begun in it."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def list_file_sizes(directory: Path) -> dict[str, int]:
    """Sizes of all files below ``directory`` by their path within it, sorted."""
    if is_in_bucket(directory):
        top = os.fspath(directory).removeprefix(BUCKET_SCHEME).rstrip("/") + "/"
        found = gcs_file_system().find(top, detail=True)
        sizes = {name.removeprefix(top): info["size"] for name, info in found.items()}
    else:
        files = (path for path in directory.rglob("*") if path.is_file())
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    return dict(sorted(sizes.items()))


def tree_sha256(directory: Path, skip: str) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of all files below ``directory`` but the one called ``skip``."""
    sizes = {name: size for name, size in list_file_sizes(directory).items() if name != skip}
    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        digests = pool.map(file_sha256, (directory / name for name in sizes))
        return {
            name: {"sha256": digest, "bytes": size}
            for (name, size), digest in zip(sizes.items(), digests, strict=True)
        }


def remove_tree(directory: Path) -> None:
    """Removes ``directory`` with all below it, where it is there."""
    if is_in_bucket(directory):
        with contextlib.suppress(FileNotFoundError):
            directory.rmtree()  # type: ignore[attr-defined]
    elif directory.exists():
        shutil.rmtree(directory)


def move_tree(directory: Path, target: Path) -> None:
    """Gives ``directory`` another name, which is free; in a bucket, objects are copied there."""
    if is_in_bucket(directory):
        for name in list_file_sizes(directory):
            gcs_file_system().cp_file(os.fspath(directory / name), os.fspath(target / name))
        remove_tree(directory)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(target)
