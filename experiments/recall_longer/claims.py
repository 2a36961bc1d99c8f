"""Where the numbers of README.md come from; `python -m experiments.check recall_longer`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, accuracy, ends, mean, minus, select, starred
from fope_jax.report.sums import add_up

ROWS = "recall_longer/results/*.jsonl"
BEFORE = "recall_controls/results/*.jsonl"
LENGTH = 64
TWICE = 2 * LENGTH
BEYOND = (128, 256, 512, 1024)
AFTER = 1_200  # updates of 1,500, whose losses choose no rate
VARIANTS = {"RoPE": "rope", "series on all pairs": "series-all", "floor alone": "floor"}
VARIANTS |= {"FoPE": "fope"}


def right(name: str, *contexts: int, rows: str = ROWS) -> BySeed:
    """Percent of trials that are right, over all ``contexts`` together."""
    return accuracy(rows, VARIANTS[name], contexts, task="recall")


def apart(one: str, other: str, rows: str = ROWS) -> BySeed:
    """Points by which ``one`` answers more than ``other``, over all lengths beyond L."""
    return minus(right(one, *BEYOND, rows=rows), right(other, *BEYOND, rows=rows))


def cells(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[1:6]]
    differences = [
        "" if name == other else starred(apart(name, other), 1) for other in ("RoPE", "floor alone")
    ]
    return [None, *(mean(right(name, context)) for context in contexts), *differences]


def rates(header: list[str], row: list[str]) -> list:
    """Nats per token of the training batches of the last 300 updates, by learning rate."""
    losses = []
    for column in header[1:]:
        rows = f"recall_longer/rates/recall_{VARIANTS[row[0]]}-{float(column):g}.jsonl"
        losses.append(add_up(r for r in select(rows, "train") if r["step"] > AFTER).loss())
    return [None, *losses]


def trials() -> int:
    """Of a seed and length."""
    rows = select(ROWS, "retrieval", variant="fope", task="recall", context=LENGTH, seed=0)
    return sum(row["total"] for row in rows)


def extremes(name: str, context: int) -> tuple[float, float]:
    """The lowest and the highest seed, in percent."""
    seeds = right(name, context).values()
    return min(seeds), max(seeds)


CLAIMS = (
    Claim("Percent of {} trials a seed and length", lambda: [trials()]),
    Claim(
        "the floor alone answers {} ± {} points more than RoPE over all lengths beyond L "
        "({} ± {} after 1,500 updates)",
        lambda: [
            *ends(apart("floor alone", "RoPE")),
            *ends(apart("floor alone", "RoPE", rows=BEFORE)),
        ],
    ),
    Claim(
        "RoPE has {}% at twice L, from {} to {}% by seed, after 1,500 updates {}%",
        lambda: [
            mean(right("RoPE", TWICE)),
            *extremes("RoPE", TWICE),
            mean(right("RoPE", TWICE, rows=BEFORE)),
        ],
    ),
    Claim(
        "**FoPE is not ahead of the floor alone**: {} ± {} points. The lead of {} ± {} in",
        lambda: [
            *ends(apart("FoPE", "floor alone")),
            *ends(apart("FoPE", "floor alone", rows=BEFORE)),
        ],
    ),
    Claim(
        "learns the task whole now**, {}% at L, and answers more than RoPE at twice L (by "
        "{} ± {} points, a length",
        lambda: [
            mean(right("series on all pairs", LENGTH)),
            *ends(minus(right("series on all pairs", TWICE), right("RoPE", TWICE))),
        ],
    ),
    Claim(
        "all lengths beyond L together it is not resolved: {} ± {} points",
        lambda: ends(apart("series on all pairs", "RoPE")),
    ),
)

PAGE = Page(
    path="experiments/recall_longer/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| 0.0025", by_row(rates)), Table(r"\|  \| 64", by_row(cells))),
    exempt={
        "settings": [
            "* it leaves out 0",
            "batches of updates 1,201 to 1,500",
            "FoPE's best is 0.0025, that of the others 0.005",
        ]
    },
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
