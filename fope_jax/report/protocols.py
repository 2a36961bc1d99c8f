"""Protocols in words: what was scored, what was left out, and what intervals mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fope_jax.report.bootstrap import COVERAGE, LEAST_DOCUMENTS, RESAMPLES, SEED
from fope_jax.report.comparison import Comparison, run_labels
from fope_jax.report.rows import NO_BOS, Run
from fope_jax.report.summary import KINDS

FEW_DOCUMENTS = 20  # with fewer, the note calls intervals rough
NAMES_SHOWN = 8
UNITS = {  # what a protocol reads; for others windows
    "sliding-window": "stretch",
    "chunks": "block",
    "document-resets": "block",
    "no-resets": "block",
}


class Description(NamedTuple):
    """Title, label of the x axis, and paragraph with ``{fields}`` for `protocol_paragraph`."""

    title: str
    x: str
    paragraph: str


_CHUNKS = (
    "Documents are joined, each with its end-of-document token, and {windows:,} blocks of "
    "{longest:,} tokens of them, evenly spaced{of_which}, are cut into chunks of the context "
    "length. A chunk is read by itself"
)

DESCRIPTIONS = {
    "same-tokens": Description(
        "Perplexity against context length",
        "context length (tokens)",
        "The last {scored_per_window:,} tokens of {windows:,} windows are scored: {amount}. They "
        "are the same tokens at every context length; only the text before them grows. Each "
        "window lies inside one document, windows are spaced evenly over it, and no token is "
        "scored twice.",
    ),
    "sliding-window": Description(
        "Perplexity with a sliding window",
        "window (tokens)",
        "Every token of {windows:,} stretches of {longest:,} tokens is scored once: {amount}. A "
        "window of the context length moves over the stretch by {scored_per_window:,} tokens and "
        "scores what is new in it: beyond the first window a token is predicted from more than "
        "context - {scored_per_window:,} tokens, and at most the context. The same tokens are "
        "scored at every context length.",
    ),
    "chunks": Description(
        "Perplexity of chunks, as in the paper's code",
        "chunk (tokens)",
        _CHUNKS + ", as the paper's released code does: positions begin at 0 in it, and documents "
        "are not told apart. Its first token is read and not scored, so shorter chunks score "
        "fewer tokens ({amount}), and more of theirs have little text before them: part of any "
        "fall with length is that alone. The released code cuts everything but the tail.",
    ),
    "document-resets": Description(
        "Perplexity with resets at each document",
        "chunk (tokens)",
        _CHUNKS + ", and each document in it by itself: positions begin anew and no document sees "
        "another. The same tokens are scored at every context length, all but the first of a "
        "document: {amount}.",
    ),
    "no-resets": Description(
        "Perplexity without resets",
        "chunk (tokens)",
        _CHUNKS + " as one sequence: positions run on through documents, which see those before "
        "them. What is scored is what document-resets scores: {amount}.",
    ),
    "long-window": Description(
        "Loss by position",
        "position in the window (tokens)",
        "Every token of {windows:,} windows of {longest:,} tokens is scored once, by the position "
        "of the token before it, in half-octave buckets: {amount}. Buckets hold different tokens: "
        "compare variants at one position rather than positions of one variant.",
    ),
    "from-start": Description(
        "Loss by distance since the document's start",
        "tokens since the document's start",
        "{windows:,} documents are read from their first token, at most {longest:,} tokens of "
        "each, and every token is scored by how many of its document come before the one that "
        "predicts it: {amount}. Far buckets hold the longer documents alone; the table tells how "
        "many.",
    ),
}


def describe(comparison: Comparison) -> Description:
    """The description of its protocol; an unknown one is described by its name."""
    name = comparison.protocol
    unknown = Description(f"{comparison.kind.capitalize()} ({name})", "tokens", "{amount}")
    return DESCRIPTIONS.get(name, unknown)


def protocol_paragraph(comparison: Comparison) -> str:
    """The protocol as it was run, and the documents too short for it."""
    protocol, stated = comparison.protocol, comparison.protocol_row
    documents, contexts = comparison.documents, comparison.contexts
    sums = comparison.sums_by_context[contexts[0]]
    amount = f"{sums.tokens:,.0f} tokens, {sums.bytes:,.0f} bytes of text"
    if len(contexts) > 1 and protocol == "chunks":
        amount += f" at {contexts[0]:,}"
    if documents:
        names = f": {', '.join(documents)}" if len(documents) <= NAMES_SHOWN else ""
        held_out = "held-out " if comparison.name == "validation" else ""
        amount += f", in {len(documents):,} {held_out}documents{names}"
    has_resets = protocol in ("document-resets", "no-resets")
    text = describe(comparison).paragraph.format(
        amount=amount,
        windows=num_windows(comparison),
        scored_per_window=comparison.first_rows[0].get("scored_per_window", 0),
        longest=math.lcm(*contexts),
        of_which=" among those in which documents meet" if has_resets else "",
    )
    if stated.get("too_short"):
        names = ", ".join(stated.get("too_short_names", []))
        rest = stated["too_short"] - len(stated.get("too_short_names", []))
        more = f" and {rest} more" if rest > 0 else ""
        need = "to have a second token" if protocol == "from-start" else "for the longest window"
        text += f" Too short {need}, and so not scored: {names}{more}."
    bos = stated.get("bos", NO_BOS)
    return f"{text} {bos[:1].upper()}{bos[1:]}. {interval_note(comparison)}".rstrip()


def num_windows(comparison: Comparison) -> int:
    """Windows, stretches, blocks or documents, from the protocol's row or else from the rows."""
    if "windows" in comparison.protocol_row:
        return comparison.protocol_row["windows"]
    shortest = comparison.contexts[0]
    rows = [row for row in comparison.first_rows if row["context"] == shortest]
    if comparison.kind == "position":
        rows = [row for row in rows if row["bucket"] == rows[0]["bucket"]]
    return sum(row.get("windows", 0) for row in rows)


def protocol_caption(comparison: Comparison) -> str:
    """What was scored, in one line for the terminal: tokens, documents, windows, BOS."""
    counts = [sums.tokens for sums in comparison.sums_by_context.values()]
    low, high = min(counts), max(counts)
    is_same = len(counts) > 1 and low == high
    tokens = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    scored = f"{'the same ' if is_same else ''}{tokens} tokens"
    documents = len(comparison.documents)
    if documents:
        scored += f" of {_count(documents, 'document')}"
    if comparison.protocol != "from-start":
        unit = UNITS.get(comparison.protocol, "window")
        scored += f" in {_count(num_windows(comparison), unit)}"
    if is_same:
        scored += " at every context"
    return f"{scored}; {comparison.protocol_row.get('bos', NO_BOS)}"


def spread_caption(comparison: Comparison) -> str:
    """What stands beside the numbers of a table: seeds and intervals."""
    seeds = comparison.num_seeds
    text = "1 seed" if seeds == 1 else f"mean ± deviation over {seeds} seeds"
    if len(comparison.documents) >= LEAST_DOCUMENTS:
        text += f"; in brackets: {COVERAGE:.0%} interval over documents"
    return text


def _count(count: int, unit: str) -> str:
    return f"{count:,} {unit}" + ("" if count == 1 else "es" if unit.endswith("ch") else "s")


def few_documents_note(listed: Iterable[Comparison]) -> str:
    """Why there are no intervals where documents are few; empty where there are enough."""
    counts = sorted({len(comparison.documents) for comparison in listed} - {0})
    few = [count for count in counts if count < LEAST_DOCUMENTS]
    if not few:
        return ""
    documents = "1 document" if few == [1] else f"{' or '.join(map(str, few))} documents"
    return (
        f"No intervals over {documents}: below {LEAST_DOCUMENTS} they hold less often than they "
        f"say (of 3, a bootstrap of {COVERAGE:.0%} covers 75%)."
    )


def random_positions_notes(runs: Sequence[Run]) -> list[str]:
    """A sentence for each label that was trained at positions drawn from a range."""
    labels, notes = run_labels(runs), {}
    for run in runs:
        train = run.config["train"]
        if (longest := train.get("position_range")) is None:
            continue
        drawn = "fractions of a token too" if train.get("position_draw") == "float" else "whole"
        text = (
            f"{labels[run.path]} was trained at random positions: for each document in order, from "
            f"{longest:,} ({drawn})"
        )
        rows = [row for kind in KINDS for row in run.of(kind)]
        is_random = {"positions" in row for row in rows}
        if is_random:
            text += "; it is evaluated at " + (
                "positions drawn in the same way"
                if is_random == {True}
                else "positions 0, 1, 2, .."
                if is_random == {False}
                else "positions 0, 1, 2, .. by some protocols, at drawn ones by others"
            )
        notes[f"{text}."] = None
    return list(notes)


def interval_note(comparison: Comparison) -> str:
    """How intervals over documents were made; empty where documents are too few."""
    count = len(comparison.documents)
    if not count:
        return "No intervals: these rows do not tell documents apart."
    if count < LEAST_DOCUMENTS:
        return ""
    rough = " With so few documents they are rough." if count < FEW_DOCUMENTS else ""
    mean = "" if comparison.num_seeds == 1 else " of the mean over seeds"
    return (
        f"{COVERAGE:.0%} intervals{mean}: percentile bootstrap, {count:,} documents drawn with "
        f"replacement {RESAMPLES:,} times (seed {SEED}), the same draws for every number.{rough}"
    )
