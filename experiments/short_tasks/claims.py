"""Where the numbers of README.md come from; `python -m experiments.check short_tasks`."""

from __future__ import annotations

from experiments.check.claims import Claim, Expected, Page, Table, by_row
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


CLAIMS: tuple[Claim, ...] = ()

PAGE = Page(
    path="experiments/short_tasks/README.md",
    claims=CLAIMS,
    tables=(Table(r"\| \| piqa", by_row(cells)),),
    exempt={
        "settings and citations": (
            "4-bit weights",
            "`python -m experiments.short_tasks items",
            "0.4.13",
            "all 1,000 questions",
        )
    },
)
