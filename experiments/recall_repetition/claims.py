"""Where the numbers of README.md come from; `python -m experiments.check recall_repetition`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, accuracy, ends, mean, minus, starred

ROWS = "recall_repetition/results/*.jsonl"
LENGTH = 64
CONTEXTS = (64, 128, 256, 512, 1024)
METHODS = {"RoPE": "rope", "floor alone": "floor", "FoPE": "fope"}
TASKS = {"16": "recall", "64": "recall_64_keys"}  # by the number of keys


def right(name: str, keys: str, multiple: int) -> BySeed:
    """Percent of trials that are right at a multiple of L."""
    return accuracy(ROWS, METHODS[name], (multiple * LENGTH,), task=TASKS[keys])


def of_length(name: str, multiple: int) -> BySeed:
    """Points gained at four times a length where keys repeat as often as at it."""
    return minus(right(name, "64", multiple), right(name, "16", multiple // 4))


def of_repetition(name: str, multiple: int) -> BySeed:
    """Points gained at a length where keys repeat a quarter as often."""
    return minus(right(name, "64", multiple), right(name, "16", multiple))


def answers(header: list[str], row: list[str]) -> list:
    name, keys = row[0], row[1]
    return [None, None, *(mean(right(name, keys, context // LENGTH)) for context in CONTEXTS)]


def effects(header: list[str], row: list[str]) -> list:
    name = row[0]
    return [
        None,
        *(starred(of(name, m), 1) for of in (of_length, of_repetition) for m in (4, 8, 16)),
    ]


def least_at_length() -> list[float]:
    """The least percent that a seed of any method answers of 64 keys at L."""
    return [min(min(right(name, "64", 1).values()) for name in METHODS)]


CLAIMS: tuple[Claim, ...] = (
    Claim("with 64 keys every seed answers {}% and more at L", least_at_length),
    Claim(
        "FoPE gains {} ± {} points at 8L and {} ± {} at 16L",
        lambda: [x for multiple in (8, 16) for x in ends(of_repetition("FoPE", multiple))],
    ),
    Claim(
        "At 4L FoPE answers {}% of 16 keys and {}% of 64, the floor alone {} and {}%",
        lambda: [
            mean(right(name, keys, 4)) for name in ("FoPE", "floor alone") for keys in ("16", "64")
        ],
    ),
    Claim(
        "they lose {} ± {} (FoPE), {} ± {} (the floor alone) and {} ± {} points (RoPE)",
        lambda: [
            x for name in ("FoPE", "floor alone", "RoPE") for x in ends(of_length(name, 4), -1)
        ],
    ),
)

PAGE = Page(
    path="experiments/recall_repetition/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| keys", by_row(answers)), Table(r"\|  \| length alone", by_row(effects))),
    exempt={
        "settings": [
            "Percent of 200 trials",
            "* it leaves out 0",
            "*Length alone*: 64 keys at 4L",
            "minus 16 keys at a quarter",
            "*Repetition alone*: 64 keys minus 16 keys",
            "Windows of 64 keys",
            "trained on 16",
        ]
    },
    exempt_sections={"": "settings"},
)
