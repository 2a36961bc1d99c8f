"""Scores in a few ranges of length, as LongBench shows them: 0-4k, 4-8k, 8k+ tokens."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from fope_jax.report.comparison import Comparison, comparisons
from fope_jax.report.rows import ReportError, Row, Run
from fope_jax.report.sums import add_up, group
from fope_jax.report.tables import (
    EMPTY,
    Table,
    format_spread,
    percent,
    retrieval_names,
    share,
    three,
    training_lengths,
)

MACRO = "Right answers by length, mean over tasks"


def parse_edges(text: str) -> tuple[int, ...]:
    """The lengths at which one bucket ends and the next begins; k stands for 1,024 tokens.

    >>> parse_edges("4k,8k"), parse_edges("512, 1000")
    ((4096, 8192), (512, 1000))

    Raises:
      ReportError: no lengths, or not in rising order.
    """
    parts = [part.strip() for part in text.split(",")]
    found = [re.fullmatch(r"([1-9]\d*)(k?)", part) for part in parts]
    edges = [int(m[1]) * (1024 if m[2] else 1) for m in found if m]
    if len(edges) < len(parts) or any(a >= b for a, b in pairwise(edges)):
        raise ReportError(
            f"--buckets {text}; accepted: rising lengths in tokens, such as 4k,8k or 512,2048"
        )
    return tuple(edges)


def bucket_names(edges: Sequence[int]) -> list[str]:
    """What the buckets are called; a length that is an edge belongs to the one below.

    >>> bucket_names((4096, 8192))
    ['0-4k', '4k-8k', '8k+']
    """
    short = [f"{edge // 1024}k" if edge % 1024 == 0 else f"{edge:,}" for edge in (0, *edges)]
    short[0] = "0"
    return [*(f"{a}-{b}" for a, b in pairwise(short)), f"{short[-1]}+"]


def bucket_tables(runs: Sequence[Run], edges: Sequence[int]) -> list[Table]:
    """Right answers of every template and task, their mean over tasks, and loss by position.

    Args:
      runs: that the report is about.
      edges: from ``parse_edges``. An answer counts where its window is at most so long, a token
        where it stands at most so far from the window's first.

    Raises:
      ReportError: a range of positions that rows hold as one lies on both sides of an edge.
    """
    asked = [c for kind in ("passkey", "retrieval") for c in comparisons(runs, kind)]
    tables = [_answers(comparison, edges) for comparison in asked]
    if len(asked) > 1:
        tables.append(_mean_over_tasks(asked, edges))
    return tables + [_losses(comparison, edges) for comparison in comparisons(runs, "position")]


def _by_length(edges: Sequence[int]) -> Callable[[Row], int]:
    return lambda row: bisect.bisect_left(edges, row["context"])


def _answers(comparison: Comparison, edges: Sequence[int]) -> Table:
    _, where = retrieval_names(comparison)
    title = f"Right answers by length ({where}, {training_lengths(comparison)})"
    table = Table(title, "window (tokens)", bucket_names(edges), note=_contexts([comparison]))
    for label, seeds in comparison.curves.items():
        own = group((row for rows in seeds for row in rows), _by_length(edges))
        cells = [add_up(own.get(bucket, [])) for bucket in range(len(edges) + 1)]
        table.rows.append((label, [share(s.correct, s.total) for s in cells]))
    return table


def _mean_over_tasks(asked: Sequence[Comparison], edges: Sequence[int]) -> Table:
    """Each task counts alike, however many trials it has; only labels that were asked all."""
    shares = [c.numbers(lambda sums: sums.accuracy, by=_by_length(edges)) for c in asked]
    table = Table(MACRO, "window (tokens)", bucket_names(edges), note=_contexts(asked))
    for label in shares[0]:
        if not all(label in own for own in shares):
            continue
        cells = []
        for bucket in range(len(edges) + 1):
            values = [own[label][bucket].mean for own in shares if bucket in own[label]]
            whole = len(values) == len(shares)
            cells.append(percent(sum(values) / len(values)) if whole else EMPTY)
        table.rows.append((label, cells))
    return table


def _losses(comparison: Comparison, edges: Sequence[int]) -> Table:
    def bucket_of(row: Row) -> int:
        start, stop = row["bucket"]
        first, last = bisect.bisect_right(edges, start), bisect.bisect_left(edges, stop)
        if first != last:
            raise ReportError(
                f"--buckets: {comparison.protocol} has one number for positions {start:,} to "
                f"{stop - 1:,}, which lie on both sides of {edges[first]:,}; an edge at "
                f"{start:,} or {stop:,} would not cut them"
            )
        return first

    numbers = comparison.numbers(lambda sums: sums.loss, by=bucket_of)
    title = f"Nats per token by position (protocol {comparison.protocol}, {comparison.name} split)"
    table = Table(title, "position (tokens)", bucket_names(edges), note="pooled over tokens")
    for label, values in numbers.items():
        cells = [format_spread(values.get(bucket), three) for bucket in range(len(edges) + 1)]
        table.rows.append((label, cells))
    return table


def _contexts(asked: Sequence[Comparison]) -> str:
    """Which windows there are, since a bucket is only as good as what was asked in it."""
    lengths = sorted({context for comparison in asked for context in comparison.contexts})
    return "windows of " + ", ".join(f"{length:,}" for length in lengths) + " tokens"
