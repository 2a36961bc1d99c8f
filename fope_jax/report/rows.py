"""Rows of finished runs: read and checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fope_jax.storage.files import read_json, read_json_lines
from fope_jax.storage.paths import as_path

Row = dict[str, Any]

_NUMBER = (int, float)
_IDS = {"variant": str, "seed": int, "step": int, "training_length": int}
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


# What a row may have: those of runs that were evaluated before it was measured do not, and those of
# windows that begin with no BOS token name none.
_BOS = {"bos_token": str}
OPTIONAL: dict[str, dict[str, Any]] = dict.fromkeys(FIELDS, _BOS) | {"passkey": _ANSWERS | _BOS}


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
        for number, row in read_json_lines(path):
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
