"""A run's results as one file that can be kept beside a finding: who it was, and its rows.

The first line says what was run (configuration, commit, versions, lineage); the others are rows of
its metrics.jsonl. `fope report` takes such a file in place of the run's directory. Host names and
paths of the machine are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fope_jax.report.rows import ReportError, Row, Run, check_row
from fope_jax.storage.files import write_text
from fope_jax.storage.paths import resolve_path

KIND = "run"
FACTS = (
    "name",
    "seed",
    "parameters",
    "position",
    "data",
    "started",
    "commit",
    "versions",
    "machine",
    "cpus",
    "devices",
)
DOCUMENTS_KEPT = 20  # with more of them, a split's rows are added up over documents
_SUMS = ("windows", "nats", "tokens", "bytes", "correct")


def write_results(run: Run, path: Path) -> None:
    """Writes ``path``, replacing it.

    Args:
      run: with its rows; those of time are left out.
      path: ``DIR/NAME.jsonl``; its parent run is expected as another file in DIR.
    """
    lineage = json.loads(json.dumps(run.lineage))
    for part, key in (("parent", "run"), ("request", "parent")):
        if key in lineage.get(part, {}):
            lineage[part][key] = PurePosixPath(lineage[part][key]).name
    facts = {key: run.info[key] for key in FACTS if key in run.info}
    head = {"kind": KIND, "config": run.config, "info": facts, "lineage": lineage}
    rows = [row for row in run.rows if row["kind"] != "time"]
    lines = [json.dumps(row) for row in [head, *add_up_documents(rows)]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def add_up_documents(rows: Sequence[Row]) -> list[Row]:
    """``rows`` with one row in place of those that differ in their document alone, where many do.

    Sums are added; the row has ``document`` None and ``documents``, their number. With at most
    ``DOCUMENTS_KEPT`` of them rows stay as they are.
    """
    parts: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        parts.setdefault(_without_sums(row), []).append(index)
    kept: dict[int, Row] = {}
    for members in parts.values():
        first = rows[members[0]]
        if len(members) <= DOCUMENTS_KEPT or "document" not in first:
            kept |= {index: rows[index] for index in members}
            continue
        sums = {key: sum(rows[i][key] for i in members) for key in _SUMS if key in first}
        kept[members[0]] = first | sums | {"document": None, "documents": len(members)}
    return [kept[index] for index in sorted(kept)]


def _without_sums(row: Row) -> str:
    left = {key: value for key, value in row.items() if key not in (*_SUMS, "document")}
    return json.dumps(left, sort_keys=True)


def read_results(path: Path) -> Run:
    """The run that `write_results` wrote.

    Raises:
      ReportError: the file has no such first line, or a malformed row, with its number.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{path}, line {number}: no JSON ({line[:60]!r})") from error
        check_row(row, f"{path}, line {number}")
        rows.append(row)
    if not rows or rows[0]["kind"] != KIND:
        raise ReportError(
            f"{path} is no file of results: its first line has no kind {KIND!r}; "
            "`fope sweep --results` writes such files"
        )
    head, rows = rows[0], rows[1:]
    lineage = head["lineage"]
    if lineage:
        parent = path.with_name(f"{lineage['parent']['run']}.jsonl")
        lineage["parent"]["run"] = str(resolve_path(parent))
    steps = [row["step"] for row in rows if row["kind"] != "train"]
    return Run(path, head["config"], head["info"], tuple(rows), max(steps, default=None), lineage)
