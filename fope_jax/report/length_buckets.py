"""Scores in a few ranges of length, as LongBench shows them: 0-4k, 4-8k, 8k+ tokens."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fope_jax.report.comparison import Comparison, comparisons
from fope_jax.report.rows import ReportError, Row, Run
from fope_jax.report.sums import Spread, Sums, add_up, group
from fope_jax.report.tables import (
    EMPTY,
    Table,
    format_loss,
    format_percent,
    format_share,
    format_spread,
    retrieval_names,
    training_lengths,
)

WINDOW = "window (tokens)"


def parse_edges(text: str) -> tuple[int, ...]:
    """Parses edges between buckets, tokens; k stands for 1,024.

    >>> parse_edges("4k,8k"), parse_edges("512, 1000")
    ((4096, 8192), (512, 1000))

    Raises:
      ReportError: not rising lengths.
    """
    matches = [re.fullmatch(r"\s*([1-9]\d*)(k?)\s*", length) for length in text.split(",")]
    edges = [int(m[1]) * (1024 if m[2] else 1) for m in matches if m]
    if len(edges) < len(matches):
        raise _no_edges(text)
    check_edges(edges, text)
    return tuple(edges)


def check_edges(edges: Sequence[int], text: str | None = None) -> None:
    """Raises ReportError where ``edges``, which the user wrote as ``text``, are no rising lengths.

    >>> check_edges([512, 2048])
    """
    whole = all(isinstance(e, int | np.integer) and not isinstance(e, bool) for e in edges)
    if not whole or any(a >= b for a, b in pairwise([0, *edges])):
        raise _no_edges(str(edges) if text is None else text)


def _no_edges(text: str) -> ReportError:
    return ReportError(
        f"--buckets {text}; accepted: rising lengths in tokens, such as 4k,8k or 512,2048"
    )


def bucket_names(edges: Sequence[int]) -> list[str]:
    """Names of the buckets; a length equal to an edge is in the lower one.

    >>> bucket_names((4096, 8192))
    ['0-4k', '4k-8k', '8k+']
    """
    short = [f"{edge // 1024}k" if edge % 1024 == 0 else f"{edge:,}" for edge in (0, *edges)]
    short[0] = "0"
    return [*(f"{a}-{b}" for a, b in pairwise(short)), f"{short[-1]}+"]


def bucket_tables(runs: Sequence[Run], edges: Sequence[int]) -> list[Table]:
    """Right answers of each task, their mean over tasks, and loss by position, in each bucket.

    ``edges``, from `parse_edges`, divide windows (answers) and positions (losses).

    Raises:
      ReportError: an edge lies inside a bucket of positions of the rows.
    """
    check_edges(edges)

    def bucket_of_context(row: Row) -> int:
        return bisect.bisect_left(edges, row["context"])

    def bucket_of_position(row: Row) -> int:
        start, stop = row["bucket"]
        first, last = bisect.bisect_right(edges, start), bisect.bisect_left(edges, stop)
        if first != last:
            raise ReportError(
                f"--buckets: {row['protocol']} has one number for positions {start:,} to "
                f"{stop - 1:,}, which lie on both sides of {edges[first]:,}; an edge at "
                f"{start:,} or {stop:,} would not cut them"
            )
        return first

    names, buckets, tables = bucket_names(edges), range(len(edges) + 1), []
    retrievals = [c for kind in ("passkey", "retrieval") for c in comparisons(runs, kind)]
    for comparison in retrievals:
        what = f"{retrieval_names(comparison)[1]}, {training_lengths(comparison)}"
        table = Table(
            f"Right answers by length ({what})", WINDOW, names, note=_windows([comparison])
        )
        for label, seeds in comparison.curves.items():
            pools = group((row for rows in seeds for row in rows), bucket_of_context)
            sums = [add_up(pools.get(bucket, [])) for bucket in buckets]
            table.rows.append((label, [format_share(s.correct, s.total) for s in sums]))
        tables.append(table)
    if len(retrievals) > 1:  # mean over tasks, for labels that have all tasks
        title = "Right answers by length, mean over tasks"
        table = Table(title, WINDOW, names, note=_windows(retrievals))
        tasks = [comparison.spreads(Sums.accuracy, bucket_of_context) for comparison in retrievals]
        for label in tasks[0]:
            if all(label in task for task in tasks):
                values = [[task[label].get(b) for task in tasks] for b in buckets]
                table.rows.append((label, [_mean_percent(means) for means in values]))
        tables.append(table)
    for comparison in comparisons(runs, "position"):
        where = f"protocol {comparison.protocol}, {comparison.name} split"
        title, note = f"Nats per token by position ({where})", "pooled over tokens"
        table = Table(title, "position (tokens)", names, note=note)
        for label, spreads in comparison.spreads(Sums.loss, bucket_of_position).items():
            table.rows.append(
                (label, [format_spread(spreads.get(b), format_loss) for b in buckets])
            )
        tables.append(table)
    return tables


def _mean_percent(values: Sequence[Spread | None]) -> str:
    """Unweighted mean over tasks; EMPTY where a task is missing."""
    known = [value.mean for value in values if value is not None]
    return format_percent(sum(known) / len(known)) if len(known) == len(values) else EMPTY


def _windows(retrievals: Sequence[Comparison]) -> str:
    lengths = sorted({context for comparison in retrievals for context in comparison.contexts})
    return "windows of " + ", ".join(f"{length:,}" for length in lengths) + " tokens"
