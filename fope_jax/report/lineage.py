"""Runs that go on from other runs: what was changed between them, from their lineage.json."""

from __future__ import annotations

from collections.abc import Sequence

from fope_jax.report.comparison import run_labels
from fope_jax.report.rows import Run
from fope_jax.report.tables import EMPTY, Table, three
from fope_jax.storage.paths import resolve_path


def parent_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run among ``runs`` that ``run`` goes on from."""
    source = run.lineage["parent"]["run"] if run.lineage else None
    return next((other for other in runs if str(resolve_path(other.path)) == source), None)


def tokens_before(run: Run) -> int:
    """Tokens that the model had seen before the run: those of its parent."""
    return run.lineage["parent"]["tokens_seen"] if run.lineage else 0


def lineage_table(runs: Sequence[Run]) -> Table:
    """One row for each run that goes on from another; no rows where none does."""
    columns = ["goes on from", "fact", "value"]
    table = Table("What was changed before a run went on from another", "variant", columns)
    names = run_labels(runs)
    for run in runs:
        if run.lineage:
            name, whole = names[run.path], run.lineage
            parent = parent_of(run, runs)
            told = names[parent.path] if parent else whole["parent"]["name"]
            origin = f"{told}, step {whole['parent']['step']:,}"
            for index, (fact, value) in enumerate(_facts(run, parent)):
                table.rows.append((name if not index else "", [origin, fact, value]))
                origin = ""
    return table


def _facts(run: Run, parent: Run | None) -> list[tuple[str, str]]:
    whole, start = run.lineage, run.lineage["start"]
    lengths = whole["parent"]["length"], whole["child"]["length"]
    longer = start["parent_at_new_length"]
    facts = [
        ("training length", f"{lengths[0]:,} tokens, then {lengths[1]:,}"),
        ("frequencies", whole["frequencies"]["text"] if whole["frequencies"] else EMPTY),
        ("position arrays", whole["arrays"] or EMPTY),
        ("position before", f"{whole['parent']['position']['summary']}"),
        ("position after", whole["child"]["position"]["summary"]),
        (
            "loss before the first update (nats/token)",
            f"{three(start['parent'])} as the parent at {lengths[0]:,} tokens; "
            f"{EMPTY if longer is None else three(longer)} as the parent at {lengths[1]:,}; "
            f"{three(start['child'])} as changed at {lengths[1]:,}, "
            f"{start['ratio']:.2f} times the first",
        ),
        ("optimizer", whole["request"]["optimizer"]),
        ("data", whole["data"]["text"]),
    ]
    if start["warning"]:
        facts.insert(0, ("warning", start["warning"]))
    if parent is None:
        facts.append(("parent", f"{whole['parent']['run']}, not in this report"))
    return facts


def lineage_sentences(runs: Sequence[Run]) -> list[str]:
    """One sentence for each run that goes on from another."""
    names, lines = run_labels(runs), []
    for run in runs:
        if run.lineage:
            parent, whole = parent_of(run, runs), run.lineage
            told = names[parent.path] if parent else f"{whole['parent']['run']} (not shown)"
            frequencies = whole["frequencies"]["text"] if whole["frequencies"] else ""
            changed = "; ".join(filter(None, [frequencies, whole["arrays"]]))
            lines.append(
                f"{names[run.path]} goes on from {told}, step {whole['parent']['step']:,}, at "
                f"{whole['child']['length']:,} tokens in place of {whole['parent']['length']:,}"
                + (f": {changed}." if changed else ".")
            )
    return lines
