"""Runs that may be compared: labels, seeds of one variant, and what was scored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.report.bootstrap import Interval, intervals
from fope_jax.report.rows import ReportError, Row, Run
from fope_jax.report.sums import Spread, Sums, add_up, group, spread

# The order in which protocols are shown; others follow.
ORDER = (
    "same-tokens",
    "sliding-window",
    "chunks",
    "document-resets",
    "no-resets",
    "long-window",
    "from-start",
)
SCORED_DIFFERS = ("chunks",)  # protocols whose contexts do not score the same tokens


def run_labels(runs: Sequence[Run]) -> dict[Path, str]:
    """What each run is called in tables and plots; runs with one label are seeds of one variant.

    The variant's name, and the training length where one name was trained on several.
    """
    lengths: dict[str, set[int]] = {}
    for run in runs:
        lengths.setdefault(run.variant, set()).add(run.training_length)
    return {
        run.path: run.variant
        if len(lengths[run.variant]) == 1
        else f"{run.variant} (trained on {run.training_length})"
        for run in runs
    }


def context_of(row: Row) -> int:
    """Tokens of the row's window."""
    return row["context"]


def spreads_over_seeds(seeds: Sequence[dict[Any, float]]) -> dict[Any, Spread]:
    """Spread of the numbers of each key, over the seeds that have it."""
    keys = sorted({key for own in seeds for key in own})
    return {key: spread([own[key] for own in seeds if key in own]) for key in keys}


def document_sums(
    seeds: Sequence[Sequence[Row]], by: Callable[[Row], Any]
) -> dict[Any, np.ndarray]:
    """The sums of each document, for the bootstrap.

    Returns:
      ``{value of by: [D, seeds, 5]}``, the last axis as ``Sums``, without what fewer than two
      documents have; empty where a row does not name its document.
    """
    rows = [row for own in seeds for row in own]
    if any(row.get("document") is None for row in rows):
        return {}
    places = {name: i for i, name in enumerate(sorted({row["document"] for row in rows}))}
    keys = sorted({by(row) for row in rows})
    sums = {key: np.zeros((len(places), len(seeds), len(Sums._fields))) for key in keys}
    for index, own in enumerate(seeds):
        for row in own:
            sums[by(row)][places[row["document"]], index] += add_up([row])
    return {key: x for key, x in sums.items() if (x.any(axis=(1, 2))).sum() > 1}


def metrics_of_seeds(
    pooled: dict[Any, list[list[float]]], number: Callable[[Sums], float]
) -> dict[Any, list[float]]:
    """``{key: number of each seed}`` for the keys that every seed has a token for."""
    sums = {key: [Sums(*own) for own in seeds] for key, seeds in pooled.items()}
    return {
        key: [number(own) for own in seeds]
        for key, seeds in sums.items()
        if all(own.tokens for own in seeds)
    }


@dataclass(frozen=True)
class Comparison:
    """Runs that were scored on the same thing and so may share a plot.

    Attributes:
      kind: of the rows.
      name: the split, the passkey template or the retrieval task.
      curves: label -> one list of rows for each seed.
      training_lengths: label -> tokens of a training sequence.
      stated: the row in which a run states the protocol; empty where none does.
    """

    kind: str
    name: str
    curves: dict[str, list[list[Row]]]
    training_lengths: dict[str, int]
    stated: Row = field(default_factory=dict)

    @property
    def first(self) -> list[Row]:
        """The rows of one seed: what was scored is the same for all."""
        return next(iter(self.curves.values()))[0]

    @property
    def protocol(self) -> str:
        """Its name, "passkey" where the rows have none."""
        return self.first[0].get("protocol") or self.kind

    @property
    def documents(self) -> list[str]:
        """Names of the documents with a scored token; empty where the rows do not tell."""
        return sorted({row["document"] for row in self.first if row.get("document") is not None})

    @property
    def seeds(self) -> int:
        """Seeds of the label that has most."""
        return max(len(seeds) for seeds in self.curves.values())

    def per_seed(
        self, number: Callable[[Sums], float], by: Callable[[Row], Any]
    ) -> dict[str, list[dict[Any, float]]]:
        """``{label: [{value of by: number of the pooled rows} of each seed]}``."""
        return {
            label: [
                {key: number(add_up(own)) for key, own in group(rows, by).items()} for rows in seeds
            ]
            for label, seeds in self.curves.items()
        }

    def numbers(
        self, number: Callable[[Sums], float], by: Callable[[Row], Any] = context_of
    ) -> dict[str, dict[Any, Spread]]:
        """``{label: {value of by: Spread over seeds}}``."""
        return {
            label: spreads_over_seeds(seeds) for label, seeds in self.per_seed(number, by).items()
        }

    def intervals(
        self, number: Callable[[Sums], float], by: Callable[[Row], Any] = context_of
    ) -> dict[str, dict[Any, Interval]]:
        """``{label: {value of by: interval, over documents, of the mean over seeds}}``.

        Without an interval is what fewer than two documents have tokens for.
        """

        def means(pooled: dict[Any, list[list[float]]]) -> dict[Any, float]:
            return {k: sum(own) / len(own) for k, own in metrics_of_seeds(pooled, number).items()}

        return {
            label: intervals(document_sums(seeds, by), means)
            for label, seeds in self.curves.items()
        }

    def ratio_intervals(self, number: Callable[[Sums], float]) -> dict[str, dict[int, Interval]]:
        """The intervals of ``ratios``: both numbers of a ratio are of the same documents."""

        def means_from(base: int) -> Callable[[dict[int, list[list[float]]]], dict[int, float]]:
            def means(pooled: dict[int, list[list[float]]]) -> dict[int, float]:
                numbers = metrics_of_seeds(pooled, number)
                return {
                    key: sum(x / y for x, y in zip(own, numbers[base], strict=True)) / len(own)
                    for key, own in numbers.items()
                    if base in numbers
                }

            return means

        return {
            label: intervals(
                document_sums(seeds, context_of), means_from(self.training_lengths[label])
            )
            for label, seeds in self.curves.items()
        }

    def ratios(self, number: Callable[[Sums], float]) -> dict[str, dict[int, Spread]]:
        """Like ``numbers``, relative to the same seed's number at its training length.

        Empty for a label that was not scored there.
        """
        table = {}
        for label, seeds in self.per_seed(number, context_of).items():
            base = self.training_lengths[label]
            table[label] = spreads_over_seeds(
                [{key: x / own[base] for key, x in own.items()} for own in seeds if base in own]
            )
        return table

    @property
    def contexts(self) -> list[int]:
        """All context lengths in tokens."""
        rows = [row for seeds in self.curves.values() for own in seeds for row in own]
        return sorted({row["context"] for row in rows})


# What rows of a kind are set apart by, other than the split.
PARTS = {"passkey": "template", "retrieval": "task"}


def scored_key(kind: str, rows: Sequence[Row]) -> tuple[Hashable, ...]:
    """A key that the rows of comparable runs share.

    Perplexities compare where the same tokens were scored: protocol, split, tokens and bytes, at
    each context by itself where the protocol scores other tokens at each.
    Losses by position compare where the same windows were read, and retrieval where template or
    task, number of trials and number of answer tokens agree. All compare where windows begin with
    the same BOS token, or all with none.

    Raises:
      ReportError: the rows are of several protocols, splits, templates or BOS tokens, or a run
        whose contexts should have been scored on the same tokens was not.
    """
    part = PARTS.get(kind, "split")
    names = {(row.get("protocol"), row[part], row.get("bos_token")) for row in rows}
    if len(names) > 1:
        raise ReportError(f"{kind} rows of {sorted(names, key=str)} do not belong in one plot")
    first = rows[0]
    return (*_what_was_scored(kind, rows, part), first.get("bos_token"))


def _what_was_scored(kind: str, rows: Sequence[Row], part: str) -> tuple[Hashable, ...]:
    first = rows[0]
    if kind in PARTS:
        cells = group(rows, lambda row: (row["context"], row["depth"]))
        largest = max((add_up(own) for own in cells.values()), key=lambda sums: sums.total)
        return (first["kind"], first[part], largest.total, largest.tokens)
    scored = {context: add_up(own) for context, own in group(rows, context_of).items()}
    sizes = {(sums.tokens, sums.bytes) for sums in scored.values()}
    if first["protocol"] in SCORED_DIFFERS:
        each = ((context, sums.tokens, sums.bytes) for context, sums in scored.items())
        return (first["protocol"], first[part], *each)
    if len(sizes) > 1:
        counts = ", ".join(f"{context}: {sums.tokens:g}" for context, sums in scored.items())
        raise ReportError(
            f"{kind} rows of {first['variant']!r} (seed {first['seed']}, step {first['step']}) "
            f"were not scored on the same tokens at every context (tokens by context: {counts})"
        )
    longest = first["context"] if kind == "position" else first["scored_per_window"]
    return (first["protocol"], first[part], longest, *sizes.pop())


def comparisons(runs: Sequence[Run], kind: str) -> list[Comparison]:
    """Sorts the rows of one kind into sets of comparable runs.

    Runs that were scored on different tokens end up in different comparisons, never in one.
    """
    names, found = run_labels(runs), {}
    part = PARTS.get(kind, "split")
    for run in runs:
        groups = group(run.of(kind), lambda row: (row.get("protocol") or kind, row[part]))
        for (protocol, name), rows in groups.items():
            key = scored_key(kind, rows)
            stated = [
                row
                for row in run.of("protocol")
                if row["protocol"] == protocol and row.get(part) == name
            ]
            new = Comparison(kind, name, {}, {}, *stated[:1])
            comparison = found.setdefault(key, new)
            comparison.curves.setdefault(names[run.path], []).append(rows)
            comparison.training_lengths[names[run.path]] = run.training_length
    order = {name: place for place, name in enumerate(ORDER)}
    return [
        found[key] for key in sorted(found, key=lambda k: (order.get(k[0], len(order)), str(k)))
    ]


def check_comparable(comparison: Comparison) -> None:
    """Raises ReportError where a comparison joins rows that were scored on different things."""
    keys: dict[Hashable, str] = {}
    for label, seeds in comparison.curves.items():
        for rows in seeds:
            keys.setdefault(scored_key(comparison.kind, rows), label)
    if len(keys) > 1:
        (one, first), (other, second), *_ = keys.items()
        raise ReportError(
            f"{comparison.kind} rows of {first!r} and {second!r} were scored on different things, "
            f"{one} and {other}, and do not belong in one plot"
        )
