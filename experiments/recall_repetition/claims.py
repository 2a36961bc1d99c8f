"""Where the numbers of README.md come from; `python -m experiments.check recall_repetition`."""

from __future__ import annotations

from experiments.check.claims import Page

PAGE = Page(path="experiments/recall_repetition/README.md", exempt_sections={"": "settings"})
