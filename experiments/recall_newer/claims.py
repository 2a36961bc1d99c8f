"""Where the numbers of README.md come from; `python -m experiments.check recall_newer`."""

from __future__ import annotations

from collections.abc import Callable

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import BySeed, accuracy, ends, late_loss, mean, minus, select, starred
from experiments.recall_newer.sweep import LOWER_RATES, RATES
from fope_jax.report.sums import add_up

LENGTH, TWICE = 64, 128
BEYOND = (128, 256, 512, 1024)
SEEDS = range(5)
CONTROLS = {"RoPE": "rope", "floor alone": "floor", "FoPE": "fope"}  # of recall_controls
LEARNED = {"SWAN": "swan", "RNoPE-SWA": "rnope", "FoX, gates open": "fox-open"}
PARTS = {"window alone": "local-rope", "second layer without positions alone": "rope-nope"}
OURS = LEARNED | PARTS
OTHERS = {"PoPE": "pope", "FoX": "fox", "RoPE, random positions": "random", "DroPE": "drope"}


def right(name: str, *contexts: int) -> BySeed:
    """Percent of trials that are right, over all ``contexts`` together, of the five seeds."""
    experiment = "recall_newer" if name in OURS else "recall_controls"
    found = accuracy(
        f"{experiment}/results/*.jsonl", (OURS | CONTROLS)[name], contexts, task="recall"
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
    return f"recall_newer/rates/recall_{(LEARNED | OTHERS)[name]}-{rate:g}.jsonl"


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


def of_pair(one: str, other: str) -> Callable[[], list[float]]:
    """Mean and half width of how many points more ``one`` answers."""
    return lambda: [*ends(apart(one, other))]


def together() -> BySeed:
    """Points by which both parts gain more together than the sum of each alone."""
    window, second = (apart(name, "RoPE") for name in PARTS)
    both = apart("RNoPE-SWA", "RoPE")
    return {seed: both[seed] - window[seed] - second[seed] for seed in both}


CLAIMS = (
    Claim(
        "SWAN answers {}% at L and {}% at 16L, RNoPE-SWA {} and {}%, where RoPE has {}% and the "
        "floor alone {}%",
        lambda: [
            *(mean(right(name, c)) for name in ("SWAN", "RNoPE-SWA") for c in (64, 1024)),
            mean(right("RoPE", 1024)),
            mean(right("floor alone", 1024)),
        ],
    ),
    Claim("SWAN answers {} ± {} points more than RoPE", of_pair("SWAN", "RoPE")),
    Claim("and {} ± {} more than the floor alone; RNoPE-SWA", of_pair("SWAN", "floor alone")),
    Claim(
        "RNoPE-SWA {} ± {} and {} ± {}.",
        lambda: [*ends(apart("RNoPE-SWA", "RoPE")), *ends(apart("RNoPE-SWA", "floor alone"))],
    ),
    Claim(
        "The window alone gains {} ± {} points over RoPE, the second layer without positions alone "
        "{} ± {}, both {} ± {}: {} ± {} more than the sum",
        lambda: [
            *(x for name in (*PARTS, "RNoPE-SWA") for x in ends(apart(name, "RoPE"))),
            *ends(together()),
        ],
    ),
    Claim(
        "at 16L they add {} ± {} points, at twice L {} ± {}",
        lambda: [*ends(apart("SWAN", "RNoPE-SWA", 1024)), *ends(apart("SWAN", "RNoPE-SWA", TWICE))],
    ),
    Claim(
        "it answers {}% at L, {}% at twice L and {}% at 16L, {} ± {} points more than the floor "
        "alone and {} ± {} fewer than SWAN",
        lambda: [
            *(mean(right("FoX, gates open", c)) for c in (64, 128, 1024)),
            *ends(apart("FoX, gates open", "floor alone")),
            *ends(apart("FoX, gates open", "SWAN"), -1),
        ],
    ),
    Claim("it answers at most {}% of recall at L at any rate", lambda: [most_right("FoX")]),
)

PAGE = Page(
    path="experiments/recall_newer/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| rates", by_row(losses)), Table(r"\|  \| 64", by_row(answers))),
    exempt={
        "settings": [
            "* it leaves out 0",
            "opens to 0.98",
            "Percent of 200 trials",
            "look further in 1,500 updates",
            "of updates 1,201 to 1,500 (DroPE: of the last 50 of 150)",
        ]
    },
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
