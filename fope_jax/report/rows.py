"""Rows of finished runs: read, checked, grouped, and turned into the numbers that are shown.

Files hold sums and counts; every ratio of the report is taken here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fope_jax.files import as_path, json_lines, read_json
from fope_jax.report.bootstrap import Interval, intervals

Row = dict[str, Any]

_NUMBER = (int, float)
_IDS = {"variant": str, "seed": int, "step": int, "training_length": int}
# The order in which protocols are shown; others follow.
ORDER = (
    "same-tokens", "sliding-window", "chunks", "document-resets", "no-resets", "long-window",
    "from-start",
)  # fmt: skip
SCORED_DIFFERS = ("chunks",)  # protocols whose contexts do not score the same tokens
NO_BOS = "no BOS token is added"  # where the rows are older than the statement
_SUMS = {"nats": _NUMBER, "tokens": _NUMBER, "bytes": _NUMBER, "correct": _NUMBER}

_ANSWERS: dict[str, Any] = dict.fromkeys(("found", "asked", "first", "rank_sum", "candidates"), int)

# What a row of each kind must have; kinds that are not listed belong to someone else's report.
FIELDS: dict[str, dict[str, Any]] = {
    "train": {"step": int, "tokens_seen": int, "loss": _NUMBER},
    "perplexity": _IDS
    | _SUMS
    | {
        "protocol": str,
        "split": str,
        "context": int,
        "scored_per_window": int,
        "windows": int,
        "document": (str, type(None)),
    },
    "validation": _IDS
    | _SUMS
    | {"split": str, "context": int, "scored_per_window": int, "tokens_seen": int},
    "position": _IDS | _SUMS | {"protocol": str, "split": str, "context": int, "bucket": list},
    "passkey": _IDS
    | {"template": str, "context": int, "depth": _NUMBER}
    | {"correct": int, "total": int, "nats": _NUMBER, "tokens": int},
    "spectrum": _IDS
    | {"split": str, "context": int, "layer": int, "floor_energy": list, "profile_energy": list}
    | {name: (list, type(None)) for name in ("leakage", "undertrained_energy")}
    | {name: (*_NUMBER, type(None)) for name in ("q_leakage", "k_leakage", "hidden_leakage")},
    "retrieval": _IDS
    | {"task": str, "context": int, "depth": (*_NUMBER, type(None))}
    | {"correct": int, "total": int, "nats": _NUMBER, "tokens": int}
    | _ANSWERS,
    "protocol": _IDS | {"protocol": str, "settings": dict},
    "time": {"phase": str, "seconds": _NUMBER},
    "run": {"config": dict, "info": dict, "lineage": dict},
}


# What a row may have: those of runs that were evaluated before it was measured do not.
OPTIONAL: dict[str, dict[str, Any]] = {"passkey": _ANSWERS}


class ReportError(ValueError):
    """Rows that cannot be read or must not be compared; the message names file and line or runs."""


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
      path: the directory.
      config: config.json.
      info: run.json; empty where the run has none.
      rows: checked rows; of the evaluation after training, those of the newest evaluated step,
        and of the spectra all, which are measured before training too.
      step: the newest evaluated step, or None.
      lineage: lineage.json; empty where the run was trained from the beginning.
    """

    path: Path
    config: dict[str, Any]
    info: dict[str, Any]
    rows: tuple[Row, ...]
    step: int | None
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """The name the run's numbers go by."""
        return self.config["name"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def training_length(self) -> int:
        """Tokens of a training sequence."""
        return self.config["train"]["length"]

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind, in the order of the file."""
        return [row for row in self.rows if row["kind"] == kind]


# ---------------------------------------------------------------------------- reading


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Reads runs; raises ReportError for the first that is not one."""
    runs = [read_run(as_path(path)) for path in paths]
    if not runs:
        raise ReportError("no runs to report on; name one or more run directories")
    return runs


def read_run(path: Path) -> Run:
    """Reads one run: its directory, or the file that `report.results` keeps of it."""
    if path.is_file():
        from fope_jax.report.results import read_results

        return read_results(path)
    config = _read_json(path / "config.json", required=True)
    _check_config(config, path / "config.json")
    rows = read_rows(path / "metrics.jsonl")
    evaluated = [
        row["step"]
        for row in rows
        if row["kind"] in ("perplexity", "position", "passkey", "retrieval")
    ]
    step = max(evaluated, default=None)
    kept = ("train", "time", "validation", "spectrum")
    current = [row for row in rows if row["kind"] in kept or row["step"] == step]
    info, lineage = (_read_json(path / n, required=False) for n in ("run.json", "lineage.json"))
    return Run(path, config, info, tuple(current), step, lineage)


def _check_config(config: dict[str, Any], path: Path) -> None:
    train = config.get("train")
    needed = {"name": config.get("name"), "seed": config.get("seed")}
    needed["train.length"] = train.get("length") if isinstance(train, dict) else None
    for key, kind in {"name": str, "seed": int, "train.length": int}.items():
        value = needed[key]
        if value is None:
            raise ReportError(f"{path} has no {key!r}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ReportError(f"{path}: {key} = {value!r:.60}; accepted: {kind.__name__}")


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ReportError(f"{path.parent} is no run: there is no {path.name}")
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise ReportError(str(error)) from error


def read_rows(path: Path) -> list[Row]:
    """Reads and checks the rows of a metrics.jsonl.

    A last line without an end was cut off when its writer was killed and is left out. Kinds that
    this report does not know are left to others.

    Raises:
      ReportError: no such file, or a row that is malformed, with file and line.
    """
    if not path.is_file():
        raise ReportError(f"{path.parent} has no {path.name}: the run has not been trained yet")
    rows = []
    try:
        for number, row in json_lines(path):
            check_row(row, f"{path}, line {number}")
            if row["kind"] in FIELDS:
                rows.append(row)
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(str(error)) from error
    return rows


def check_row(row: Any, where: str) -> None:
    """Raises ReportError, with ``where``, for a row that has not what its kind must have."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ReportError(f'{where}: a row is an object with a string "kind"; got {row!r:.60}')
    kind = row["kind"]
    optional = {name: t for name, t in OPTIONAL.get(kind, {}).items() if name in row}
    for name, accepted in (FIELDS.get(kind, {}) | optional).items():
        if name not in row:
            raise ReportError(f"{where}: a {kind!r} row has no {name!r}")
        value = row[name]
        if not isinstance(value, accepted) or isinstance(value, bool):
            names = accepted if isinstance(accepted, tuple) else (accepted,)
            expected = " or ".join(t.__name__ for t in names)
            raise ReportError(
                f"{where}: {name!r} of a {kind!r} row is {value!r}; accepted: {expected}"
            )
    for name in ("tokens", "total", "context"):
        if name in FIELDS.get(kind, {}) and row[name] <= 0:
            raise ReportError(
                f"{where}: {name!r} of a {kind!r} row is {row[name]!r}; accepted: > 0"
            )


# ---------------------------------------------------------------------------- numbers


class Sums(NamedTuple):
    """Sums over rows; ratios are properties and never clipped."""

    nats: float = 0.0
    tokens: float = 0
    bytes: float = 0
    correct: float = 0
    total: float = 0
    found: float = 0
    asked: float = 0
    rank_sum: float = 0

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(nats / tokens)``; infinite where that is beyond a float.

        >>> round(Sums(nats=20.794415, tokens=10).perplexity, 3)
        8.0
        """
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits a UTF-8 byte of the text; NaN where no byte was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def accuracy(self) -> float:
        """Share of trials that were right."""
        return self.correct / self.total

    @property
    def mean_rank(self) -> float:
        """Rank of the right answer among the candidates; NaN where none was taken."""
        return self.rank_sum / self.total if self.rank_sum else math.nan

    @property
    def token_accuracy(self) -> float:
        """Share of tokens that the model holds most likely."""
        return self.correct / self.tokens


def add_up(rows: Iterable[Row]) -> Sums:
    """Pools rows: sums of every field of ``Sums`` that they have."""
    rows = list(rows)
    return Sums(*(sum(row.get(name, 0) for row in rows) for name in Sums._fields))


def group(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """Rows by key, keys in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(sorted(groups.items()))


class Spread(NamedTuple):
    """A number over seeds: mean, sample standard deviation (NaN of one seed) and count."""

    mean: float
    deviation: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951, count=2)
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, math.nan, len(values))
    squares = sum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(squares / (len(values) - 1)), len(values))


# ---------------------------------------------------------------------------- comparable runs


def labels(runs: Sequence[Run]) -> dict[Path, str]:
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


def by_context(row: Row) -> int:
    """Tokens of the row's window."""
    return row["context"]


def over_seeds(seeds: Sequence[dict[Any, float]]) -> dict[Any, Spread]:
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


def numbers_of(
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
        self, number: Callable[[Sums], float], by: Callable[[Row], Any] = by_context
    ) -> dict[str, dict[Any, Spread]]:
        """``{label: {value of by: Spread over seeds}}``."""
        return {label: over_seeds(seeds) for label, seeds in self.per_seed(number, by).items()}

    def intervals(
        self, number: Callable[[Sums], float], by: Callable[[Row], Any] = by_context
    ) -> dict[str, dict[Any, Interval]]:
        """``{label: {value of by: interval, over documents, of the mean over seeds}}``.

        Without an interval is what fewer than two documents have tokens for.
        """

        def means(pooled: dict[Any, list[list[float]]]) -> dict[Any, float]:
            return {k: sum(own) / len(own) for k, own in numbers_of(pooled, number).items()}

        return {
            label: intervals(document_sums(seeds, by), means)
            for label, seeds in self.curves.items()
        }

    def ratio_intervals(self, number: Callable[[Sums], float]) -> dict[str, dict[int, Interval]]:
        """The intervals of ``ratios``: both numbers of a ratio are of the same documents."""

        def means_from(base: int) -> Callable[[dict[int, list[list[float]]]], dict[int, float]]:
            def means(pooled: dict[int, list[list[float]]]) -> dict[int, float]:
                numbers = numbers_of(pooled, number)
                return {
                    key: sum(x / y for x, y in zip(own, numbers[base], strict=True)) / len(own)
                    for key, own in numbers.items()
                    if base in numbers
                }

            return means

        return {
            label: intervals(
                document_sums(seeds, by_context), means_from(self.training_lengths[label])
            )
            for label, seeds in self.curves.items()
        }

    def ratios(self, number: Callable[[Sums], float]) -> dict[str, dict[int, Spread]]:
        """Like ``numbers``, relative to the same seed's number at its training length.

        Empty for a label that was not scored there.
        """
        table = {}
        for label, seeds in self.per_seed(number, by_context).items():
            base = self.training_lengths[label]
            table[label] = over_seeds(
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


def what_was_scored(kind: str, rows: Sequence[Row]) -> tuple[Hashable, ...]:
    """A key that the rows of comparable runs share.

    Perplexities compare where the same tokens were scored: protocol, split, tokens and bytes, at
    each context by itself where the protocol scores other tokens at each.
    Losses by position compare where the same windows were read, and retrieval where template or
    task, number of trials and number of answer tokens agree.

    Raises:
      ReportError: the rows are of several protocols, splits or templates, or a run whose contexts
        should have been scored on the same tokens was not.
    """
    part = PARTS.get(kind, "split")
    names = {(row.get("protocol"), row[part]) for row in rows}
    if len(names) > 1:
        raise ReportError(f"{kind} rows of {sorted(names, key=str)} do not belong in one plot")
    first = rows[0]
    if kind in PARTS:
        cells = group(rows, lambda row: (row["context"], row["depth"]))
        largest = max((add_up(own) for own in cells.values()), key=lambda sums: sums.total)
        return (first["kind"], first[part], largest.total, largest.tokens)
    scored = {context: add_up(own) for context, own in group(rows, by_context).items()}
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
    names, found = labels(runs), {}
    part = PARTS.get(kind, "split")
    for run in runs:
        groups = group(run.of(kind), lambda row: (row.get("protocol") or kind, row[part]))
        for (protocol, name), rows in groups.items():
            key = what_was_scored(kind, rows)
            stated = [
                row for row in run.of("protocol")
                if row["protocol"] == protocol and row.get(part) == name
            ]  # fmt: skip
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
            keys.setdefault(what_was_scored(comparison.kind, rows), label)
    if len(keys) > 1:
        (one, first), (other, second), *_ = keys.items()
        raise ReportError(
            f"{comparison.kind} rows of {first!r} and {second!r} were scored on different things, "
            f"{one} and {other}, and do not belong in one plot"
        )
