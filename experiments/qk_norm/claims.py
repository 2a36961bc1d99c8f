"""Where the numbers of README.md come from; `python -m experiments.check qk_norm`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import Losses, mean

LENGTH, TWICE, LONGEST = 128, 256, 2048
NORM = ", normed"
METHODS = {"RoPE": "rope", "whole cycles": "whole-cycles", "NoPE": "nope", "FoPE": "fope"}
NORMED = {name + NORM: f"{variant}-qk-norm" for name, variant in METHODS.items()}
LOSSES = Losses("qk_norm/results/*.jsonl", METHODS | NORMED, LENGTH, LONGEST)
at, behind = LOSSES.at, LOSSES.behind


def cells(header: list[str], row: list[str]) -> list:
    return [None, *(mean(at(row[0], context)) for context in (LENGTH, TWICE, LONGEST))]


def cost_of_norm(context: int) -> list[float]:
    """Nats that the norm costs RoPE, FoPE, NoPE and whole cycles."""
    names = ("RoPE", "FoPE", "NoPE", "whole cycles")
    return [mean(behind(name + NORM, name, context)) for name in names]


CLAIMS = (
    Claim(
        "NoPE has the lowest loss at 16L, {} nats against {} of FoPE and {} of RoPE, and the "
        "highest at L without the norm, {} against {} of RoPE.",
        lambda: [
            *(mean(at(name, LONGEST)) for name in ("NoPE", "FoPE", "RoPE")),
            *(mean(at(name, LENGTH)) for name in ("NoPE", "RoPE")),
        ],
    ),
    Claim(
        "Whole cycles cost nothing at L and {} nats at 2L",
        lambda: [mean(behind("whole cycles", "RoPE", TWICE))],
    ),
    Claim(
        "The norm costs RoPE, FoPE, NoPE and whole cycles {}, {}, {} and {} nats at L",
        lambda: cost_of_norm(LENGTH),
    ),
)

PAGE = Page(
    path="experiments/qk_norm/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| loss at L", by_row(cells)),),
    exempt={
        "the paper's numbers": [
            "5.56 nats, against 5.86 of whole cycles without it, 5.89 with it, and 6.01 of RoPE; "
            "the norm costs NoPE 0.15 there",
            "(20 M parameters, L = 512, one seed)",
        ]
    },
    exempt_sections={"": "settings"},
)
