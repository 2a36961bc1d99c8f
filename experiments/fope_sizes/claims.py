"""Where the numbers of README.md come from; `python -m experiments.check fope_sizes`."""

from __future__ import annotations

from experiments.check.claims import Page

PAGE = Page(
    path="experiments/fope_sizes/README.md", exempt_sections={"": "settings, lengths and times"}
)
