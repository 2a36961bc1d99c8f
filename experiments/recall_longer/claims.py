"""Where the numbers of README.md come from; `python -m experiments.check recall_longer`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, accuracy, ends, mean, minus, select, starred

ROWS, RATES = "recall_longer/results/*.jsonl", "recall_longer/rates/*.jsonl"
LENGTH, BEYOND = 64, (128, 256, 512, 1024)
VARIANTS = {
    "RoPE": "rope",
    "series on all pairs": "series-all",
    "floor alone": "floor",
    "FoPE": "fope",
}
LAST = 1200  # updates after which the training loss of a rate is taken


def right(name: str, *contexts: int) -> BySeed:
    """Percent of trials that are right, over all ``contexts`` together."""
    return accuracy(ROWS, VARIANTS[name], contexts, task="recall")


def apart(one: str, other: str) -> BySeed:
    """Points by which ``one`` answers more than ``other``, over all lengths beyond L."""
    return minus(right(one, *BEYOND), right(other, *BEYOND))


def percents(context: int, *names: str) -> list[float]:
    return [mean(right(name, context)) for name in names]


def loss_at_rate(name: str, rate: float) -> float:
    """Mean training loss of the last updates at a learning rate, nats a token."""
    file = f"{RATES.removesuffix('*.jsonl')}recall_{VARIANTS[name]}-{rate:g}.jsonl"
    rows = [row for row in select(file, "train") if row["step"] > LAST]
    return sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)


def rate_cells(header: list[str], row: list[str]) -> list:
    losses = {float(rate): loss_at_rate(row[0], float(rate)) for rate in header[1:4]}
    return [None, *losses.values(), f"{min(losses, key=losses.__getitem__):g}"]


def cells(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[2:7]]
    differences = [
        "" if name == other else starred(apart(name, other), 1) for other in ("RoPE", "floor alone")
    ]
    return [None, len(right(name, LENGTH)), *(percents(c, name)[0] for c in contexts), *differences]
