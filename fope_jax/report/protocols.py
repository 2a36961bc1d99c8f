"""Protocols in words: what was scored, out of what, what was left, and how sure a number is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fope_jax.report.bootstrap import COVERAGE, RESAMPLES, SEED
from fope_jax.report.comparison import Comparison
from fope_jax.report.rows import NO_BOS, Row
from fope_jax.report.sums import add_up

FEW_DOCUMENTS = 20  # below it an interval over documents is rough, and says so
NAMES_SHOWN = 8
UNITS = {  # what a protocol places; others place windows
    "sliding-window": "stretch",
    "chunks": "block",
    "document-resets": "block",
    "no-resets": "block",
}


@dataclass(frozen=True)
class Words:
    """How a protocol is spoken of.

    Attributes:
      title: heading of its section and figure.
      x: what the horizontal axis holds.
      how: one paragraph with ``{fields}`` of ``_fields``.
    """

    title: str
    x: str
    how: str


_CHUNKS = (
    "Documents are joined, each with its end-of-document token, and {windows:,} blocks of "
    "{longest:,} tokens of them, evenly spaced{of_which}, are cut into chunks of the context "
    "length. A chunk is read by itself"
)

WORDS = {
    "same-tokens": Words(
        "Perplexity against context length",
        "context length (tokens)",
        "The last {scored_per_window:,} tokens of {windows:,} windows are scored: {amount}. They "
        "are the same tokens at every context length; only the text before them grows. Each "
        "window lies inside one document, windows are spaced evenly over it, and no token is "
        "scored twice.",
    ),
    "sliding-window": Words(
        "Perplexity with a sliding window",
        "window (tokens)",
        "Every token of {windows:,} stretches of {longest:,} tokens is scored once: {amount}. A "
        "window of the context length moves over the stretch by {scored_per_window:,} tokens and "
        "scores what is new in it: beyond the first window a token is predicted from more than "
        "context - {scored_per_window:,} tokens, and at most the context. The same tokens are "
        "scored at every context length.",
    ),
    "chunks": Words(
        "Perplexity of chunks, as in the paper's code",
        "chunk (tokens)",
        _CHUNKS + ", as the paper's released code does: positions begin at 0 in it, and documents "
        "are not told apart. Its first token is read and not scored, so shorter chunks score "
        "fewer tokens ({amount}), and more of theirs have little text before them: part of any "
        "fall with length is that alone. The released code cuts everything but the tail.",
    ),
    "document-resets": Words(
        "Perplexity with resets at each document",
        "chunk (tokens)",
        _CHUNKS + ", and each document in it by itself: positions begin anew and no document sees "
        "another. The same tokens are scored at every context length, all but the first of a "
        "document: {amount}.",
    ),
    "no-resets": Words(
        "Perplexity without resets",
        "chunk (tokens)",
        _CHUNKS + " as one sequence: positions run on through documents, which see those before "
        "them. What is scored is what document-resets scores: {amount}.",
    ),
    "long-window": Words(
        "Loss by position",
        "position in the window (tokens)",
        "Every token of {windows:,} windows of {longest:,} tokens is scored once, by the position "
        "of the token before it, in half-octave buckets: {amount}. Buckets hold different tokens: "
        "compare variants at one position rather than positions of one variant.",
    ),
    "from-start": Words(
        "Loss by distance since the document's start",
        "tokens since the document's start",
        "{windows:,} documents are read from their first token, at most {longest:,} tokens of "
        "each, and every token is scored by how many of its document come before the one that "
        "predicts it: {amount}. Far buckets hold the longer documents alone; the table tells how "
        "many.",
    ),
}


def words(comparison: Comparison) -> Words:
    """The words of its protocol; those of another are its name."""
    name = comparison.protocol
    return WORDS.get(name, Words(f"{comparison.kind.capitalize()} ({name})", "tokens", "{amount}"))


def protocol_paragraph(comparison: Comparison) -> str:
    """The protocol as it was run, in a paragraph, with what was left out."""
    text = words(comparison).how.format_map(_fields(comparison))
    stated = comparison.stated
    if stated.get("too_short"):
        shown = stated.get("too_short_names", [])
        rest = stated["too_short"] - len(shown)
        more = f" and {rest} more" if rest > 0 else ""
        what = (
            "to have a second token"
            if comparison.protocol == "from-start"
            else ("for the longest window")
        )
        text += f" Too short {what}, and so not scored: {', '.join(shown)}{more}."
    return f"{text} {bos(comparison)}."


def _fields(comparison: Comparison) -> dict[str, object]:
    rows = _at_one_context(comparison)
    sums, documents = add_up(rows), comparison.documents
    amount = f"{sums.tokens:,.0f} tokens, {sums.bytes:,.0f} bytes of text"
    if len(comparison.contexts) > 1 and comparison.protocol == "chunks":
        amount += f" at {rows[0]['context']:,}"
    if documents:
        named = f": {', '.join(documents)}" if len(documents) <= NAMES_SHOWN else ""
        held_out = "held-out " if comparison.name == "validation" else ""
        amount += f", in {len(documents):,} {held_out}documents{named}"
    resets = comparison.protocol in ("document-resets", "no-resets")
    return {
        "amount": amount,
        "windows": windows(comparison),
        "scored_per_window": rows[0].get("scored_per_window", 0),
        "longest": math.lcm(*comparison.contexts),
        "of_which": " among those in which documents meet" if resets else "",
    }


def _at_one_context(comparison: Comparison) -> list[Row]:
    shortest = min(comparison.contexts)
    return [row for row in comparison.first if row["context"] == shortest]


def windows(comparison: Comparison) -> int:
    """Windows, stretches, blocks or documents: as the protocol's row counts them, else its rows."""
    if "windows" in comparison.stated:
        return comparison.stated["windows"]
    rows = _at_one_context(comparison)
    if comparison.kind == "position":
        rows = [row for row in rows if row["bucket"] == rows[0]["bucket"]]
    return sum(row.get("windows", 0) for row in rows)


def bos(comparison: Comparison) -> str:
    """What stands before the first token of a window, as a sentence without its full stop."""
    text = comparison.stated.get("bos", NO_BOS)
    return text[:1].upper() + text[1:]


MOST_BANDS = 4  # more of them hide each other, and the tables have every interval


def has_bands(comparison: Comparison) -> bool:
    """Whether a figure of so many variants shows intervals as bands."""
    return len(comparison.curves) <= MOST_BANDS


def protocol_caption(comparison: Comparison, intervals: str = "in brackets") -> str:
    """What a table or figure shows, for one that is cut out of the page.

    Args:
      comparison: what is shown.
      intervals: where it shows the intervals.

    Returns:
      Scored tokens, documents and windows; BOS; seeds; what the intervals are.
    """
    sums = [add_up([r for r in comparison.first if r["context"] == c]) for c in comparison.contexts]
    low, high = min(s.tokens for s in sums), max(s.tokens for s in sums)
    tokens = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    same = len(sums) > 1 and low == high
    scored = [f"{'the same ' if same else ''}{tokens} tokens"]
    count = len(comparison.documents)
    if count:
        scored.append(f"of {_counted(count, 'document')}")
    if comparison.protocol != "from-start":
        scored.append(
            f"in {_counted(windows(comparison), UNITS.get(comparison.protocol, 'window'))}"
        )
    if same:
        scored.append("at every context")
    seeds = comparison.seeds
    parts = [
        " ".join(scored),
        comparison.stated.get("bos", NO_BOS),
        "1 seed" if seeds == 1 else f"mean ± deviation over {seeds} seeds",
    ]
    if count > 1 and (intervals != "bands" or has_bands(comparison)):
        parts.append(f"{intervals}: {COVERAGE:.0%} interval over documents")
    return "; ".join(parts)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "es" if what.endswith("ch") else "s")


def interval_note(comparison: Comparison) -> str:
    """What the intervals are; why there are none, where there are none."""
    count = len(comparison.documents)
    if not count:
        return "No intervals: these rows do not tell documents apart."
    if count == 1:
        return "No intervals: all scored tokens are of one document."
    rough = " With so few documents they are rough." if count < FEW_DOCUMENTS else ""
    mean = "" if comparison.seeds == 1 else " of the mean over seeds"
    return (
        f"{COVERAGE:.0%} intervals{mean}: percentile bootstrap, {count:,} documents drawn with "
        f"replacement {RESAMPLES:,} times (seed {SEED}), the same draws for every number.{rough}"
    )
