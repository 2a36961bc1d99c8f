"""Comparable runs: labels (runs of one label are seeds of one variant), and what was scored."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.report.bootstrap import LEAST_DOCUMENTS, Interval, intervals
from fope_jax.report.results import DIGEST, DOCUMENTS_KEPT, documents_digest
from fope_jax.report.rows import ReportError, Row, Run, flatten
from fope_jax.report.sums import Metric, Spread, Sums, add_up, group, spread
from fope_jax.storage.changeable_keys import is_changeable
from fope_jax.storage.protocol_names import ON_TEXT

ORDER = ON_TEXT  # of the page; others follow
SCORED_DIFFERS = ("chunks",)  # protocols whose contexts do not score the same tokens
PLACED_BY_LONGEST = ("same-tokens",)  # whose longest context says which tokens are scored
BASELINE = "rope"  # what the others are compared with, if it is there
TASK_FIELD = {"passkey": "template", "retrieval": "task"}  # the field that names the task

Key = Callable[[Row], Any]


def run_labels(runs: Sequence[Run]) -> dict[Path, str]:
    """Label of each run: its variant, and what tells runs of one variant apart beside the seed.

    That is the training length, one other key of the configuration, or the path where these and a
    seed are equal. Raises ReportError where more than one of them is needed.
    """
    variants: dict[str, list[Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    return {
        run.path: f"{variant} ({mark})" if mark else variant
        for variant, members in variants.items()
        for run, mark in zip(members, _marks(members), strict=True)
    }


def _marks(runs: Sequence[Run]) -> list[str]:
    """What tells runs of one variant apart, for each; "" if they are its seeds."""
    lengths = list(dict.fromkeys(run.training_length for run in runs))
    alike = [[run for run in runs if run.training_length == length] for length in lengths]
    differing = [differing_keys(members) for members in alike]
    if len(lengths) > 1 and not any(differing):
        marks = [f"trained on {run.training_length}" for run in runs]
    elif len(lengths) == 1 and len(differing[0]) == 1:
        (key,) = differing[0]
        name = key.removeprefix("position.")
        marks = [f"{name}={_key_text(_flat_config(run.config)[key])}" for run in runs]
    elif not any(differing):
        marks = [""] * len(runs)
    else:
        raise _indistinct(*next(pair for pair in zip(alike, differing, strict=True) if pair[1]))
    if len({(run.seed, mark) for run, mark in zip(runs, marks, strict=True)}) == len(runs):
        return marks
    if any(marks):
        raise _indistinct(runs, {})
    return [str(run.path) for run in runs]


def differing_keys(runs: Sequence[Run], matter: Collection[str] = ()) -> dict[str, list[str]]:
    """Keys in which runs differ -> their values; a key that one lacks is a newer version's.

    Without those that may change when a run resumes, but for the ones that ``matter``.
    """
    configs = [_flat_config(run.config) for run in runs]
    shared = [key for key in configs[0] if all(key in config for config in configs)]
    values = {key: sorted({_key_text(config[key]) for config in configs}) for key in shared}
    return {
        key: texts
        for key, texts in values.items()
        if len(texts) > 1 and key != "seed" and (key in matter or not is_changeable(key))
    }


def _flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys; a list of methods or scalings as their names, and each one's knobs."""
    flat: dict[str, Any] = {}
    for key, value in flatten(config).items():
        flat[key] = value
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            flat[key] = [item.get("method", item.get("scaling")) for item in value]
            flat |= _flat_config({key: {str(index): item for index, item in enumerate(value)}})
    return flat


def _key_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_key_text, value)) or "none"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _indistinct(runs: Sequence[Run], differing: dict[str, list[str]]) -> ReportError:
    """For runs of one name that are not its seeds; names two of them and what differs."""
    one, *others = runs
    other = next((run for run in others if differing_keys([one, run])), others[0])
    if not differing:  # a seed that stands twice at one length, or with one value
        one, other = next(
            (a, b)
            for a, b in itertools.combinations(runs, 2)
            if a.seed == b.seed
            and a.training_length == b.training_length
            and not differing_keys([a, b])
        )
    keys = "; ".join(f"{key} ({', '.join(texts)})" for key, texts in differing.items())
    reason = f"differ in {keys}" if keys else f"both have seed {one.seed}"
    return ReportError(
        f"{one.path} and {other.path} are both called {one.variant!r} and {reason}: averaged, they "
        "would look like seeds of one variant. Call what is not the same by another name, with "
        '--config.name=NAME before training or as "name" in config.json (of a results file in its '
        "first line), or report on them apart"
    )


def context_of(row: Row) -> int:
    return row["context"]


def spreads_over_seeds(seeds: Sequence[dict[Any, float]]) -> dict[Any, Spread]:
    keys = sorted({key for numbers in seeds for key in numbers})
    return {key: spread([numbers[key] for numbers in seeds if key in numbers]) for key in keys}


@dataclass(frozen=True)
class Comparison:
    """Runs that were scored on the same tokens or trials and may share a figure.

    In the methods ``metric`` is a method of `Sums` and ``key`` groups rows, by default by context.
    ``relative`` numbers are divided by that of the same seed and documents at the training length;
    labels not scored at that length have none.

    Attributes:
      kind: kind of the rows.
      name: the split, the passkey template or the retrieval task.
      curves: label -> one list of rows a seed.
      training_lengths: label -> tokens of a training sequence.
      protocol_row: a run's row of kind "protocol"; empty where there is none.
      paths: of the runs.
    """

    kind: str
    name: str
    curves: dict[str, list[list[Row]]]
    training_lengths: dict[str, int]
    protocol_row: Row = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)

    @property
    def first_rows(self) -> list[Row]:
        """The rows of one seed; every seed scored the same tokens."""
        return next(iter(self.curves.values()))[0]

    @property
    def protocol(self) -> str:
        """The protocol's name; the kind where rows name none ("passkey")."""
        return self.first_rows[0].get("protocol") or self.kind

    @property
    def documents(self) -> list[str]:
        """Names of the scored documents; empty where rows do not name them."""
        return sorted(
            {row["document"] for row in self.first_rows if row.get("document") is not None}
        )

    @property
    def num_seeds(self) -> int:
        """The largest number of seeds of a label."""
        return max(len(seeds) for seeds in self.curves.values())

    @property
    def contexts(self) -> list[int]:
        return sorted({row["context"] for _, row in self.labelled_rows()})

    @property
    def sums_by_context(self) -> dict[int, Sums]:
        """The sums of one seed at each context; not every label was read at each."""
        found: dict[int, Sums] = {}
        for rows in (rows for seeds in self.curves.values() for rows in seeds):
            found = {c: add_up(pool) for c, pool in group(rows, context_of).items()} | found
        return dict(sorted(found.items()))

    def labelled_rows(self) -> list[tuple[str, Row]]:
        """Every row with its label, sorted by context within a seed."""
        return [
            (label, row)
            for label, seeds in self.curves.items()
            for rows in seeds
            for row in sorted(rows, key=context_of)
        ]

    def numbers(
        self, metric: Metric, key: Key = context_of, *, relative: bool = False
    ) -> dict[str, dict[int, dict[Any, float]]]:
        """``{label: {seed: {key: number}}}``."""
        table: dict[str, dict[int, dict[Any, float]]] = {}
        for label, seeds in self.curves.items():
            table[label] = {}
            for rows in seeds:
                numbers = {k: metric(add_up(pool)) for k, pool in group(rows, key).items()}
                if relative:
                    base = numbers.get(self.training_lengths[label])
                    numbers = {} if base is None else {k: x / base for k, x in numbers.items()}
                if numbers:
                    table[label][rows[0]["seed"]] = numbers
        return table

    def spreads(
        self, metric: Metric, key: Key = context_of, *, relative: bool = False
    ) -> dict[str, dict[Any, Spread]]:
        """``{label: {key: Spread over seeds}}``."""
        numbers = self.numbers(metric, key, relative=relative)
        return {label: spreads_over_seeds([*seeds.values()]) for label, seeds in numbers.items()}

    def intervals(
        self, metric: Metric, key: Key = context_of, *, relative: bool = False
    ) -> dict[str, dict[Any, Interval]]:
        """``{label: {key: interval over documents of the mean over seeds}}``; see `intervals`."""

        table = {}
        for label, seeds in self.curves.items():
            base = self.training_lengths.get(label)

            def means(sums: dict[Any, np.ndarray], base: Any = base) -> dict[Any, np.ndarray]:
                values = {k: metric(Sums(*np.moveaxis(x, -1, 0))) for k, x in sums.items()}
                if relative:
                    values = {k: x / values[base] for k, x in values.items() if base in values}
                return {k: x.mean(axis=1) for k, x in values.items()}  # over seeds

            table[label] = intervals(document_sums(seeds, key), means)
        return table


def document_sums(seeds: Sequence[Sequence[Row]], key: Key) -> dict[Any, np.ndarray]:
    """``{key: [D, seeds, fields of Sums]}`` of each document, for keys with `LEAST_DOCUMENTS`.

    Empty where a row names no document.
    """
    rows = [row for seed_rows in seeds for row in seed_rows]
    if any(row.get("document") is None for row in rows):
        return {}
    index = {name: i for i, name in enumerate(sorted({row["document"] for row in rows}))}
    keys = sorted({key(row) for row in rows})
    sums = {k: np.zeros((len(index), len(seeds), len(Sums._fields))) for k in keys}
    for seed, seed_rows in enumerate(seeds):
        for row in seed_rows:
            sums[key(row)][index[row["document"]], seed] += add_up([row])
    return {k: x for k, x in sums.items() if x.any(axis=(1, 2)).sum() >= LEAST_DOCUMENTS}


def scored_key(kind: str, rows: Sequence[Row]) -> tuple[Hashable, ...]:
    """What the rows of comparable runs share.

    Perplexities share protocol, split, documents, tokens and bytes; for ``SCORED_DIFFERS``, at each
    context. Equal counts are not enough: a tokenizer of bytes gives them for any windows. Losses by
    position also share the windows. Retrieval shares template or task, trials and answer tokens.
    All share the BOS token, or have none. The last entry is that of `_documents`.

    Raises:
      ReportError: the rows mix protocols, splits, templates or BOS tokens, or contexts that should
        score the same tokens did not.
    """
    name = TASK_FIELD.get(kind, "split")
    names = {(row.get("protocol"), row[name], row.get("bos_token")) for row in rows}
    if len(names) > 1:
        raise ReportError(f"{kind} rows of {sorted(names, key=str)} do not belong in one plot")
    first = rows[0]
    bos = first.get("bos_token")
    if kind in TASK_FIELD:
        cells = group(rows, lambda row: (row["context"], row["depth"]))
        largest = max(map(add_up, cells.values()), key=lambda sums: sums.total)
        return (kind, first[name], largest.total, largest.tokens, bos, None)
    scored = {context: add_up(pool) for context, pool in group(rows, context_of).items()}
    sizes = {(sums.tokens, sums.bytes) for sums in scored.values()}
    if first["protocol"] in SCORED_DIFFERS:
        each = ((context, sums.tokens, sums.bytes) for context, sums in scored.items())
        return (first["protocol"], first[name], *each, bos, _documents(rows))
    if len(sizes) > 1:
        counts = "; ".join(f"{context}: {sums.tokens:,.0f}" for context, sums in scored.items())
        raise ReportError(
            f"{kind} rows of {first['variant']!r} (seed {first['seed']}, step {first['step']}) "
            f"were not scored on the same tokens at every context (tokens by context: {counts})"
        )
    window = first["context"] if kind == "position" else first["scored_per_window"]
    longest = max(scored) if first["protocol"] in PLACED_BY_LONGEST else 0
    documents = _documents(rows)
    return (first["protocol"], first[name], window, *sizes.pop(), bos, longest, documents)


def _documents(rows: Sequence[Row]) -> tuple[bool, str] | None:
    """Whether they are more than results files keep, and their digest; None if rows name none."""
    if stored := [row[DIGEST] for row in rows if DIGEST in row]:
        return True, stored[0]
    named = [row for row in rows if row.get("document")]
    if not named:
        return None
    return len({row["document"] for row in named}) > DOCUMENTS_KEPT, documents_digest(named)


def _comparable_keys(keys: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The key under which rows of each `scored_key` are compared.

    It is the key itself, but for rows of which many documents were added up before there was a
    digest: they go with those that have all else in common, if these are of one set of documents.
    """
    many: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    for key in (keys := list(keys)):
        if key[-1] is not None and key[-1][0]:
            many.setdefault(key[:-1], set()).add(key)
    found = {}
    for key in keys:
        others = [] if key[-1] is not None else [*many.get(key[:-1], ())]
        found[key] = others[0] if len(others) == 1 else key
    return found


def comparisons(runs: Sequence[Run], kind: str) -> list[Comparison]:
    """Groups the rows of one kind; runs scored on different tokens are in different comparisons.

    Labels are the variants' names where none is there at two training lengths.
    """
    labels, name = run_labels(runs), TASK_FIELD.get(kind, "split")
    by_key: dict[tuple[Hashable, ...], Comparison] = {}
    scored = [
        (run, *named, rows, scored_key(kind, rows))
        for run in runs
        for named, rows in group(
            run.of(kind), lambda row: (row.get("protocol") or kind, row[name])
        ).items()
    ]
    keys = _comparable_keys(key for *_, key in scored)
    for run, protocol, what, rows, key in scored:
        stated = [
            row
            for row in run.of("protocol")
            if row["protocol"] == protocol and row.get(name) == what
        ]
        new = Comparison(kind, what, {}, {}, stated[0] if stated else {})
        comparison = by_key.setdefault(keys[key], new)
        comparison.curves.setdefault(labels[run.path], []).append(rows)
        comparison.training_lengths[labels[run.path]] = run.training_length
        comparison.paths.append(run.path)
    order: dict[Hashable, int] = {protocol: index for index, protocol in enumerate(ORDER)}
    variants = {labels[run.path]: run.variant for run in runs}
    return [
        _with_short_labels(by_key[key], variants)
        for key in sorted(by_key, key=lambda k: (order.get(k[0], 99), str(k)))
    ]


def _with_short_labels(comparison: Comparison, variants: dict[str, str]) -> Comparison:
    """Labels without the training length where they stay different; ``variants`` by label."""
    names = {label: variants[label] for label in comparison.curves}
    if len(set(names.values())) < len(names):
        return comparison
    return dataclasses.replace(
        comparison,
        curves={names[label]: rows for label, rows in comparison.curves.items()},
        training_lengths={names[k]: length for k, length in comparison.training_lengths.items()},
    )


def check_comparable(comparison: Comparison) -> None:
    """Raises ReportError where the rows of a comparison differ in what was scored."""
    scored = [
        (label, scored_key(comparison.kind, rows))
        for label, seeds in comparison.curves.items()
        for rows in seeds
    ]
    keys = _comparable_keys(key for _, key in scored)
    labels: dict[Hashable, str] = {}
    for label, key in scored:
        labels.setdefault(keys[key], label)
    if len(labels) > 1:
        (one, first), (other, second), *_ = labels.items()
        raise ReportError(
            f"{comparison.kind} rows of {first!r} and {second!r} were scored on different things, "
            f"{one} and {other}, and do not belong in one plot"
        )
