"""Lineage: runs that continue other runs, and what changed between them (lineage.json)."""

from __future__ import annotations

from collections.abc import Sequence

from fope_jax.report.comparison import run_labels
from fope_jax.report.rows import Run
from fope_jax.report.tables import EMPTY, Table, format_loss
from fope_jax.storage.paths import resolve_path


def parent_of(run: Run, runs: Sequence[Run]) -> Run | None:
    source = run.lineage["parent"]["run"] if run.lineage else None
    return next((other for other in runs if str(resolve_path(other.path)) == source), None)


def tokens_before(run: Run) -> int:
    """Tokens that the parent had seen; 0 without a parent."""
    return run.lineage["parent"]["tokens_seen"] if run.lineage else 0


def lineage_table(runs: Sequence[Run]) -> Table:
    """What changed between each run and its parent; no rows where no run has one."""
    title = "What was changed before a run went on from another"
    table = Table(title, "variant", ["goes on from", "fact", "value"], is_prose=True)
    labels = run_labels(runs)
    for run in runs:
        if not run.lineage:
            continue
        before, after, start = (run.lineage[key] for key in ("parent", "child", "start"))
        parent, longer = parent_of(run, runs), start["parent_at_new_length"]
        frequencies = run.lineage["frequencies"]
        facts = {
            "warning": start["warning"],
            "training length": f"{before['length']:,} tokens, then {after['length']:,}",
            "frequencies": frequencies["text"] if frequencies else EMPTY,
            "position arrays": run.lineage["arrays"] or EMPTY,
            "position before": before["position"]["summary"],
            "position after": after["position"]["summary"],
            "loss before the first update (nats/token)": (
                f"{format_loss(start['parent'])} as the parent at {before['length']:,} tokens; "
                f"{EMPTY if longer is None else format_loss(longer)} as the parent at "
                f"{after['length']:,}; {format_loss(start['child'])} as changed at "
                f"{after['length']:,}, {start['ratio']:.2f} times the first"
            ),
            "optimizer": run.lineage["request"]["optimizer"],
            "data": run.lineage["data"]["text"],
            "parent": None if parent else f"{before['run']}, not in this report",
        }
        name = labels[parent.path] if parent else before["name"]
        header, origin = labels[run.path], f"{name}, step {before['step']:,}"
        for fact, value in facts.items():
            if value:
                table.rows.append((header, [origin, fact, value]))
                header = origin = ""
    return table


def lineage_sentences(runs: Sequence[Run]) -> list[str]:
    labels, sentences = run_labels(runs), []
    for run in runs:
        for added in run.info.get("continued", ()):
            sentences.append(
                f"{labels[run.path]} was trained for {added['from']:,} steps, then longer, to "
                f"{added['to']:,}: {added['learning_rate']}."
            )
        if run.lineage:
            parent, before = parent_of(run, runs), run.lineage["parent"]
            name = labels[parent.path] if parent else f"{before['run']} (not shown)"
            frequencies = (run.lineage["frequencies"] or {}).get("text", "")
            changes = "; ".join(filter(None, [frequencies, run.lineage["arrays"]]))
            sentences.append(
                f"{labels[run.path]} goes on from {name}, step {before['step']:,}, at "
                f"{run.lineage['child']['length']:,} tokens in place of {before['length']:,}"
                + (f": {changes}." if changes else ".")
            )
    return sentences
