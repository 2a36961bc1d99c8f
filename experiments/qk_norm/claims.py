"""Where the numbers of README.md come from; `python -m experiments.check qk_norm`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import Losses, ends, mean, starred

LENGTH, TWICE, LONGEST = 128, 256, 2048
NORM = ", normed"
METHODS = {"RoPE": "rope", "whole cycles": "whole-cycles", "NoPE": "nope", "FoPE": "fope"}
NORMED = {name + NORM: f"{variant}-qk-norm" for name, variant in METHODS.items()}
LOSSES = Losses("qk_norm/results/*.jsonl", METHODS | NORMED, LENGTH, LONGEST)
at, behind = LOSSES.at, LOSSES.behind


def cells(header: list[str], row: list[str]) -> list:
    return [None, *(mean(at(row[0], context)) for context in (LENGTH, TWICE, LONGEST))]


def differences(header: list[str], row: list[str]) -> list:
    one, other = row[0].split(" minus ")
    return [None, *(starred(behind(one, other, context)) for context in (LENGTH, TWICE, LONGEST))]


CLAIMS = (
    Claim(
        "NoPE has the lowest loss at 16L, {} nats against {} of FoPE and {} of RoPE, and at L "
        "without the norm the highest, {} against {} of RoPE",
        lambda: [
            *(mean(at(name, LONGEST)) for name in ("NoPE", "FoPE", "RoPE")),
            *(mean(at(name, LENGTH)) for name in ("NoPE", "RoPE")),
        ],
    ),
    Claim(
        "Whole cycles lose {} ± {} nats more than RoPE at 2L",
        lambda: ends(behind("whole cycles", "RoPE", TWICE)),
    ),
    Claim(
        "The norm costs RoPE {} ± {} nats at L and FoPE {} ± {}",
        lambda: [
            *ends(behind("RoPE" + NORM, "RoPE", LENGTH)),
            *ends(behind("FoPE" + NORM, "FoPE", LENGTH)),
        ],
    ),
)

PAGE = Page(
    path="experiments/qk_norm/README.md",
    claims=CLAIMS,
    tables=(
        Table(r"\|  \| loss at L", by_row(cells)),
        Table(r"\| difference", by_row(differences)),
    ),
    exempt={
        "the paper's numbers": [
            "5.56 nats, against 5.86 of whole cycles without it, 5.89 with it, and 6.01 of RoPE; "
            "the norm costs NoPE 0.15 there",
            "(20 M parameters, L = 512, one seed)",
        ],
        "settings": ["* it leaves out 0"],
    },
    exempt_sections={"": "settings"},
)
