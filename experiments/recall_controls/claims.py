"""Where the numbers of README.md come from; `python -m experiments.check recall_controls`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, accuracy, ends, mean, minus, select, starred

ROWS = "recall_controls/results/*.jsonl"
LENGTH = 64
BEYOND = (128, 256, 512, 1024)
VARIANTS = {
    "FoPE": "fope",
    "FoPE, zero phase 0": "fope-zero-phase",
    "floor alone": "floor",
    "series alone": "series",
    "RoPE": "rope",
}


def right(name: str, *contexts: int, task: str = "recall") -> BySeed:
    """Percent of trials that are right, over all ``contexts`` together."""
    return accuracy(ROWS, VARIANTS[name], contexts, task=task)


def apart(one: str, other: str, *contexts: int, task: str = "recall") -> BySeed:
    """Points by which ``one`` answers more than ``other``; over all lengths beyond L without."""
    contexts = contexts or BEYOND
    return minus(right(one, *contexts, task=task), right(other, *contexts, task=task))


def cells(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[2:7]]
    shown = [mean(right(name, context)) for context in contexts]
    differences = [
        "" if name == other else starred(apart(name, other), 1) for other in ("RoPE", "floor alone")
    ]
    return [None, len(right(name, LENGTH)), *shown, *differences]


def extremes(name: str, context: int) -> tuple[float, float]:
    """The lowest and the highest seed, in percent."""
    seeds = right(name, context).values()
    return min(seeds), max(seeds)


def trials() -> int:
    rows = select(ROWS, "retrieval", variant="fope", task="recall", context=LENGTH, seed=0)
    return sum(row["total"] for row in rows)
