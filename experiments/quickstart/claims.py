"""Where the numbers of README.md come from; `python -m experiments.check quickstart`."""

from __future__ import annotations

import math

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, exp, loss, mean, over, plus_minus, select, spread_of

ROWS = "quickstart/results/*.jsonl"
LENGTH, LONGEST = 128, 2048
METHODS = ("nope", "alibi", "rope", "fope")


def at(method: str, context: int) -> BySeed:
    """Perplexities."""
    return exp(loss(ROWS, method, context))


def growth(method: str) -> float:
    """Perplexity at 16L over that at L, the mean over seeds."""
    return mean(over(at(method, LONGEST), at(method, LENGTH)))


def cells(header: list[str], row: list[str]) -> list:
    method = row[0].lower()
    contexts = [int(name.replace(",", "")) for name in header[1:-1]]
    values = [plus_minus(spread_of(at(method, context)), 2) for context in contexts]
    return [None, *values, f"{growth(method):.2f}"]


def worse_than_others(method: str) -> list[float]:
    """By how much the perplexity at L is above the nearest and the farthest of the others."""
    values = [mean(at(method, LENGTH)) - mean(at(m, LENGTH)) for m in METHODS if m != method]
    return [min(values), max(values)]


def passkey_cells() -> list[list[dict]]:
    """Rows of all seeds and depths, by method, wording and length."""
    rows = [row for method in METHODS for row in select(ROWS, "passkey", variant=method)]
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["template"], row["context"]), []).append(row)
    return list(cells.values())


def passkeys() -> list[float]:
    """Most that a method finds in a wording at a length over all seeds, and how many are asked."""
    cells = passkey_cells()
    (asked,) = {sum(row["total"] for row in cell) for cell in cells}
    return [max(sum(row["correct"] for row in cell) for cell in cells), asked]


def key_losses() -> list[float]:
    """Least and most nats on a token of the key, over methods, wordings and lengths."""
    values = [
        sum(row["nats"] for row in cell) / sum(row["tokens"] for row in cell)
        for cell in passkey_cells()
    ]
    return [min(values), max(values)]


CLAIMS = (
    Claim(
        "RoPE and FoPE are the best at the training length** ({} and {},",
        lambda: [mean(at("rope", LENGTH)), mean(at("fope", LENGTH))],
    ),
    Claim(
        "at 16 times the length its perplexity is {} times that at 128 tokens, RoPE's {} times",
        lambda: [growth("fope"), growth("rope")],
    ),
    Claim("nor gain much** ({})", lambda: [growth("alibi")]),
    Claim("Its seeds spread most ({})", lambda: [spread_of(at("alibi", LENGTH)).deviation]),
    Claim("hardly changes with length** ({})", lambda: [growth("nope")]),
    Claim("worst at 128 tokens by {} to {}", lambda: worse_than_others("nope")),
    Claim("in either wording** ({} of {} each)", passkeys),
    Claim(
        "its loss on a token of the key is {} to {} nats, where guessing among ten digits costs {}",
        lambda: [*key_losses(), math.log(10)],
    ),
)

PAGE = Page(
    path="experiments/quickstart/README.md",
    claims=CLAIMS,
    tables=(Table(r"\| context \(tokens\) \| 128", by_row(cells)),),
    exempt={"settings": ["the best from 256 tokens on"]},
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
