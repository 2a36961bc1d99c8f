"""Where the numbers of README.md come from; `python -m experiments.check passkey`."""

from __future__ import annotations

from experiments.check.claims import Page, Table, by_row
from experiments.check.rows import late_loss

AFTER = 1_200  # updates of 1,500, whose losses choose no rate
METHODS = {"RoPE": "rope", "FoPE": "fope", "floor alone": "floor", "ALiBi": "alibi", "NoPE": "nope"}


def rates(header: list[str], row: list[str]) -> list:
    """Nats per token of the training batches of the last 300 updates, by learning rate."""
    name = METHODS[row[0]]
    files = (f"passkey/rates/passkey_{name}-{float(column):g}.jsonl" for column in header[1:])
    return [None, *(late_loss(file, AFTER) for file in files)]


PAGE = Page(
    path="experiments/passkey/README.md",
    tables=(Table(r"\|  \| 0.0025", by_row(rates), is_optional=True),),
    exempt_sections={"": "settings, times and one run that is not kept", "Rates": "settings"},
)
