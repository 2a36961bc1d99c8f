"""Where the numbers of README.md come from; `python -m experiments.check short_tasks`."""

from __future__ import annotations

from experiments.check.claims import Claim, Expected, Page, Table, by_row
from experiments.pretrained import claims as pretrained
from experiments.pretrained.units import NAMES, UPDATES
from experiments.short_tasks.tables import METRICS, answers, difference, joined, share

TRAINED = ", trained"
BASELINE = ("rope", 0)


def model(label: str) -> tuple[str, int]:
    """Method and updates of a row's label."""
    name = label.removesuffix(TRAINED)
    return NAMES[name], UPDATES if name != label else 0


def cells(header: list[str], row: list[str]) -> list[Expected]:
    sets = answers()[model(row[0])]
    whole, away = share(joined(sets)), of(row[0])
    of_sets = [share(sets[name]).points for name in METRICS]
    return [None, *of_sets, whole, "" if model(row[0]) == BASELINE else away]


def of(label: str, other: str = "RoPE", name: str = "") -> tuple[float, float]:
    """Points of a model above another one on all questions, or on those of one set."""
    ours, theirs = answers()[model(label)], answers()[model(other)]
    return (
        difference(ours[name], theirs[name]) if name else difference(joined(ours), joined(theirs))
    )


def changed(label: str) -> tuple[int, int]:
    """How many questions one of it and RoPE has right and the other wrong; how many of them it."""
    ours, theirs = joined(answers()[model(label)]), joined(answers()[BASELINE])
    return int((ours != theirs).sum()), int((ours & ~theirs).sum())


FOPE, YARN = "FoPE, floor of 8,192", "YaRN"
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
    tables=(Table(r"\|  \| piqa", by_row(cells)),),
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
