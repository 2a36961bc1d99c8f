"""Where the numbers of README.md come from; `python -m experiments.check recall_newer`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, accuracy, late_loss, mean, minus, select, starred
from experiments.recall_newer.sweep import LOWER_RATES, RATES
from fope_jax.report.sums import add_up

LENGTH, TWICE = 64, 128
BEYOND = (128, 256, 512, 1024)
SEEDS = range(5)
CONTROLS = {"RoPE": "rope", "floor alone": "floor", "FoPE": "fope"}  # of recall_controls
HYBRIDS = {"SWAN": "swan", "RNoPE-SWA": "rnope"}
OTHERS = {"PoPE": "pope", "FoX": "fox", "FoX, gates open": "fox-open"}
OTHERS |= {"RoPE, random positions": "random", "DroPE": "drope"}


def right(name: str, *contexts: int) -> BySeed:
    """Percent of trials that are right, over all ``contexts`` together, of the five seeds."""
    experiment = "recall_newer" if name in HYBRIDS else "recall_controls"
    found = accuracy(
        f"{experiment}/results/*.jsonl", (HYBRIDS | CONTROLS)[name], contexts, task="recall"
    )
    return {seed: value for seed, value in found.items() if seed in SEEDS}


def apart(one: str, other: str, *contexts: int) -> BySeed:
    """Points by which ``one`` answers more, over all lengths beyond L if none are named."""
    contexts = contexts or BEYOND
    return minus(right(one, *contexts), right(other, *contexts))


def answers(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[1:6]]
    differences = [
        "" if name == other else starred(apart(name, other), 1) for other in ("RoPE", "floor alone")
    ]
    return [None, *(mean(right(name, context)) for context in contexts), *differences]


def rate_rows(name: str, rate: float) -> str:
    return f"recall_newer/rates/recall_{(HYBRIDS | OTHERS)[name]}-{rate:g}.jsonl"


def rates_of(name: str) -> tuple[float, ...]:
    return LOWER_RATES if name == "DroPE" else RATES


def losses(header: list[str], row: list[str]) -> list:
    """Nats a token of the last batches at each rate, the lowest first, and the most right at L."""
    after = 100 if row[0] == "DroPE" else 1_200  # updates whose losses choose no rate
    found = [late_loss(rate_rows(row[0], rate), after) for rate in rates_of(row[0])]
    return [None, None, *found, most_right(row[0])]


def most_right(name: str) -> float:
    """The most percent of recall that any rate answers at L."""
    trials = [select(rate_rows(name, r), "retrieval", task="recall") for r in rates_of(name)]
    return max(float(add_up(rows).accuracy()) for rows in trials)


CLAIMS: tuple[Claim, ...] = ()

PAGE = Page(
    path="experiments/recall_newer/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| rates", by_row(losses)), Table(r"\|  \| 64", by_row(answers))),
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
