"""Where the numbers of README.md come from; `python -m experiments.check short_tasks`."""

from __future__ import annotations

from experiments.check.claims import Claim, Expected, Page, Table, TableText
from experiments.check.compare import find_tables
from experiments.pretrained import claims as pretrained
from experiments.short_tasks.tables import BASELINE, all_tables, answers, difference, joined, share

FOPE, YARN = ("fope", 0), ("yarn", 0)


def printed_cells(table: TableText) -> list[list[Expected]]:
    """As `python -m experiments.short_tasks tables` prints them."""
    (printed,) = find_tables(all_tables())
    rows = {label: cells for label, *cells in printed.rows}
    return [[None, *rows[label]] for label, *_ in table.rows]


def of(model: tuple[str, int]) -> tuple[float, float]:
    """Points of a model above RoPE as it was published, on all questions."""
    return difference(*(joined(answers()[each]) for each in (model, BASELINE)))


def changed(model: tuple[str, int]) -> tuple[int, int]:
    """How many questions one of it and RoPE has right and the other wrong; how many of them it."""
    ours, theirs = (joined(answers()[each]) for each in (model, BASELINE))
    return int((ours != theirs).sum()), int((ours & ~theirs).sum())


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "answers {} ± {} points more than its own RoPE, YaRN with factor 2 answers {} ± {} more",
        lambda: [*of(FOPE), *of(YARN)],
    ),
    Claim(
        "costs {} nats a token at 6 to 8 k of a book ([pretrained](../pretrained/README.md)) and "
        "{} within the first 2 k",
        lambda: [
            pretrained.at("fope", begin, begin + 2) - pretrained.at("rope", begin, begin + 2)
            for begin in (6, 0)
        ],
    ),
    Claim("{} change between right and wrong, {} of them to right", lambda: changed(FOPE)),
    Claim(
        "they are {} ± {}, {} ± {} and {} ± {}%",
        lambda: [
            x
            for name in ("arc_easy", "hellaswag", "piqa")
            for x in share(answers()[BASELINE][name])
        ],
    ),
)

PAGE = Page(
    path="experiments/short_tasks/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|  \| piqa", printed_cells),),
    exempt={
        "settings": (
            "No difference that 1,000 questions can show",
            "of 1,000 questions",
            "YaRN\nwith factor 2",
            "250 questions of each set",
            "turns less than once in\n  8,192",
            "in 16 bits, 54.1%",
            "here, in 4 bits",
            "(commit 741bef0, 2026-12-01)",
            "sigma 0.3",
        ),
        "of the questions' tokens, counted once": ("have 158 tokens at most",),
        "the model card's numbers": ("54.1% of arc_easy, 43.0% of hellaswag and 66.9% of piqa",),
        "the floors of models": ("floor of 8,192 tokens", "the floor of 2,048 among them"),
    },
    exempt_sections={"": "settings", "What this cannot show": "settings"},
)
