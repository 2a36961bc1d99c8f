"""A run's results as one file to keep with a finding.

The first line holds configuration, commit, versions and lineage; the others are rows of its
metrics.jsonl. `fope report` reads it like a run directory. Host names and paths are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fope_jax.report.rows import RESULTS_KIND, Row, Run
from fope_jax.storage.files import write_text

_IDENTITY = ("name", "seed", "parameters", "position", "data", "started", "commit", "versions")
FACTS = (*_IDENTITY, "as", "machine", "cpus", "devices")  # kept of run.json
DOCUMENTS_KEPT = 20  # with more, rows are summed over documents
DIGEST = "documents_digest"  # of summed rows: which documents they are of
SUMS = ("windows", "nats", "tokens", "bytes", "correct")


def write_results(run: Run, path: Path) -> None:
    """Writes ``DIR/NAME.jsonl`` without rows of kind "time"; expects the parent's file in DIR."""
    lineage = json.loads(json.dumps(run.lineage))
    for section, key in (("parent", "run"), ("request", "parent")):
        if key in lineage.get(section, {}):
            lineage[section][key] = PurePosixPath(lineage[section][key]).name
    facts = {key: run.info[key] for key in FACTS if key in run.info}
    head = {"kind": RESULTS_KIND, "config": run.config, "info": facts, "lineage": lineage}
    rows = [row for row in run.rows if row["kind"] != "time"]
    lines = [json.dumps(row) for row in [head, *add_up_documents(rows)]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def add_up_documents(rows: Sequence[Row]) -> list[Row]:
    """Sums rows that differ only in ``document``, where more than ``DOCUMENTS_KEPT`` do.

    The sum has ``document`` None, the number of ``documents``, and as ``documents_digest`` that of
    all rows of its protocol.
    """
    same: dict[str, list[int]] = {}  # indices of rows equal but for sums and document
    measured: dict[str, list[Row]] = {}  # rows of one protocol and split
    for index, row in enumerate(rows):
        rest = {key: value for key, value in row.items() if key not in (*SUMS, "document")}
        same.setdefault(json.dumps(rest, sort_keys=True), []).append(index)
        measured.setdefault(_measurement(row), []).append(row)
    digests: dict[str, str] = {}
    kept: dict[int, Row] = {}
    for indices in same.values():
        first = rows[indices[0]]
        if len(indices) <= DOCUMENTS_KEPT or "document" not in first:
            kept |= {index: rows[index] for index in indices}
            continue
        what = _measurement(first)
        if what not in digests:
            digests[what] = documents_digest(measured[what])
        sums = {key: sum(rows[i][key] for i in indices) for key in SUMS if key in first}
        new = {"document": None, "documents": len(indices), DIGEST: digests[what]}
        kept[indices[0]] = first | sums | new
    return [kept[index] for index in sorted(kept)]


def _measurement(row: Row) -> str:
    """What the rows of one evaluation by one protocol share."""
    names = ("kind", "protocol", "split", "variant", "seed", "step", "bos_token")
    return json.dumps([row.get(name) for name in names])


def documents_digest(rows: Sequence[Row]) -> str:
    """A digest of the names of the scored documents, and of the tokens and bytes of each.

    They are those of the longest context, since runs may differ in the shorter ones. A file counts
    by its last name, since it may lie in another directory.
    """
    longest, counts = max(row["context"] for row in rows), {}
    for row in rows:
        if row["context"] == longest:
            tokens, size = counts.get(row["document"], (0, 0))
            counts[row["document"]] = tokens + int(row["tokens"]), size + int(row["bytes"])
    documents = sorted((str(name).rpartition("/")[2], *counts[name]) for name in counts)
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]
