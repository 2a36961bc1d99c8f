"""Where the numbers of README.md come from; `python -m experiments.check books_longer`."""

from __future__ import annotations

from experiments.check.claims import Page

PAGE = Page(
    path="experiments/books_longer/README.md",
    exempt_sections={"": "settings, times and counts of runs; there are no results yet"},
)
