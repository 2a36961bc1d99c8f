"""Tables of a report: built once, shown as plain text in the terminal and as HTML in the page."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fope_jax.report import protocols
from fope_jax.report.bootstrap import Interval
from fope_jax.report.comparison import Comparison, comparisons, context_of, spreads_over_seeds
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import Spread, Sums, add_up, group

EMPTY = "-"
MOST_ROWS = 500  # of a table that has every row; more are in metrics.jsonl alone


@dataclass(frozen=True)
class Table:
    """Strings in rows and columns.

    Attributes:
      title: one line.
      corner: what the first column holds.
      columns: headers of the other columns.
      rows: header and cells of each row; a second line of a cell is shown smaller.
      note: what a reader must know to read the numbers.
    """

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[str]]] = field(default_factory=list)
    note: str = ""


# ---------------------------------------------------------------------------- numbers as text


def number(value: float) -> str:
    """A positive number at a width that a table bears, never rounded to nothing.

    >>> number(23.456), number(123456.7), number(3.2e9), number(math.inf), number(0.00012)
    ('23.46', '123,457', '3.20e+09', 'inf', '1.20e-04')
    """
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) >= 1e6 or abs(value) < 0.01):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.2f}"


def format_spread(value: Spread | None, show: Callable[[float], str] = number) -> str:
    """``mean``, or ``mean ± deviation`` over several seeds."""
    if value is None:
        return EMPTY
    if value.count == 1:
        return show(value.mean)
    small = abs(value.mean) < 1_000 and value.deviation < 0.01 and show is number
    return f"{show(value.mean)} ± {'<0.01' if small else show(value.deviation)}"


def append_interval(text: str, interval: Interval | None, show: Callable[[float], str]) -> str:
    """A number's text, and below it the interval where there is one."""
    return text if interval is None else f"{text}\n[{show(interval.low)}, {show(interval.high)}]"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def three(value: float) -> str:
    """Three decimals: for losses and bits, whose differences are small."""
    return f"{value:.3f}"


# ---------------------------------------------------------------------------- evaluation


def _by_context(
    title: str,
    comparison: Comparison,
    cells: dict[str, dict[int, Spread]],
    show: Callable[[float], str] = number,
    note: str = "",
    intervals: dict[str, dict[int, Interval]] | None = None,
) -> Table:
    columns, own = comparison.contexts, intervals or {}
    rows = [
        (
            label,
            [
                append_interval(format_spread(values.get(c), show), own.get(label, {}).get(c), show)
                for c in columns
            ],
        )
        for label, values in cells.items()
    ]
    return Table(title, "context (tokens)", [f"{c:,}" for c in columns], rows, note)


def training_lengths(comparison: Comparison) -> str:
    """``trained on 128 tokens``, or each label's length where they differ."""
    lengths = sorted(set(comparison.training_lengths.values()))
    if len(lengths) == 1:
        return f"trained on {lengths[0]:,} tokens"
    return "trained on " + ", ".join(
        f"{length:,} ({label})" for label, length in comparison.training_lengths.items()
    )


def perplexity_tables(comparison: Comparison) -> list[Table]:
    """Perplexity, its ratio to that at the training length, and bits per byte, by context."""
    protocol = f"protocol {comparison.protocol}"
    where = f"{protocol}, {comparison.name} split, {training_lengths(comparison)}"
    scored = protocols.protocol_caption(comparison)
    return [
        _by_context(
            f"Perplexity ({where})",
            comparison,
            comparison.numbers(_perplexity),
            note=scored,
            intervals=comparison.intervals(_perplexity),
        ),
        _by_context(
            f"Perplexity relative to the training length ({protocol})",
            comparison,
            comparison.ratios(_perplexity),
            note=f"below 1: the longer context helps; above 1: it hurts; {scored}",
            intervals=comparison.ratio_intervals(_perplexity),
        ),
        _by_context(
            f"Bits per byte ({protocol})",
            comparison,
            comparison.numbers(_bits_per_byte),
            three,
            note=scored,
            intervals=comparison.intervals(_bits_per_byte),
        ),
    ]


def retrieval_names(comparison: Comparison) -> tuple[str, str]:
    """What is counted in a comparison of retrieval, and of what.

    >>> retrieval_names(Comparison("retrieval", "multi_key", {}, {}))
    ('right answers', 'multi key')
    """
    if comparison.kind == "passkey":
        return "passkeys found", f"{comparison.name} template"
    return "right answers", comparison.name.replace("_", " ")


def _perplexity(sums: Sums) -> float:
    return sums.perplexity


def _bits_per_byte(sums: Sums) -> float:
    return sums.bits_per_byte


def reset_table(resets: Comparison, none: Comparison) -> Table:
    """Perplexity with resets at each document over that without, by context.

    Both must have scored the same tokens. The ratio is taken within each seed.
    """
    with_resets, without = (c.per_seed(_perplexity, context_of) for c in (resets, none))
    cells = {
        label: spreads_over_seeds(
            [
                {context: own[context] / other[context] for context in own}
                for own, other in zip(seeds, without[label], strict=True)
            ]
        )
        for label, seeds in with_resets.items()
        if len(without.get(label, ())) == len(seeds)
    }
    return _by_context(
        "Perplexity with resets over that without (protocols document-resets and no-resets)",
        resets,
        cells,
        three,
        note="below 1: the documents before it do harm; " + protocols.protocol_caption(resets),
    )


def retrieval_tables(comparison: Comparison) -> list[Table]:
    """Right answers of trials, over all depths and seeds; parts of answers, where they have any;
    the rank of the answer, where it was taken; and the loss on answer tokens."""
    counted, where = retrieval_names(comparison)
    counts = {
        label: {
            context: add_up(row for rows in seeds for row in rows if row["context"] == context)
            for context in comparison.contexts
        }
        for label, seeds in comparison.curves.items()
    }
    sums = [own for by_length in counts.values() for own in by_length.values()]
    several = any(own.asked > own.total for own in sums)
    columns = [f"{context:,}" for context in comparison.contexts]

    def shares(title: str, part: str, whole: str, note: str) -> Table:
        rows = [
            (label, [share(getattr(s, part), getattr(s, whole)) for s in by_length.values()])
            for label, by_length in counts.items()
        ]
        return Table(title, "context (tokens)", columns, rows, note)

    title = f"{counted.capitalize()} ({where}, {training_lengths(comparison)})"
    tables = [shares(title, "correct", "total", "right answers / trials, all depths")]
    if several:
        title, note = f"Parts of the answer found ({where})", "in any order, in what was written"
        tables.append(shares(title, "found", "asked", note))
    candidates = max(row.get("candidates", 0) for _, row in _each_row(comparison))
    if candidates:
        tables.append(
            _by_context(
                f"Mean rank of the right answer ({where})",
                comparison,
                {
                    label: {c: rank for c, rank in ranks.items() if not math.isnan(rank.mean)}
                    for label, ranks in comparison.numbers(lambda s: s.mean_rank).items()
                },
                note=f"by log-likelihood among {candidates} answers; 1 is the best, "
                f"{(candidates + 1) / 2:g} is chance",
            )
        )
    tables.append(
        _by_context(
            f"Loss on the answer ({where}, nats per answer token)",
            comparison,
            comparison.numbers(lambda s: s.loss),
            three,
            note="falls before answers become right",
        )
    )
    return tables


def share(part: float, whole: float) -> str:
    return f"{part:g}/{whole:g} ({percent(part / whole)})" if whole else EMPTY


def position_tables(comparison: Comparison) -> list[Table]:
    """Nats per token and bits per byte in each bucket of positions, buckets as rows."""
    title = protocols.words(comparison).title
    where = f"protocol {comparison.protocol}, {comparison.name} split"
    return [
        _by_bucket(f"{title} ({where}, nats per token)", comparison, lambda s: s.loss),
        _by_bucket(f"{title} ({where}, bits per byte)", comparison, _bits_per_byte),
    ]


def _by_bucket(title: str, comparison: Comparison, value: Callable[[Sums], float]) -> Table:
    cells = comparison.numbers(value, by=_bucket)
    intervals = comparison.intervals(value, by=_bucket)
    own = {bucket: rows for bucket, rows in group(comparison.first, _bucket).items()}
    table = Table(title, "position", ["tokens", "documents", *cells])
    table = dataclasses.replace(table, note=protocols.protocol_caption(comparison))
    for bucket in sorted({bucket for values in cells.values() for bucket in values}):
        numbers = [
            append_interval(
                format_spread(cells[label].get(bucket), three), intervals[label].get(bucket), three
            )
            for label in cells
        ]
        rows = own.get(bucket, [])
        names = {row.get("document") for row in rows} - {None}
        counts = [f"{add_up(rows).tokens:,.0f}", f"{len(names):,}" if names else EMPTY]
        table.rows.append((f"{bucket[0]:,} to {bucket[1] - 1:,}", [*counts, *numbers]))
    return table


def _bucket(row: Row) -> tuple[int, int]:
    start, stop = row["bucket"]
    return start, stop


def text_tables(runs: Sequence[Run]) -> str:
    """The tables that `fope report` prints."""
    tables = [table for c in comparisons(runs, "perplexity") for table in perplexity_tables(c)]
    for kind in ("passkey", "retrieval"):
        tables += [retrieval_tables(comparison)[0] for comparison in comparisons(runs, kind)]
    missing = [str(run.path) for run in runs if run.step is None]
    texts = [as_text(table) for table in tables]
    if missing:
        texts.append(f"not evaluated yet (`fope evaluate` does it): {', '.join(missing)}")
    return "\n\n".join(texts)


# ---------------------------------------------------------------------------- every number


def document_table(comparison: Comparison) -> Table:
    """One row for each run, document and context, with its sums."""
    columns = [
        "seed",
        "step",
        "document",
        "context",
        "windows",
        "tokens",
        "bytes",
        "nats",
        "nats per token",
        "perplexity",
        "bits per byte",
        "tokens right",
    ]
    title = f"Every row of the {comparison.name} split (protocol {comparison.protocol})"
    found = _each_row(comparison)
    more = f"the first {MOST_ROWS:,} of {len(found):,} rows; all are in metrics.jsonl"
    note = more if len(found) > MOST_ROWS else protocols.protocol_caption(comparison)
    table = Table(title, "variant", columns, note=note)
    for label, row in found[:MOST_ROWS]:
        sums = add_up([row])
        cells = [
            row["seed"],
            row["step"],
            row["document"] or EMPTY,
            f"{row['context']:,}",
            f"{row['windows']:,}",
            f"{sums.tokens:,}",
            f"{sums.bytes:,}",
            f"{sums.nats:,.2f}",
            three(sums.loss),
            number(sums.perplexity),
            three(sums.bits_per_byte),
            f"{100 * sums.token_accuracy:.1f}%",
        ]
        table.rows.append((label, [str(cell) for cell in cells]))
    return table


def depth_table(comparison: Comparison) -> Table:
    """One row for each run, context and depth of a passkey template or a retrieval task."""
    columns = ["seed", "step", "context", "depth", "right / trials", "nats per answer token"]
    _, where = retrieval_names(comparison)
    table = Table(f"Every row ({where})", "variant", columns)
    for label, row in _each_row(comparison):
        sums = add_up([row])
        cells = [
            row["seed"],
            row["step"],
            f"{row['context']:,}",
            EMPTY if row["depth"] is None else f"{row['depth']:g}",
            f"{row['correct']}/{row['total']}",
            three(sums.loss),
        ]
        table.rows.append((label, [str(cell) for cell in cells]))
    return table


def _each_row(comparison: Comparison) -> list[tuple[str, dict[str, Any]]]:
    return [
        (label, row)
        for label, seeds in comparison.curves.items()
        for rows in seeds
        for row in sorted(rows, key=context_of)
    ]


# ---------------------------------------------------------------------------- rendering


def as_text(table: Table) -> str:
    """Plain text with aligned columns; a cell's second line stands below its first."""
    lines = [[table.corner, *table.columns]]
    for head, cells in table.rows:
        parts = [[head], *(cell.split("\n") for cell in cells)]
        lines += [list(line) for line in itertools.zip_longest(*parts, fillvalue="")]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    note = textwrap.wrap(table.note, 100)
    return "\n".join([table.title, *note, text[0], "-" * len(text[0]), *text[1:]])


def as_html(table: Table) -> str:
    """An HTML table whose headers name their scope, in a region that scrolls sideways."""
    heads = "".join(
        f'<th scope="col">{html.escape(c)}</th>' for c in [table.corner, *table.columns]
    )
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(head)}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        + "</tr>"
        for head, cells in table.rows
    )
    title = html.escape(table.title)
    note = f" <small>({html.escape(table.note)})</small>" if table.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">\n'
        f"<table>\n<caption>{title}{note}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _cell(text: str) -> str:
    first, *second = html.escape(text).split("\n", 1)
    return first + "".join(f"<br><small>{line}</small>" for line in second)
