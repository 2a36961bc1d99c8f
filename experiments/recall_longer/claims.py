"""Where the numbers of README.md come from; `python -m experiments.check recall_longer`."""

from __future__ import annotations

from experiments.check.claims import Below, Claim, Page, Table, by_row
from experiments.check.rows import ends, late_loss, mean, minus, recall

ROWS = "recall_longer/results/*.jsonl"
BEFORE = "recall_controls/results/*.jsonl"
LENGTH = 64
TWICE = 2 * LENGTH
BEYOND = (128, 256, 512, 1024)
AFTER = 1_200  # updates of 1,500, whose losses choose no rate
VARIANTS = {"RoPE": "rope", "series on all pairs": "series-all", "floor alone": "floor"}
VARIANTS |= {"FoPE": "fope"}
RECALL = recall(ROWS, VARIANTS, LENGTH, BEYOND)
EARLIER = RECALL._replace(pattern=BEFORE)
right, apart, extremes, trials = RECALL.right, RECALL.apart, RECALL.extremes, RECALL.trials


def cells(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[1:6]]
    return [None, *(mean(right(name, c)) for c in contexts), *RECALL.differences(name)]


def rates(header: list[str], row: list[str]) -> list:
    """Nats per token of the training batches of the last 300 updates, by learning rate."""
    losses = []
    for column in header[1:]:
        rows = f"recall_longer/rates/recall_{VARIANTS[row[0]]}-{float(column):g}.jsonl"
        losses.append(late_loss(rows, AFTER))
    return [None, *losses]


CLAIMS = (
    Claim("Percent of {} trials a seed and length", lambda: [trials()]),
    Claim(
        "the floor alone answers {} ± {} points more than RoPE over all lengths beyond L "
        "({} ± {} after 1,500 updates)",
        lambda: [*ends(apart("floor alone", "RoPE")), *ends(EARLIER.apart("floor alone", "RoPE"))],
    ),
    Claim(
        "RoPE has {}% at twice L, from {} to {}% by seed, after 1,500 updates {}%",
        lambda: [
            mean(right("RoPE", TWICE)),
            *extremes("RoPE", TWICE),
            mean(EARLIER.right("RoPE", TWICE)),
        ],
    ),
    Claim(
        "**No lead of FoPE over the floor alone is resolved**: {} ± {} points. The lead of "
        "{} ± {} in",
        lambda: [*ends(apart("FoPE", "floor alone")), *ends(EARLIER.apart("FoPE", "floor alone"))],
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
        "but no more at four times and beyond ({}% against {}%, then below {}%)",
        lambda: [
            mean(right("series on all pairs", 4 * LENGTH)),
            mean(right("RoPE", 4 * LENGTH)),
            Below(max(mean(right("series on all pairs", times * LENGTH)) for times in (8, 16))),
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
