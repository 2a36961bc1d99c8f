"""What a page's numbers are said to be: passages and tables that come from rows, and exemptions.

Each experiment has a `claims.py` with a `PAGE`. A number of the page that no claim, table or
exemption covers is an error, so that none is added unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Below:
    """For "below 2%": the number that stands there is above ``value``."""

    value: float


Number = float | Below
# What a cell holds: numbers in their order, exact text, or None for a label, which is not checked.
Expected = str | Number | Sequence[Number] | None


@dataclass(frozen=True)
class Claim:
    """A passage and its numbers.

    Attributes:
      text: as it stands on the page, once, with ``{}`` in place of each number that comes from
        rows; line breaks do not matter. Numbers that stand in ``text`` are settings.
      numbers: gives them in order; each is compared at the precision that stands on the page.
    """

    text: str
    numbers: Callable[[], Iterable[Number]]


@dataclass(frozen=True)
class TableText:
    """A Markdown table.

    Attributes:
      header, rows: cells, stripped.
      lines: line of the page of each row, from 1.
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]


@dataclass(frozen=True)
class Table:
    """A table whose cells come from rows.

    Attributes:
      header: regular expression that its header line matches from the start.
      cells: what the rows hold, cell by cell.
      is_optional: whether a page without such a table is right.
    """

    header: str
    cells: Callable[[TableText], Sequence[Sequence[Expected]]]
    is_optional: bool = False


def by_row(cells: Callable[[list[str], list[str]], Sequence[Expected]]) -> Callable:
    """``Table.cells`` from a function of the header and one row."""
    return lambda table: [cells(table.header, row) for row in table.rows]


@dataclass(frozen=True)
class Page:
    """A page and where all its numbers come from.

    Sections are named by their "## " title; ``""`` is what stands before the first of them.

    Attributes:
      path: from the root of the repository.
      claims, tables: compared with the rows.
      exempt: by reason, passages whose numbers are settings, citations or the like.
      exempt_sections: by title, the reason why a section's other numbers come from no rows.
      unchecked: by title, the reason why a section's other numbers are not checked here.
    """

    path: str
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    exempt: Mapping[str, Sequence[str]] = field(default_factory=dict)
    exempt_sections: Mapping[str, str] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
