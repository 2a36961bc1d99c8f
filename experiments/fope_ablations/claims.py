"""Where the numbers of README.md come from; `python -m experiments.check fope_ablations`."""

from __future__ import annotations

import itertools
from functools import cache

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import (
    BySeed,
    Losses,
    ends,
    exp,
    holm_count,
    minus,
    plus_minus,
    spread_of,
    starred,
)

ROWS = "fope_ablations/results/*.jsonl"
LENGTH, LONGEST = 128, 2048
VARIANTS = {
    "RoPE": "rope",
    "FoPE": "fope",
    "without the series": "fope-no-series",
    "without the floor": "fope-no-floor",
    "p-rope-6": "p-rope-6",
    "zero phase 0, not 45 degrees": "fope-zero-phase",
    "learnable": "fope-learnable",
    "shared by layers": "fope-shared-layers",
    "shared by heads": "fope-shared-heads",
    "sigma as a normal deviation": "fope-normal",
    "equations, sigma 0": "fope-sigma-0.0",
    "sigma 0.1": "fope-sigma-0.1",
    "sigma 0.3": "fope-sigma-0.3",
    "sigma 0.5": "fope-sigma-0.5",
    "D = 16": "fope-d-16",
    "D = 64": "fope-d-64",
    "D = 128": "fope-d-128",
    "RoPE, QK-norm": "rope-qk-norm",
    "FoPE, QK-norm": "fope-qk-norm",
    "RoPE, head_dim 64": "rope-wide-heads",
    "FoPE, head_dim 64": "fope-wide-heads",
}
LOSSES = Losses(ROWS, VARIANTS, LENGTH, LONGEST)
at, gap, behind = LOSSES.at, LOSSES.gap, LOSSES.behind
FLOOR = "without the series"
# What the equations' series adds to the floor, and what the floor adds to RoPE: one, other.
SERIES, CLIP = ("sigma 0.3", "equations, sigma 0"), ("equations, sigma 0", "RoPE")


def wider(one: str, other: str) -> BySeed:
    """How much larger the gap of ``one`` is than that of ``other``."""
    return minus(gap(one), gap(other))


def cells(header: list[str], row: list[str]) -> list:
    name = row[0]
    perplexities = [plus_minus(spread_of(exp(at(name, c))), 2) for c in (LENGTH, LONGEST)]
    if name == "RoPE":
        return [None, *perplexities, "", "", ""]
    differences = behind(name, "RoPE", LENGTH), behind(name, "RoPE", LONGEST), wider(name, "RoPE")
    return [None, *perplexities, *map(starred, differences)]


@cache
def significant_of_all(context: int) -> list[int]:
    """Pairs of variants that differ with all tested together, and all pairs."""
    pairs = {pair: behind(*pair, context) for pair in itertools.combinations(VARIANTS, 2)}
    return [holm_count(pairs), len(pairs)]


CLAIMS = (
    Claim(
        "the gap is smaller than RoPE's by {} ± {}, with the series as well by {} ± {}, "
        "without the floor (a series for half of the pairs, the others unrotated) it is larger by "
        "{} ± {}",
        lambda: [
            *ends(wider(FLOOR, "RoPE"), -1),
            *ends(wider("FoPE", "RoPE"), -1),
            *ends(wider("without the floor", "RoPE")),
        ],
    ),
    Claim(
        "Without the floor the gap is {} ± {} larger than without the series",
        lambda: ends(wider("without the floor", FLOOR)),
    ),
    Claim(
        "Over the floor alone the series changes the gap by {} ± {}, with the same zero phase by "
        "{} ± {}",
        lambda: [*ends(wider("FoPE", FLOOR)), *ends(wider("zero phase 0, not 45 degrees", FLOOR))],
    ),
    Claim(
        "Sigma 0.3 minus sigma 0 is {} ± {} at L and {} ± {} at 16L, so {} ± {} in the gap; the "
        "floor itself changes RoPE's gap by {} ± {} and its loss at L by {} ± {}",
        lambda: [
            *ends(behind("sigma 0.3", "equations, sigma 0", LENGTH)),
            *ends(behind("sigma 0.3", "equations, sigma 0", LONGEST)),
            *ends(wider("sigma 0.3", "equations, sigma 0")),
            *ends(wider("equations, sigma 0", "RoPE")),
            *ends(behind("equations, sigma 0", "RoPE", LENGTH)),
        ],
    ),
    Claim(
        "(the series takes {} ± {} more off it than the floor) and is not resolved for the loss "
        "at 16L ({} ± {} more)",
        lambda: [
            *ends(minus(wider(*SERIES), wider(*CLIP)), -1),
            *ends(minus(behind(*SERIES, LONGEST), behind(*CLIP, LONGEST)), -1),
        ],
    ),
    Claim(
        "At 16L it is better than sigma 0 by {} ± {} and than 0.1 by {} ± {}, at L worse by "
        "{} ± {} and {} ± {}. Sigma 0.5 minus 0.3 is {} ± {} at L, {} ± {} at 16L, and {} ± {} "
        "in the gap. D = 128 minus D = 16 is {} ± {} at L, which just leaves out 0, and {} ± {} "
        "at 16L. In the paper sigma 0.3 is best (with D = 16,",
        lambda: [
            *ends(behind("sigma 0.3", "equations, sigma 0", LONGEST), -1),
            *ends(behind("sigma 0.3", "sigma 0.1", LONGEST), -1),
            *ends(behind("sigma 0.3", "equations, sigma 0", LENGTH)),
            *ends(behind("sigma 0.3", "sigma 0.1", LENGTH)),
            *ends(behind("sigma 0.5", "sigma 0.3", LENGTH)),
            *ends(behind("sigma 0.5", "sigma 0.3", LONGEST)),
            *ends(wider("sigma 0.5", "sigma 0.3")),
            *ends(behind("D = 128", "D = 16", LENGTH)),
            *ends(behind("D = 128", "D = 16", LONGEST)),
        ],
    ),
    Claim(
        "Sigma 0.3 loses {} nats at L and is ahead of RoPE at 16L by {} ± {}",
        lambda: [
            ends(behind("sigma 0.3", "RoPE", LENGTH))[0],
            *ends(behind("sigma 0.3", "RoPE", LONGEST), -1),
        ],
    ),
    Claim(
        "as a normal deviation loses {} ± {} at L where the equations lose {}",
        lambda: [
            *ends(behind("sigma as a normal deviation", "RoPE", LENGTH)),
            ends(behind("sigma 0.3", "RoPE", LENGTH))[0],
        ],
    ),
    Claim(
        "code's 45 degrees: its gap is smaller by {} ± {}, its loss at 16L by {} ± {}",
        lambda: [
            *ends(wider("zero phase 0, not 45 degrees", "FoPE"), -1),
            *ends(behind("zero phase 0, not 45 degrees", "FoPE", LONGEST), -1),
        ],
    ),
    Claim(
        "shared by heads they cost {} ± {} at L",
        lambda: ends(behind("shared by heads", "FoPE", LENGTH)),
    ),
    Claim(
        "FoPE's gap minus RoPE's is {} ± {} with wide heads and {} ± {} with QK-norm",
        lambda: [
            *ends(wider("FoPE, head_dim 64", "RoPE, head_dim 64")),
            *ends(wider("FoPE, QK-norm", "RoPE, QK-norm")),
        ],
    ),
    Claim(
        "with QK-norm FoPE is worse at L by {} ± {}",
        lambda: ends(behind("FoPE, QK-norm", "RoPE, QK-norm", LENGTH)),
    ),
    Claim("with Holm {} of {} pairs remain at L, none at 16L", lambda: significant_of_all(LENGTH)),
)

PAGE = Page(
    path="experiments/fope_ablations/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| perplexity at L", by_row(cells)),),
    exempt={
        "settings": ["Sigma 0 is the floor", "Zero phase 0", "head_dim 64 are far", "21 variants"]
    },
    exempt_sections={"": "settings and times"},
)
