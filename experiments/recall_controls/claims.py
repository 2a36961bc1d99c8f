"""Where the numbers of README.md come from; `python -m experiments.check recall_controls`."""

from __future__ import annotations

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import ends, mean, minus, recall

ROWS = "recall_controls/results/*.jsonl"
LENGTH = 64
BEYOND = (128, 256, 512, 1024)
VARIANTS = {
    "RoPE": "rope",
    "series on all pairs": "series-all",
    "half of the pairs": "half",
    "every second frequency": "every-second",
    "series as released": "series",
    "floor alone": "floor",
    "FoPE, phase 0": "fope-zero-phase",
    "FoPE": "fope",
}
RECALL = recall(ROWS, VARIANTS, LENGTH, BEYOND)
right, apart, extremes, trials = RECALL.right, RECALL.apart, RECALL.extremes, RECALL.trials


def percents(context: int, *names: str) -> list[float]:
    return [mean(right(name, context)) for name in names]


def over_floor(name: str, context: int, sign: int = 1) -> tuple[float, float]:
    """Points by which ``name`` answers more than the floor alone; ``sign=-1`` for fewer."""
    return ends(minus(right(name, context), right("floor alone", context)), sign)


def cells(header: list[str], row: list[str]) -> list:
    name = row[0]
    contexts = [int(column.replace(",", "")) for column in header[2:7]]
    numbers = (percents(context, name)[0] for context in contexts)
    return [None, len(right(name, LENGTH)), *numbers, *RECALL.differences(name)]


CLAIMS = (
    Claim("Percent of {} trials a seed and length", lambda: [trials()]),
    Claim(
        "**The floor does it.** The floor alone answers {}% at twice L where RoPE answers {}%, "
        "and over all lengths beyond L {} ± {} points more.",
        lambda: [*percents(128, "floor alone", "RoPE"), *ends(apart("floor alone", "RoPE"))],
    ),
    Claim(
        "FoPE answers {}% at twice L and is {} ± {} points ahead of the floor alone over all "
        "lengths beyond L, with the ten seeds planned, from {} to {} by seed",
        lambda: [
            *percents(128, "FoPE"),
            *ends(apart("FoPE", "floor alone")),
            min(apart("FoPE", "floor alone").values()),
            max(apart("FoPE", "floor alone").values()),
        ],
    ),
    Claim(
        "FoPE with phase 0, the floor and the series without the 45 degrees, answers as much as "
        "the floor alone: {} ± {} points over all lengths beyond L (five seeds)",
        lambda: ends(apart("FoPE, phase 0", "floor alone")),
    ),
    Claim(
        "against FoPE itself this is not resolved ({} ± {})",
        lambda: ends(apart("FoPE, phase 0", "FoPE")),
    ),
    Claim(
        "**The series does not do it.** On all eight pairs, where it leaves out nothing, it "
        "answers {}% at twice L, over all lengths beyond L {} ± {} points less than RoPE",
        lambda: [
            *percents(128, "series on all pairs"),
            *ends(apart("RoPE", "series on all pairs")),
        ],
    ),
    Claim("one seed of five has {}% at L", lambda: [extremes("series on all pairs", LENGTH)[0]]),
    Claim(
        "**One pair makes the difference.** The fastest half of the pairs is the floor's three "
        "and one more, which turns 2.0 radians in L tokens, a third of a circle. With it {}% "
        "are left at twice L of the floor's {}%, and over all lengths beyond L {} ± {} points "
        "fewer.",
        lambda: [
            *percents(128, "half of the pairs", "floor alone"),
            *ends(apart("floor alone", "half of the pairs")),
        ],
    ),
    Claim(
        "Every second frequency keeps two of 0.01 and 0.001 radians a token, far below the floor "
        "of 0.098, and answers {}% at twice L and {}% at four times ({} ± {} and {} ± {} points "
        "more than the floor alone), then {}% and {}% ({} ± {} and {} ± {} fewer)",
        lambda: [
            *(percents(context, "every second frequency")[0] for context in BEYOND[:2]),
            *(x for context in BEYOND[:2] for x in over_floor("every second frequency", context)),
            *(percents(context, "every second frequency")[0] for context in BEYOND[2:]),
            *(
                x
                for context in BEYOND[2:]
                for x in over_floor("every second frequency", context, -1)
            ),
        ],
    ),
    Claim(
        "The series as released, on the same frequencies and without the floor, answers {}, {}, "
        "{} and {}%",
        lambda: [percents(context, "series as released")[0] for context in BEYOND],
    ),
    Claim(
        "{} ± {} points more over all lengths beyond L than every second frequency without it",
        lambda: ends(apart("series as released", "every second frequency")),
    ),
    Claim(
        "Seeds of RoPE range from {} to {}% at twice L, of FoPE from {} to {}%",
        lambda: [*extremes("RoPE", 128), *extremes("FoPE", 128)],
    ),
)

PAGE = Page(
    path="experiments/recall_controls/README.md",
    claims=CLAIMS,
    tables=(
        Table(r"\| variant \| pairs", lambda table: [[None] * 3 for _ in table.rows]),
        Table(r"\|  \| seeds \| 64", by_row(cells)),
    ),
    exempt={
        "settings": [
            "* it leaves out 0",
            "three seeds of the tournament had RoPE at 8%",
            "floor at 2 pi / L",
            "come from its 45 degrees",
        ]
    },
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
