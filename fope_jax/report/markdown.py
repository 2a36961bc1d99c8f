"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table, a line a row; a bar inside a cell, which would end it, is escaped.

    >>> print(markdown_table(["method", "|q|"], [["rope", "1.5"]]))
    | method | \|q\| |
    | --- | --- |
    | rope | 1.5 |
    """
    lines = [header, ["---"] * len(header), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells)
