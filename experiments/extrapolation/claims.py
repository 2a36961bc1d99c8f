"""Where the numbers of README.md come from; `python -m experiments.check extrapolation`."""

from __future__ import annotations

import itertools

from experiments.check.claims import Claim, Page, Table, by_row
from experiments.check.rows import (
    BySeed,
    Losses,
    ends,
    exp,
    holm_count,
    interval,
    loss,
    mean,
    minus,
    plus_minus,
    read,
    spread_of,
)

ROWS = "extrapolation/results/*.jsonl"
LENGTH, LONGEST = 128, 2048
VARIANTS = {
    "RoPE": "rope",
    "RoPE, then RoPE at 2L": "rope+same-256",
    "RoPE, then YaRN at 2L": "rope+yarn-256",
    "RoPE, then YaRN 16 at 2L": "rope+yarn16-256",
    "RoPE, then FoPE at 2L": "rope+fope-256",
    "FoPE": "fope",
    "FoPE, then unchanged at 2L": "fope+same-256",
    "FoPE, then YaRN at 2L": "fope+yarn-256",
    "FoPE, then YaRN 16 at 2L": "fope+yarn16-256",
    "FoPE, then YaRN 16 after the clip at 2L": "fope+yarn16-after-clip-256",
    "FoPE, then FoPE at 2L": "fope+fope-256",
}
AFTER_CLIP = "FoPE, then YaRN 16 after the clip at 2L"
LOSSES = Losses(ROWS, VARIANTS, LENGTH, LONGEST)
at, gap, behind = LOSSES.at, LOSSES.gap, LOSSES.behind


def growth(variant: str) -> float:
    """Perplexity at 16L over that at L, the mean over seeds."""
    return mean(exp(gap(variant)))


def cells(header: list[str], row: list[str]) -> list:
    contexts = [int(name.replace(",", "")) for name in header[1:]]
    first = LENGTH if "then" not in row[0] else 2 * LENGTH
    return [None] + [
        plus_minus(spread_of(exp(at(row[0], context))), 2) if context >= first else ""
        for context in contexts
    ]


def at_the_longest() -> dict[tuple[str, str], BySeed]:
    """Every pair of variants at 16L."""
    return {pair: behind(*pair, LONGEST) for pair in itertools.combinations(VARIANTS, 2)}


def behind_on(split: str, one: str, other: str, context: int) -> BySeed:
    """How many nats a token ``one`` loses more than ``other``, on web pages or news."""
    return minus(*(loss(ROWS, VARIANTS[name], context, split) for name in (one, other)))


def significant_on(split: str) -> int:
    """How many pairs of variants differ at 16L, one by one."""
    pairs = itertools.combinations(VARIANTS, 2)
    return sum(interval(behind_on(split, *pair, LONGEST)).leaves_out_zero for pair in pairs)


def fope_on_news(context: int) -> BySeed:
    """How many nats RoPE extended by FoPE loses more than by YaRN with factor 16."""
    return behind_on("news", "RoPE, then FoPE at 2L", "RoPE, then YaRN 16 at 2L", context)


def alone_beyond() -> list[float]:
    gain, at_twice = (behind("RoPE", "FoPE", context) for context in (LONGEST, 2 * LENGTH))
    return [*ends(gain), growth("FoPE"), growth("RoPE"), *ends(at_twice)]


def change_of_loss() -> float:
    """Percent by which FoPE in place of RoPE raises the loss before the first update."""
    starts = [
        row["lineage"]["start"]
        for row in read("extrapolation/results/rope_fope_*.jsonl")
        if row["kind"] == "run"
    ]
    return sum(100 * (start["child"] / start["parent"] - 1) for start in starts) / len(starts)


CLAIMS = (
    Claim(
        "Changing RoPE into FoPE raises the loss in nats before the first update by {}%; after a "
        "hundred updates it is {} ± {} behind RoPE that merely went on, at 2L",
        lambda: [
            change_of_loss(),
            *ends(behind("RoPE, then FoPE at 2L", "RoPE, then RoPE at 2L", 2 * LENGTH)),
        ],
    ),
    Claim(
        "{} ± {} nats a token at 16L ({} times its perplexity at L, RoPE {} times), {} ± {} at 2L.",
        alone_beyond,
    ),
    Claim(
        "it ends {} ± {} below it at 16L, and {} ± {} above it at 2L. YaRN with factor 2 it beats "
        "by far at 16L ({} ± {}), and costs a little more than that at 2L ({} ± {})",
        lambda: [
            *ends(behind("RoPE, then YaRN 16 at 2L", "RoPE, then FoPE at 2L", LONGEST)),
            *ends(behind("RoPE, then FoPE at 2L", "RoPE, then YaRN 16 at 2L", 2 * LENGTH)),
            *ends(behind("RoPE, then YaRN at 2L", "RoPE, then FoPE at 2L", LONGEST)),
            *ends(behind("RoPE, then FoPE at 2L", "RoPE, then YaRN at 2L", 2 * LENGTH)),
        ],
    ),
    Claim(
        "it does not differ significantly from RoPE that merely went on ({} ± {} below it at 16L)",
        lambda: ends(behind("RoPE, then RoPE at 2L", "RoPE, then YaRN 16 at 2L", LONGEST)),
    ),
    Claim(
        "than no extension at all ({} ± {} over RoPE alone, and {} ± {} over RoPE that merely went "
        "on at 2L)",
        lambda: [
            *ends(behind("RoPE, then YaRN at 2L", "RoPE", LONGEST)),
            *ends(behind("RoPE, then YaRN at 2L", "RoPE, then RoPE at 2L", LONGEST)),
        ],
    ),
    Claim(
        "RoPE that goes on at 2L as it is gains {} ± {} at 16L over RoPE alone",
        lambda: ends(behind("RoPE", "RoPE, then RoPE at 2L", LONGEST)),
    ),
    Claim(
        "over it FoPE gains {} ± {}",
        lambda: ends(behind("RoPE, then RoPE at 2L", "RoPE, then FoPE at 2L", LONGEST)),
    ),
    Claim(
        "FoPE is {} ± {} better than YaRN with factor 16 at 2L, and {} ± {} at 16L. With factor "
        "2 they cross: FoPE is better at 2L (by {} ± {}), YaRN at 16L (by {} ± {})",
        lambda: [
            *ends(behind("FoPE, then YaRN 16 at 2L", "FoPE, then FoPE at 2L", 2 * LENGTH)),
            *ends(behind("FoPE, then YaRN 16 at 2L", "FoPE, then FoPE at 2L", LONGEST)),
            *ends(behind("FoPE, then YaRN at 2L", "FoPE, then FoPE at 2L", 2 * LENGTH)),
            *ends(behind("FoPE, then FoPE at 2L", "FoPE, then YaRN at 2L", LONGEST)),
        ],
    ),
    Claim(
        "**In the paper's order** (factor 16 after the clip) YaRN and FoPE do not differ at 2L "
        "({} ± {}), and FoPE is ahead by {} ± {} at 8L and {} ± {} at 16L",
        lambda: [
            *ends(behind(AFTER_CLIP, "FoPE, then FoPE at 2L", 2 * LENGTH)),
            *ends(behind(AFTER_CLIP, "FoPE, then FoPE at 2L", 8 * LENGTH)),
            *ends(behind(AFTER_CLIP, "FoPE, then FoPE at 2L", LONGEST)),
        ],
    ),
    Claim(
        "A FoPE model that merely goes on, its floor where it was, does not differ from it at 2L "
        "({} ± {} behind) and is {} ± {} behind it at 16L",
        lambda: [
            *ends(behind("FoPE, then unchanged at 2L", "FoPE, then FoPE at 2L", 2 * LENGTH)),
            *ends(behind("FoPE, then unchanged at 2L", "FoPE, then FoPE at 2L", LONGEST)),
        ],
    ),
    Claim(
        "by {} ± {}, {} ± {} and {} ± {} at 4L, 8L and 16L (the texts",
        lambda: [end for times in (4, 8, 16) for end in ends(fope_on_news(times * LENGTH))],
    ),
    Claim(
        "{} of {} pairs differ significantly at 16L on web pages and {} on news",
        lambda: [significant_on("web"), len(at_the_longest()), significant_on("news")],
    ),
    Claim(
        "of the {} pairs at 16L it leaves out 0 for {} one by one and for {} when all are taken",
        lambda: [
            len(at_the_longest()),
            sum(interval(pair).leaves_out_zero for pair in at_the_longest().values()),
            holm_count(at_the_longest()),
        ],
    ),
)

PAGE = Page(
    path="experiments/extrapolation/README.md",
    claims=CLAIMS,
    tables=(Table(r"\| context \(tokens\) \| 128", by_row(cells)),),
    exempt={
        "settings": [
            "8 times the length it was stretched to",
            "(factor 16, no",
            "With factor 2 it ends",
            "With factor 16",
            "(factor 16 after the clip)",
            "YaRN with factor 16 is ahead of FoPE",
        ]
    },
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
)
