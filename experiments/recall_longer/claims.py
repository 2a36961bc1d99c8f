"""Where the numbers of README.md come from; `python -m experiments.check recall_longer`."""

from __future__ import annotations

from experiments.check.claims import Page

PAGE = Page(
    path="experiments/recall_longer/README.md",
    exempt_sections={"": "settings, times and counts of runs; there are no results yet"},
)
