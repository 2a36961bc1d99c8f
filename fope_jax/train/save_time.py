"""Bytes and seconds of a checkpoint, beside the grace period that a signal leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax


def checkpoint_bytes(*trees: Any) -> int:
    """Bytes of the arrays, or ShapeDtypeStructs, of a checkpoint."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def save_seconds(
    size: float, num_processes: int, bytes_per_second: float, in_bucket: bool = False
) -> float:
    """Seconds to save ``size`` bytes, of which each process writes its share.

    The state of 1.2 billion parameters in float32 with AdamW, 12 bytes each, from 16 hosts:

    >>> [save_seconds(12 * 1.2e9, 16, bytes_per_second=100e6, in_bucket=x) for x in (False, True)]
    [9.0, 18.0]

    Args:
      size: bytes of the checkpoint; Orbax cuts replicated arrays over the processes too.
      num_processes: hosts that write.
      bytes_per_second: of one process, one way; or a `measured_rate`, which is of all that a save
        does.
      in_bucket: each process also reads its share back, for the checksums; a disk has it in memory.
    """
    return size * (1 + in_bucket) / num_processes / bytes_per_second


def measured_rate(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Bytes of a checkpoint a second and process, by the newest save in metrics.jsonl, or None."""
    rates = [
        row["bytes"] / row["processes"] / row["written_seconds"]
        for row in rows
        if row.get("phase") == "save" and row.get("written_seconds")
    ]
    return rates[-1] if rates else None


def describe_save(
    size: int,
    num_processes: int,
    measured: float | None,
    grace_seconds: float,
    in_bucket: bool = False,
) -> str:
    """What a save takes, or without a `measured_rate` must not take, within the grace period.

    >>> describe_save(14_400_000_000, 16, 100e6, 30)
    'a checkpoint is 14.4 GB; a save takes about 9.0 s; grace is 30 s (train.grace_seconds)'
    >>> describe_save(14_400_000_000, 16, None, 30).partition("; ")[2]
    'to be saved within 30 s (train.grace_seconds), 30 MB/s from each process'
    >>> describe_save(14_400_000_000, 16, None, 30, in_bucket=True).partition(", ")[2]
    '60 MB/s from each process and back, for the checksums'
    """
    if measured is None:
        rate = save_seconds(size, num_processes, 1.0, in_bucket) / grace_seconds
        back = " and back, for the checksums" if in_bucket else ""
        return (
            f"a checkpoint is {format_bytes(size)}; to be saved within {grace_seconds:g} s "
            f"(train.grace_seconds), {format_bytes(rate)}/s from each process{back}"
        )
    seconds = save_seconds(size, num_processes, measured)
    return (
        f"a checkpoint is {format_bytes(size)}; a save takes about {seconds:.1f} s; "
        f"{describe_grace(seconds, grace_seconds)}"
    )


def describe_grace(seconds: float, grace_seconds: float) -> str:
    """Whether a save fits, and the one under way at the signal, which is finished first.

    >>> describe_grace(9.0, 30.0)
    'grace is 30 s (train.grace_seconds)'
    >>> describe_grace(20.0, 30.0).partition(", ")[2]
    'too short for two: a stop during a save loses the steps since it began'
    >>> describe_grace(40.0, 30.0)
    'grace is 30 s (train.grace_seconds), too short: a stop loses the steps since the last save'
    """
    late = ""
    if seconds > grace_seconds:
        late = ", too short: a stop loses the steps since the last save"
    elif 2 * seconds > grace_seconds:
        late = ", too short for two: a stop during a save loses the steps since it began"
    return f"grace is {grace_seconds:g} s (train.grace_seconds){late}"


def format_bytes(count: float) -> str:
    """
    >>> [format_bytes(count) for count in (14.4e9, 30e6, 12_500)]
    ['14.4 GB', '30 MB', '12.5 kB']
    """
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / unit:.3g} {name}"
