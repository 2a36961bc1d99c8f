"""The rows of an evaluation as one record for each protocol, text or task, and context."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fope_jax.report.comparison import ORDER, TASK_FIELD
from fope_jax.report.rows import Row
from fope_jax.report.sums import add_up, group

KINDS = ("perplexity", "position", "passkey", "retrieval")
_PROTOCOLS = (*ORDER, *TASK_FIELD)
_WHOLE_WINDOW = (0, 0)  # in place of a bucket


def summarize(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Adds up rows of one evaluated run over documents and depths.

    Returns:
      Records in the order of the report, with

      protocol, data       such as "same-tokens" and "validation", or "retrieval" and "recall"
      context, multiple    tokens of a window, and how many training lengths that is
      bucket               (first position, the one after the last) of protocols by position, None
                           for the others
      loss, perplexity, bits_per_byte
                           of the scored tokens (those of answers where there are any): nats per
                           token, its exponential, and bits per byte of text (NaN without bytes)
      accuracy             share, 0 to 1, of trials answered right; of protocols on text, share of
                           tokens that are the model's most likely one
      tokens, trials, documents
                           what was scored; 0 where it does not apply

    >>> row = {"kind": "retrieval", "task": "recall", "context": 128, "training_length": 64}
    >>> record, = summarize([row | {"nats": 6.0, "tokens": 4, "correct": 3, "total": 4}])
    >>> record["multiple"], record["loss"], record["accuracy"], record["trials"]
    (2.0, 1.5, 0.75, 4)
    """
    scored = [row for row in rows if row.get("kind") in KINDS]
    return [_record(same) for same in group(scored, _key).values()]


def _key(row: Row) -> tuple[Any, ...]:
    """What the rows of one record share; sorts in the order of the report."""
    protocol, data = _protocol_and_data(row)
    known = _PROTOCOLS.index(protocol) if protocol in _PROTOCOLS else len(_PROTOCOLS)
    bucket = tuple(row["bucket"]) if row["kind"] == "position" else _WHOLE_WINDOW
    return known, protocol, data, row.get("bos_token", ""), row["context"], bucket


def _protocol_and_data(row: Row) -> tuple[str, str]:
    kind = row["kind"]
    return (kind, row[TASK_FIELD[kind]]) if kind in TASK_FIELD else (row["protocol"], row["split"])


def _record(rows: list[Row]) -> dict[str, Any]:
    first, sums = rows[0], add_up(rows)
    protocol, data = _protocol_and_data(first)
    names = {row.get("document") for row in rows} - {None}
    has_trials = first["kind"] in TASK_FIELD
    return {
        "protocol": protocol,
        "data": data,
        "context": first["context"],
        "multiple": first["context"] / first["training_length"],
        "bucket": tuple(first["bucket"]) if first["kind"] == "position" else None,
        "loss": float(sums.loss()),
        "perplexity": float(sums.perplexity()),
        "bits_per_byte": float(sums.bits_per_byte()) if sums.bytes else math.nan,
        "accuracy": float(sums.accuracy() if has_trials else sums.token_accuracy()) / 100,
        "tokens": int(sums.tokens),
        "trials": int(sums.total),
        "documents": len(names) or sum(row.get("documents", 0) for row in rows),
    }
