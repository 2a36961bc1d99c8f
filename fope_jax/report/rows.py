"""Reads and checks the rows of finished runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fope_jax.storage.files import read_json_lines, read_json_or_empty
from fope_jax.storage.paths import as_path, resolve_path
from fope_jax.storage.run_paths import describe_weights, is_of_weights, split_step

Row = dict[str, Any]

NO_BOS = "no BOS token is added"  # for older rows that do not state it
RESULTS_KIND = "run"  # kind of the first row of a results file

_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))
_IDS = {"variant": str, "seed": int, "step": int, "training_length": int}
_SUMS = {"nats": _NUMBER, "tokens": _NUMBER, "bytes": _NUMBER, "correct": _NUMBER}
_SPLIT = {"split": str, "context": int}
_TRIALS = {"correct": int, "total": int, "nats": _NUMBER, "tokens": int}
_ANSWERS = dict.fromkeys(("found", "asked", "first", "rank_sum", "candidates"), int)

# Required fields of each kind; rows of other kinds are ignored.
REQUIRED: dict[str, dict[str, Any]] = {
    "train": {"step": int, "tokens_seen": int, "loss": _NUMBER_OR_NONE},
    "perplexity": {
        **_IDS,
        **_SUMS,
        **_SPLIT,
        "protocol": str,
        "scored_per_window": int,
        "windows": int,
        "document": (str, type(None)),
    },
    "validation": {**_IDS, **_SUMS, **_SPLIT, "scored_per_window": int, "tokens_seen": int},
    "position": {**_IDS, **_SUMS, **_SPLIT, "protocol": str, "bucket": list},
    "passkey": {**_IDS, **_TRIALS, "template": str, "context": int, "depth": _NUMBER},
    "retrieval": {
        **_IDS,
        **_TRIALS,
        **_ANSWERS,
        "task": str,
        "context": int,
        "depth": _NUMBER_OR_NONE,
    },
    "spectrum": {
        **_IDS,
        **_SPLIT,
        "layer": int,
        "floor_energy": list,
        "profile_energy": list,
        **dict.fromkeys(("leakage", "undertrained_energy"), (list, type(None))),
        **dict.fromkeys(("q_leakage", "k_leakage", "hidden_leakage"), _NUMBER_OR_NONE),
    },
    "task": {**_IDS, "protocol": str, "task": str, "total": int, "truncated": int, "scores": dict},
    "protocol": {**_IDS, "protocol": str, "settings": dict},
    "time": {"phase": str, "seconds": _NUMBER},
    RESULTS_KIND: {"config": dict, "info": dict, "lineage": dict},
}
# Optional fields: older evaluations lack them, and so do windows without a BOS token and runs
# that were not trained at random positions.
_SOME = {"bos_token": str, "position_range": int, "position_draw": str, "positions": str, "as": str}
_ADDED_UP = {"documents": int, "documents_digest": str, **_SOME}
OPTIONAL: dict[str, dict[str, Any]] = dict.fromkeys(REQUIRED, _SOME) | {
    "perplexity": _ADDED_UP,
    "position": _ADDED_UP,
    "passkey": _ANSWERS | _SOME,
    "retrieval": {"windows": int} | _SOME,
    "task": {"words": list, "multiples": list, "tokens": int, **_SOME},
}


_EVALUATIONS = ("perplexity", "position", "passkey", "retrieval", "task")
_OF_ALL_STEPS = ("train", "time", "validation", "spectrum")


class ReportError(ValueError):
    """Rows that cannot be read or compared; the message names file and line, or the runs."""


@dataclass(frozen=True)
class Run:
    """One run directory or results file.

    ``info`` is run.json and ``lineage`` lineage.json; each is empty where missing. ``rows`` hold
    the evaluation of ``step`` alone, the newest evaluated step.
    """

    path: Path
    config: dict[str, Any]
    info: dict[str, Any]
    rows: tuple[Row, ...]
    step: int | None
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return self.config["name"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def training_length(self) -> int:
        """Tokens of a training sequence."""
        return self.config["train"]["length"]

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys.

    >>> flatten({"train": {"steps": 3}, "seed": 0})
    {'train.steps': 3, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


# ---------------------------------------------------------------------------- reading


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs of these paths, each with its variants (`read_with_variants`)."""
    runs: dict[Path, Run] = {}
    for run in (run for path in paths for run in read_with_variants(as_path(path))):
        other = runs.setdefault(resolve_path(run.path), run)
        if other.step != run.step:
            raise ReportError(
                f"{run.path} is named twice, at steps {other.step} and {run.step}: the mean of the "
                "two would look like one over seeds; report on one step at a time"
            )
    if not runs:
        raise ReportError("no runs to report on; name one or more run directories")
    return list(runs.values())


def read_with_variants(path: Path, step: int | None = None) -> list[Run]:
    """`read_run`, and after it the run under other position embeddings (`fope evaluate --as`).

    A variant is a run by its name, "RUN as METHOD", with its own rows and position embedding and
    what its run has otherwise; ``info["as"]`` says of which run and step it is.
    """
    run, rows = _read(path, step)
    if run.path.is_file():
        return [run]
    labels = dict.fromkeys(row["as"] for row in rows if "as" in row)
    variants = ([row for row in rows if row.get("as") == label] for label in labels)
    return [run, *(_variant(run, rows) for rows in variants)]


def _variant(run: Run, rows: list[Row]) -> Run:
    name = rows[0]["variant"]
    summary = next((row for row in rows if row["kind"] == "protocol"), {})
    position = summary.get("settings", {}).get("position", run.config.get("position"))
    step = _newest_steps(rows).get(rows[0]["as"], run.step)
    origin = {"run": run.variant, "step": step, "frequencies": summary.get("frequencies", "")}
    info = {key: value for key, value in run.info.items() if key != "continued"} | {"as": origin}
    if "position" in summary:
        info["position"] = summary["position"]
    path = run.path.with_name(f"{run.path.name} as {rows[0]['as']}")  # of no file: a name in lists
    config = run.config | {"name": name, "position": position}
    return Run(path, config, info, tuple(rows), step)


def read_run(path: Path, step: int | None = None) -> Run:
    """Reads a run directory, or a results file (`report.results`).

    Of evaluations it takes those of ``step``; without one those of the step that ``path`` names,
    as ``runs/a/500``, else those of the newest evaluated step. Rows of variants are left out.
    """
    return _read(path, step)[0]


def _read(path: Path, step: int | None) -> tuple[Run, list[Row]]:
    """A run without the rows of its variants, and all rows of the evaluated step."""
    if path.is_file():
        run = _read_results(path)
        return run, list(run.rows)
    path, named_step = split_step(path)
    if not (path / "config.json").is_file():
        what = "there is no config.json" if path.exists() else "there is no such directory"
        raise ReportError(f"{path} is no run: {what}")
    config = _read_json(path / "config.json")
    if is_of_weights(config):
        raise ReportError(describe_weights(path))
    _check_config(config, path / "config.json")
    rows = read_rows(path / "metrics.jsonl")
    steps = {row["step"] for row in rows if row["kind"] in _EVALUATIONS}
    if named_step is not None and named_step not in steps:
        raise ReportError(
            f"{path}: step {named_step} has not been evaluated; evaluated: "
            f"{', '.join(map(str, sorted(steps))) or 'none'}. `fope evaluate {path}/{named_step}`"
        )
    wanted, newest = named_step if step is None else step, _newest_steps(rows)
    rows = [
        row
        for row in rows
        if row["kind"] in _OF_ALL_STEPS
        or row["step"] == (newest.get(row.get("as", "")) if wanted is None else wanted)
    ]
    step = newest.get("") if wanted is None else wanted
    info, lineage = (_read_json(path / name) for name in ("run.json", "lineage.json"))
    own = tuple(row for row in rows if "as" not in row)
    return Run(path, config, info, own, step, lineage), rows


def _read_results(path: Path) -> Run:
    head, *rows = read_rows(path) or [{"kind": "nothing"}]
    if head["kind"] != RESULTS_KIND:
        raise ReportError(
            f"{path} is no results file: its first line has no kind {RESULTS_KIND!r}; "
            "`fope sweep --results` writes such files"
        )
    if not path.read_bytes().endswith(b"\n"):
        raise ReportError(f"{path}: the last line was cut off; bring the file back")
    lineage = head["lineage"]
    if lineage:  # the parent's results are expected in the same directory
        parent = path.with_name(results_file(lineage["parent"]["run"]))
        lineage["parent"]["run"] = str(resolve_path(parent))
    if any(row["kind"] == RESULTS_KIND for row in rows):
        raise ReportError(f"{path} holds the results of more than one run; keep each in its file")
    _check_config(head["config"], path)
    step = max(_newest_steps(rows).values(), default=None)
    return Run(path, head["config"], head["info"], tuple(rows), step, lineage)


def results_file(run: str) -> str:
    """The file of a run's rows, by the name of its directory.

    >>> results_file("rope_0"), results_file("rope_0 as yarn:factor=2")
    ('rope_0.jsonl', 'rope_0_as_yarn_factor_2.jsonl')
    """
    return re.sub(r"[^\w.+-]+", "_", run) + ".jsonl"


def _newest_steps(rows: Iterable[Row]) -> dict[str, int]:
    """The newest evaluated step of the run, "", and of each position embedding it was read with."""
    newest: dict[str, int] = {}
    for row in rows:
        if row["kind"] in _EVALUATIONS:
            label = row.get("as", "")
            newest[label] = max(newest.get(label, 0), row["step"])
    return newest


def _check_config(config: dict[str, Any], path: Path) -> None:
    train = config.get("train")
    values = {"name": config.get("name"), "seed": config.get("seed")}
    values["train.length"] = train.get("length") if isinstance(train, dict) else None
    for key, kind in {"name": str, "seed": int, "train.length": int}.items():
        value = values[key]
        if value is None:
            raise ReportError(f"{path} has no {key!r}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ReportError(f"{path}: {key} = {value!r:.60}; accepted: {kind.__name__}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_or_empty(path)
    except ValueError as error:
        raise ReportError(str(error)) from error


def read_rows(path: Path) -> list[Row]:
    """Reads a metrics.jsonl, without unknown kinds and without a last line that was cut off.

    Raises:
      ReportError: no such file, or a malformed row; names file and line.
    """
    if not path.is_file():
        raise ReportError(
            f"{path.parent} has no {path.name}: the run is neither trained nor evaluated; once "
            f"it has weights, `fope evaluate {path.parent}`"
        )
    rows = []
    try:
        for number, row in read_json_lines(path):
            check_row(row, f"{path}, line {number}")
            if row["kind"] in REQUIRED:
                rows.append(row)
    except ReportError:
        raise
    except ValueError as error:  # a line is no JSON object
        raise ReportError(str(error)) from error
    return rows


def check_row(row: Row, where: str) -> None:
    """Raises ReportError, with ``where``, for a row without the fields of its kind."""
    kind = row.get("kind")
    if not isinstance(kind, str):
        raise ReportError(f'{where}: a row is an object with a string "kind"; got {row!r:.60}')
    required = REQUIRED.get(kind, {})
    optional = {name: types for name, types in OPTIONAL.get(kind, {}).items() if name in row}
    for name, types in (required | optional).items():
        if name not in row:
            raise ReportError(f"{where}: a {kind!r} row has no {name!r}")
        value, accepted = row[name], types if isinstance(types, tuple) else (types,)
        if not isinstance(value, accepted) or isinstance(value, bool):
            expected = " or ".join(t.__name__ for t in accepted)
            raise ReportError(
                f"{where}: {name!r} of a {kind!r} row is {value!r}; accepted: {expected}"
            )
        if name in ("tokens", "total", "context") and name in required and value <= 0:
            raise ReportError(f"{where}: {name!r} of a {kind!r} row is {value!r}; accepted: > 0")
