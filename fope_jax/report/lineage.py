"""Lineage: runs that continue other runs, and what changed between them (lineage.json).

Seeds of a variant share what was changed; it is said once, and per seed only where it differs.
"""

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
    """What changed between each variant and its parent; no rows where no run has one."""
    title = "What was changed before a run went on from another"
    table = Table(title, "variant", ["goes on from", "fact", "value"], is_prose=True)
    labels = run_labels(runs)
    for label in dict.fromkeys(labels.values()):
        children = [run for run in runs if run.lineage and labels[run.path] == label]
        facts = [(run.seed, lineage_facts(run, runs)) for run in children]
        origins = ((run.seed, {"from": _origin(run, runs)}) for run in children)
        header, origin = label, _once_or_by_seed(list(origins), "from")
        for fact in facts[0][1] if facts else ():
            if value := _once_or_by_seed(facts, fact):
                table.rows.append((header, [origin, fact, value]))
                header = origin = ""
    return table


def lineage_facts(run: Run, runs: Sequence[Run]) -> dict[str, str]:
    """What changed between the run and its parent; "" where there is nothing to say."""
    before, after, start = (run.lineage[key] for key in ("parent", "child", "start"))
    frequencies = run.lineage["frequencies"]
    facts = {
        "training length": f"{before['length']:,} tokens, then {after['length']:,}",
        "frequencies": frequencies["text"] if frequencies else EMPTY,
        "position arrays": run.lineage["arrays"] or EMPTY,
        "position before": before["position"]["summary"],
        "position after": after["position"]["summary"],
    }
    parent = {"parent": "" if parent_of(run, runs) else f"{before['run']}, not in this report"}
    if start is None:
        length = f"{before['length']:,} tokens; changed for {after['length']:,} without training"
        return facts | {"training length": length} | parent
    longer = start["parent_at_new_length"]
    return {
        "warning": start["warning"] or "",
        **facts,
        "loss before the first update (nats/token)": (
            f"{format_loss(start['parent'])} as the parent at {before['length']:,} tokens; "
            f"{EMPTY if longer is None else format_loss(longer)} as the parent at "
            f"{after['length']:,}; {format_loss(start['child'])} as changed at "
            f"{after['length']:,}, {start['ratio']:.2f} times the first"
        ),
        "optimizer": run.lineage["request"]["optimizer"],
        "data": run.lineage["data"]["text"],
        **parent,
    }


def _origin(run: Run, runs: Sequence[Run]) -> str:
    parent, before = parent_of(run, runs), run.lineage["parent"]
    name = run_labels(runs)[parent.path] if parent else before["name"]
    return f"{name}, step {before['step']:,}"


def _once_or_by_seed(facts: Sequence[tuple[int, dict[str, str]]], fact: str) -> str:
    """The fact where all seeds agree in it, else a line a seed."""
    values = {f"seed {seed}: {own[fact]}": own[fact] for seed, own in facts}
    agreed = set(values.values())
    return agreed.pop() if len(agreed) == 1 else "\n".join(values)


def lineage_sentences(runs: Sequence[Run]) -> list[str]:
    """One sentence for each variant that goes on from another."""
    labels, sentences = run_labels(runs), []
    for run in runs:
        if variant := run.info.get("as"):
            changes = f": {variant['frequencies']}." if variant["frequencies"] else "."
            sentences.append(
                f"{labels[run.path]} is {variant['run']}, step {variant['step']:,}, read so "
                f"without training{changes}"
            )
        for added in run.info.get("continued", ()):
            sentences.append(
                f"{labels[run.path]} was trained for {added['from']:,} steps, then longer, to "
                f"{added['to']:,}: {added['learning_rate']}."
            )
        if run.lineage:
            before = run.lineage["parent"]
            shown = "" if parent_of(run, runs) else " (not shown)"
            frequencies = (run.lineage["frequencies"] or {}).get("text", "")
            changes = "; ".join(filter(None, [frequencies, run.lineage["arrays"]]))
            origin = f"{_origin(run, runs)}{shown}"
            if run.lineage["start"]:
                how = f"goes on from {origin}, at"
            else:
                how = f"is {origin}, without training, with positions for"
            sentences.append(
                f"{labels[run.path]} {how} "
                f"{run.lineage['child']['length']:,} tokens in place of {before['length']:,}"
                + (f": {changes}." if changes else ".")
            )
    return list(dict.fromkeys(sentences))
