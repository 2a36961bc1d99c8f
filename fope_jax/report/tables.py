"""Tables of a report, shown as plain text in the terminal and as HTML in the page."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fope_jax.report.bootstrap import Interval
from fope_jax.report.comparison import Comparison, comparisons, context_of, spreads_over_seeds
from fope_jax.report.protocols import describe, few_documents_note, protocol_caption, spread_caption
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import Spread, Sums, add_up, group

EMPTY = "-"
MOST_ROWS = 500  # of a table of all rows; the rest is in metrics.jsonl
Format = Callable[[float], str]


@dataclass(frozen=True)
class Table:
    """Strings in rows and columns.

    ``corner`` is the header of the first column, ``columns`` of the others. ``rows`` are
    ``(header, cells)``. Cells of an ``is_prose`` table are text, which wraps.
    """

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[str]]] = field(default_factory=list)
    note: str = ""
    is_prose: bool = False


def table_of_records(
    title: str, corner: str, records: Iterable[tuple[str, Mapping[str, Any]]], note: str = ""
) -> Table:
    """A table of ``(header, {column: value})`` records; the first one names the columns."""
    rows = [(header, dict(record)) for header, record in records]
    columns = list(rows[0][1]) if rows else []
    cells = [(header, [str(record[name]) for name in columns]) for header, record in rows]
    return Table(title, corner, columns, cells, note)


# ---------------------------------------------------------------------------- numbers as text


def format_number(value: float) -> str:
    """A number at a readable width, never rounded to zero.

    >>> [format_number(x) for x in (23.456, 123456.7, 3.2e9, math.inf, 0.00012)]
    ['23.46', '123,457', '3.20e+09', 'inf', '1.20e-04']
    """
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) >= 1e6 or abs(value) < 0.01):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.2f}"


def format_loss(value: float) -> str:
    """Three decimals, as differences of losses are small."""
    return f"{value:.3f}"


def format_percent(value: float) -> str:
    return f"{value:.0f}%"


def format_share(count: float, total: float) -> str:
    return f"{count:g}/{total:g} ({format_percent(100 * (count / total))})" if total else EMPTY


def format_spread(
    value: Spread | None, show: Format = format_number, interval: Interval | None = None
) -> str:
    """``mean``, or ``mean ± deviation`` for several seeds; the interval on a second line."""
    if value is None:
        return EMPTY
    text = show(value.mean)
    if value.count > 1:
        is_tiny = abs(value.mean) < 1_000 and value.deviation < 0.01 and show is format_number
        text += f" ± {'<0.01' if is_tiny else show(value.deviation)}"
    return text if interval is None else f"{text}\n[{show(interval.low)}, {show(interval.high)}]"


# ---------------------------------------------------------------------------- evaluation


def context_table(
    title: str,
    comparison: Comparison,
    spreads: dict[str, dict[int, Spread]],
    show: Format = format_number,
    note: str = "",
    intervals: dict[str, dict[int, Interval]] | None = None,
) -> Table:
    contexts, rows = comparison.contexts, []
    for label, values in spreads.items():
        ends = (intervals or {}).get(label, {})
        rows.append((label, [format_spread(values.get(c), show, ends.get(c)) for c in contexts]))
    return Table(title, "context (tokens)", [f"{c:,}" for c in contexts], rows, note)


def training_lengths(comparison: Comparison) -> str:
    """``trained on 128 tokens``, or each label's length where they differ."""
    lengths = comparison.training_lengths
    if len(set(lengths.values())) == 1:
        return f"trained on {next(iter(lengths.values())):,} tokens"
    return "trained on " + ", ".join(f"{length:,} ({label})" for label, length in lengths.items())


def perplexity_tables(comparison: Comparison) -> list[Table]:
    """Perplexity, its ratio to that at the training length, and bits per byte, by context."""
    protocol, note = f"protocol {comparison.protocol}", spread_caption(comparison)
    where = f"{protocol}, {comparison.name} split, {training_lengths(comparison)}"
    ratio = f"Perplexity relative to the training length ({protocol})"
    ratio_note = "below 1: the longer context helps; above 1: it hurts"

    def table(title: str, metric: Any, show: Format, note: str, relative: bool = False) -> Table:
        spreads = comparison.spreads(metric, relative=relative)
        intervals = comparison.intervals(metric, relative=relative)
        return context_table(title, comparison, spreads, show, note, intervals)

    return [
        table(f"Perplexity ({where})", Sums.perplexity, format_number, note),
        table(ratio, Sums.perplexity, format_number, ratio_note, relative=True),
        table(f"Bits per byte ({protocol})", Sums.bits_per_byte, format_loss, ""),
    ]


def reset_table(resets: Comparison, no_resets: Comparison) -> Table:
    """Perplexity with resets over that without, within each seed; both scored the same tokens."""
    numbers, without = (c.numbers(Sums.perplexity) for c in (resets, no_resets))
    ratios = {
        label: [
            {c: value / base[seed][c] for c, value in values.items() if c in base[seed]}
            for seed, values in numbers[label].items()
            if seed in base
        ]
        for label, base in without.items()
        if label in numbers
    }
    spreads = {label: spreads_over_seeds(seeds) for label, seeds in ratios.items() if seeds}
    title = "Perplexity with resets over that without (protocols document-resets and no-resets)"
    note = "below 1: the documents before it do harm"
    return context_table(title, resets, spreads, format_loss, note)


def retrieval_names(comparison: Comparison) -> tuple[str, str]:
    """What is counted, and the template or task.

    >>> retrieval_names(Comparison("retrieval", "multi_key", {}, {}))
    ('right answers', 'multi key')
    """
    if comparison.kind == "passkey":
        return "passkeys found", f"{comparison.name} template"
    return "right answers", comparison.name.replace("_", " ")


def is_unsolved(comparison: Comparison) -> bool:
    """Whether no variant gives one right answer at any length."""
    return not any(row["correct"] for _, row in comparison.labelled_rows())


def unsolved_sentence(comparison: Comparison) -> str:
    """One line in place of the figure and table of a task that is all zeros."""
    counted, name = retrieval_names(comparison)
    contexts, trials = comparison.contexts, comparison.sums_by_context
    lengths = f"{contexts[0]:,} tokens"
    if len(contexts) > 1:
        lengths = f"each of {len(contexts)} lengths from {contexts[0]:,} to {contexts[-1]:,} tokens"
        seeds = (rows for seeds in comparison.curves.values() for rows in seeds)
        if any({context_of(row) for row in rows} != {*contexts} for rows in seeds):
            lengths += " that it was asked at"
    return (
        f"{name[:1].upper()}{name[1:]}: no {counted} by any variant, in "
        f"{trials[contexts[0]].total:,} trials at {lengths}."
    )


def retrieval_tables(comparison: Comparison) -> list[Table]:
    """Right answers, parts of answers and mean rank where rows have them, and answer loss."""
    counted, name = retrieval_names(comparison)
    contexts, sums = comparison.contexts, {}
    for label, seeds in comparison.curves.items():
        pools = group((row for rows in seeds for row in rows), context_of)
        sums[label] = [add_up(pools.get(context, [])) for context in contexts]

    def shares(title: str, count: str, total: str, note: str) -> Table:
        cells = {
            label: [format_share(getattr(s, count), getattr(s, total)) for s in by_context]
            for label, by_context in sums.items()
        }
        columns = [f"{context:,}" for context in contexts]
        return Table(title, "context (tokens)", columns, list(cells.items()), note)

    title = f"{counted.capitalize()} ({name}, {training_lengths(comparison)})"
    tables = [shares(title, "correct", "total", "right answers / trials, all depths")]
    if any(s.asked > s.total for by_context in sums.values() for s in by_context):
        title, note = f"Parts of the answer found ({name})", "in any order, in what was written"
        tables.append(shares(title, "found", "asked", note))
    candidates = max(row.get("candidates", 0) for _, row in comparison.labelled_rows())
    if candidates:
        ranks = {
            label: {c: rank for c, rank in by_context.items() if not math.isnan(rank.mean)}
            for label, by_context in comparison.spreads(Sums.mean_rank).items()
        }
        chance = (candidates + 1) / 2
        note = f"by log-likelihood among {candidates} answers; 1 is the best, {chance:g} is chance"
        title = f"Mean rank of the right answer ({name})"
        tables.append(context_table(title, comparison, ranks, note=note))
    title, note = f"Loss on the answer ({name}, nats per answer token)", "falls before answers "
    losses = comparison.spreads(Sums.loss)
    tables.append(context_table(title, comparison, losses, format_loss, note + "become right"))
    return tables


def position_tables(comparison: Comparison) -> list[Table]:
    title = describe(comparison).title
    where = f"protocol {comparison.protocol}, {comparison.name} split"
    units = {"nats per token": Sums.loss, "bits per byte": Sums.bits_per_byte}
    first = group(comparison.first_rows, bucket_of)
    tables = []
    for unit, metric in units.items():
        spreads = comparison.spreads(metric, bucket_of)
        intervals = comparison.intervals(metric, bucket_of)
        rows = []
        for bucket in sorted({bucket for values in spreads.values() for bucket in values}):
            documents = {row.get("document") for row in first.get(bucket, [])} - {None}
            cells = [f"{add_up(first.get(bucket, [])).tokens:,.0f}"]
            cells.append(f"{len(documents):,}" if documents else EMPTY)
            for label, values in spreads.items():
                interval = intervals[label].get(bucket)
                cells.append(format_spread(values.get(bucket), format_loss, interval))
            rows.append((f"{bucket[0]:,} to {bucket[1] - 1:,}", cells))
        columns, note = ["tokens", "documents", *spreads], spread_caption(comparison)
        tables.append(Table(f"{title} ({where}, {unit})", "position", columns, rows, note))
    return tables


def bucket_of(row: Row) -> tuple[int, int]:
    """The row's bucket: first position, and the one after its last."""
    start, stop = row["bucket"]
    return start, stop


def text_tables(runs: Sequence[Run]) -> str:
    """The tables that `fope report` prints; what was scored stands at the first of a protocol."""
    texts = []
    for comparison in comparisons(runs, "perplexity"):
        first, *others = perplexity_tables(comparison)
        note = f"{protocol_caption(comparison)}; {first.note}"
        texts += [as_text(table) for table in (dataclasses.replace(first, note=note), *others)]
    answered = [c for kind in ("passkey", "retrieval") for c in comparisons(runs, kind)]
    texts += [as_text(retrieval_tables(c)[0]) for c in answered if not is_unsolved(c)]
    texts += [unsolved_sentence(c) for c in answered if is_unsolved(c)]
    if note := few_documents_note(comparisons(runs, "perplexity")):
        texts.append(note)
    missing = [str(run.path) for run in runs if run.step is None]
    if missing:
        texts.append(f"not evaluated yet (`fope evaluate` does it): {', '.join(missing)}")
    return "\n\n".join(texts)


def as_text(table: Table) -> str:
    """Plain text with aligned columns; a cell's second line is below its first."""
    lines = [[table.corner, *table.columns]]
    for header, cells in table.rows:
        parts = [[header], *(cell.split("\n") for cell in cells)]
        lines += [list(line) for line in itertools.zip_longest(*parts, fillvalue="")]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    note = textwrap.wrap(table.note, 100)
    return "\n".join([table.title, *note, text[0], "-" * len(text[0]), *text[1:]])


# ---------------------------------------------------------------------------- every number


def document_table(comparison: Comparison) -> Table:

    def record(row: Row) -> dict[str, Any]:
        sums = add_up([row])
        return {
            "seed": row["seed"],
            "step": row["step"],
            "document": row["document"] or EMPTY,
            "context": f"{row['context']:,}",
            "windows": f"{row['windows']:,}",
            "tokens": f"{sums.tokens:,}",
            "bytes": f"{sums.bytes:,}",
            "nats": f"{sums.nats:,.2f}",
            "nats per token": format_loss(sums.loss()),
            "perplexity": format_number(sums.perplexity()),
            "bits per byte": format_loss(sums.bits_per_byte()),
            "tokens right": f"{sums.token_accuracy():.1f}%",
        }

    rows = comparison.labelled_rows()
    title = f"Every row of the {comparison.name} split (protocol {comparison.protocol})"
    note = ""
    if len(rows) > MOST_ROWS:
        note = f"the first {MOST_ROWS:,} of {len(rows):,} rows; all are in metrics.jsonl"
    records = [(label, record(row)) for label, row in rows[:MOST_ROWS]]
    return table_of_records(title, "variant", records, note)


def depth_table(comparison: Comparison) -> Table:

    def record(row: Row) -> dict[str, Any]:
        return {
            "seed": row["seed"],
            "step": row["step"],
            "context": f"{row['context']:,}",
            "depth": EMPTY if row["depth"] is None else f"{row['depth']:g}",
            "right / trials": f"{row['correct']}/{row['total']}",
            "nats per answer token": format_loss(add_up([row]).loss()),
        }

    records = [(label, record(row)) for label, row in comparison.labelled_rows()]
    title = f"Every row ({retrieval_names(comparison)[1]})"
    return table_of_records(title, "variant", records)
