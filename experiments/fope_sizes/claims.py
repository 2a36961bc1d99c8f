"""Where the numbers of README.md come from; `python -m experiments.check fope_sizes`."""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, Row, mean, minus, plus_minus, select, spread_of, starred
from experiments.fope_sizes.sweep import METHODS, SIZES
from fope_jax.report.sums import add_up

ROWS = "fope_sizes/results/*.jsonl"
LENGTH, LONGEST = 128, 2048
UPDATES = 500  # of RoPE in the base size, whose loss at L is the one that is compared at
NAMES = {name.replace("-", " "): name for name in SIZES}  # on the page


class Reached(NamedTuple):
    """Where the loss at L has come down to the one compared at."""

    updates: float
    gap: float  # the loss at 16L minus that at L


@cache
def losses(variant: str, seed: int, context: int) -> dict[int, float]:
    """Nats per token during training, by updates."""
    by_step: dict[int, list[Row]] = {}
    for row in select(ROWS, "validation", variant=variant, seed=seed, context=context):
        by_step.setdefault(row["step"], []).append(row)
    return {step: add_up(rows).loss() for step, rows in sorted(by_step.items())}


def seeds() -> list[int]:
    return sorted({row["seed"] for row in select(ROWS, "validation", variant="rope-base")})


def target(seed: int) -> float:
    return losses("rope-base", seed, LENGTH)[UPDATES]


def reached(method: str, size: str, seed: int) -> Reached:
    """Linearly between the last measurement above the loss compared at and the next one.

    Raises:
      LookupError: the run has not come down to it.
    """
    wanted, variant = target(seed), f"{method}-{size}"
    at_length, at_longest = (losses(variant, seed, context) for context in (LENGTH, LONGEST))
    for before, after in itertools.pairwise(at_length):
        if at_length[after] <= wanted:
            share = (at_length[before] - wanted) / (at_length[before] - at_length[after])
            longest = at_longest[before] + share * (at_longest[after] - at_longest[before])
            return Reached(before + share * (after - before), longest - wanted)
    raise LookupError(f"{method} {size} {seed} does not come down to {wanted:.3f} nats at L")


def updates(method: str, size: str) -> BySeed:
    return {seed: reached(method, size, seed).updates for seed in seeds()}


def gap(method: str, size: str) -> BySeed:
    return {seed: reached(method, size, seed).gap for seed in seeds()}


def wider(size: str) -> BySeed:
    """How much larger FoPE's gap is than RoPE's of the same size."""
    return minus(gap("fope", size), gap("rope", size))


def parameters(size: str) -> int:
    """Of the model of RoPE; FoPE has no more."""
    runs = [row for row in select(ROWS, "run") if row["config"]["name"] == f"rope-{size}"]
    return runs[0]["info"]["parameters"]


def by_seed(header: list[str], row: list[str]) -> list:
    """Updates and gaps of one size and seed."""
    size, seed = NAMES[row[0]], int(row[1])
    found = [reached(method, size, seed) for method in METHODS]
    gaps = [each.gap for each in found]
    return [None, None, *(each.updates for each in found), *gaps, gaps[1] - gaps[0]]


def cells(header: list[str], row: list[str]) -> list:
    """Means over the seeds."""
    size = NAMES[row[0]]
    counts = [mean(updates(method, size)) for method in METHODS]
    gaps = [plus_minus(spread_of(gap(method, size)), 3) for method in METHODS]
    return [None, parameters(size) / 1e6, *counts, *gaps, starred(wider(size))]


def against(size: str) -> BySeed:
    """How much larger FoPE's gap minus RoPE's is with wide heads than with another size."""
    return minus(wider("wide-heads"), wider(size))


def most_moved() -> float:
    """The most that a gap changes between two measurements of seed 0, from 300 updates on."""
    moves = []
    for method, size in itertools.product(METHODS, SIZES):
        at_length, at_longest = (
            losses(f"{method}-{size}", 0, context) for context in (LENGTH, LONGEST)
        )
        gaps = [at_longest[step] - at_length[step] for step in at_length if step >= 300]
        moves += [abs(after - before) for before, after in itertools.pairwise(gaps)]
    return max(moves)


# When the three seeds are there: ends(against("more-heads")) and ends(against("more-layers")).
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "RoPE's loss at L after {} updates is {} nats a token in seed 0",
        lambda: [UPDATES, target(0)],
    ),
    Claim("A gap moves by up to {} between one measurement", lambda: [most_moved()]),
)

PAGE = Page(
    path="experiments/fope_sizes/README.md",
    claims=CLAIMS,
    tables=(
        Table(r"\|  \| seed", by_row(by_seed)),
        Table(r"\|  \| parameters", by_row(cells), is_optional=True),
    ),
    exempt_sections={"": "settings, lengths and times"},
)
