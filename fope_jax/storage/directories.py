"""Directories on disk and in buckets, where a directory is only a prefix of object names."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fope_jax.storage.files import file_sha256
from fope_jax.storage.paths import (
    BUCKET_SCHEME,
    bucket_errors,
    bucket_name,
    gcs_file_system,
    is_in_bucket,
)

PARALLEL_TRANSFERS = 8  # one transfer alone does not fill the network


def check_writable(directory: Path) -> None:
    """Raises OSError if ``directory`` or its nearest parent is not writable; leaves no trace."""
    if is_in_bucket(directory):
        make_writable(directory)
        return
    for nearest in (directory, *directory.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            nearest.lstat()  # `exists` would hide a too long name or a loop of links
            break
    with tempfile.TemporaryFile(dir=nearest):
        pass


def make_writable(directory: Path) -> None:
    """Makes ``directory``; raises OSError if it is not writable."""
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
    """`check_writable` before long work; the OSError names ``what`` cannot be written."""
    try:
        check_writable(directory)
    except OSError as error:
        raise OSError(f"cannot write {what} to {directory}: {error.strerror or error}") from error


def check_space(directory: Path, size: int, what: str) -> None:
    """Raises OSError if the disk of ``directory`` has less than ``size`` bytes free."""
    if is_in_bucket(directory):
        return
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < size:
        raise OSError(
            f"{directory}: {what} takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
        )


def make_directory(directory: Path) -> list[Path]:
    """Makes ``directory`` and its parents; returns the new ones, innermost first."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty_directories(directories: Iterable[Path]) -> None:
    """Removes directories of `make_directory` that are still empty."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def list_file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of all files under ``directory``, by relative path, sorted."""
    if is_in_bucket(directory):
        top = os.fspath(directory).removeprefix(BUCKET_SCHEME).rstrip("/") + "/"
        found = gcs_file_system().find(top, detail=True)
        sizes = {name.removeprefix(top): info["size"] for name, info in found.items()}
    else:
        files = (path for path in directory.rglob("*") if path.is_file())
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    return dict(sorted(sizes.items()))


def tree_sha256(
    directory: Path,
    skip: Container[str] = (),
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of the files in ``directory`` without ``skip``; reads none of ``known``."""
    sizes = {name: size for name, size in list_file_sizes(directory).items() if name not in skip}
    unknown = [name for name in sizes if name not in known]
    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        digests = pool.map(file_sha256, (directory / name for name in unknown))
        found = {
            name: {"sha256": digest, "bytes": sizes[name]}
            for name, digest in zip(unknown, digests, strict=True)
        }
    return {name: found.get(name) or known[name] for name in sizes}


def remove_tree(directory: Path) -> None:
    if is_in_bucket(directory):
        with contextlib.suppress(FileNotFoundError):
            directory.rmtree()  # type: ignore[attr-defined]
    elif directory.exists():
        shutil.rmtree(directory)


def move_tree(directory: Path, target: Path) -> None:
    """Moves ``directory`` to the free name ``target``; in a bucket by copying."""
    if is_in_bucket(directory):
        for name in list_file_sizes(directory):
            gcs_file_system().cp_file(os.fspath(directory / name), os.fspath(target / name))
        remove_tree(directory)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(target)


def link_tree(directory: Path, target: Path) -> None:
    """Gives the files of ``directory`` a second name each under the new directory ``target``.

    Where the disk cannot (another file system, none of links) and in a bucket they are copied.
    """
    in_buckets = is_in_bucket(directory), is_in_bucket(target)
    for name in list_file_sizes(directory):
        source, copy = directory / name, target / name
        if not in_buckets[1]:
            copy.parent.mkdir(parents=True, exist_ok=True)
        if all(in_buckets):
            gcs_file_system().cp_file(os.fspath(source), os.fspath(copy))
        elif in_buckets[0]:
            gcs_file_system().get_file(os.fspath(source), os.fspath(copy))
        elif in_buckets[1]:
            gcs_file_system().put_file(os.fspath(source), os.fspath(copy))
        else:
            try:
                os.link(source, copy)
            except OSError:
                shutil.copy2(source, copy)
