"""Finds the numbers of a page, and compares those that are claimed with the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.check.claims import Below, Claim, Expected, Number, Page, Table, TableText

_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}(?:e-?\d+)?")
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)

# Never results, on any page.
CODE = (_FENCE, re.compile(r"`[^`\n]*`"))
LINKS = (re.compile(r"!\[[^\]]*\]\([^)]*\)"), re.compile(r"\]\([^)\s]*\)"))
EXEMPT = {
    "code and links": (*CODE, *LINKS),
    "lengths": tuple(map(re.compile, (r"\b\d+(?:\.\d+)?L\b", r"L = \d+", r"2 pi / [\d,]+"))),
    "sizes and slices": (re.compile(r"\b\d+x\d+(?:x\d+)?\b"), re.compile(r"\b\d+m\b")),
    "names": (re.compile(r"\b(?:SmolLM2?|Llama)[- ][\w.]*\d[\w.]*(?:-\w+)?"),),
    "the paper's parts": (
        re.compile(r"\b(?:[Ff]igures?|[Tt]ables?|Section|[Ee]quations?) \d+\w?"),
        re.compile(r"et al\.,?\s+(?:ICML\s+)?\d{4}"),
    ),
    "level of intervals": (re.compile(r"\b95%(?=\s+(?:confidence\s+)?intervals?)|at 95%"),),
    "commits": (re.compile(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,40}\b"),),
}


# What functions of claims raise where rows are missing, or say something else in words.
WITHOUT_NUMBERS = (LookupError, ValueError, AssertionError)


class Span(NamedTuple):
    start: int
    stop: int
    reason: str  # "" where the rows were compared


@dataclass
class Result:
    """What was found on a page.

    Attributes:
      problems: one line each, with file and line.
      compared: numbers and words of cells that were compared with rows.
      exempt: how many numbers were not, by reason.
      unchecked: titles of sections with numbers that are not checked, and why.
    """

    problems: list[str] = field(default_factory=list)
    compared: int = 0
    exempt: Counter[str] = field(default_factory=Counter)
    unchecked: dict[str, str] = field(default_factory=dict)


def check_page(page: Page, text: str) -> Result:
    """Compares what is claimed, and lists numbers that have neither a claim nor an exemption."""
    result, spans = Result(), []
    for claim in page.claims:
        spans += _check_claim(page, claim, text, result)
    tables = list(find_tables(text))
    for table in page.tables:
        spans += _check_tables(page, table, tables, text, result)
    for reason, passages in page.exempt.items():
        for passage in passages:
            matches = list(_pattern(passage).finditer(text))
            spans += [Span(*match.span(), reason) for match in matches]
            if not matches:
                result.problems.append(
                    f"{page.path}: exempt, but does not stand there: {passage!r}"
                )
    for reason, patterns in EXEMPT.items():
        spans += [Span(*m.span(), reason) for p in patterns for m in p.finditer(text)]
    _check_coverage(page, text, spans, result)
    return result


# ---------------------------------------------------------------------------- passages


def _pattern(passage: str) -> re.Pattern[str]:
    """A passage with any white space, a number in place of each ``{}``."""
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in passage.split("{}")]
    return re.compile(f"({_NUMBER})".join(parts))


def _check_claim(page: Page, claim: Claim, text: str, result: Result) -> list[Span]:
    matches = list(_pattern(claim.text).finditer(text))
    if len(matches) != 1:
        found = "does not stand there" if not matches else f"stands there {len(matches)} times"
        result.problems.append(f"{page.path}: {found}: {claim.text!r}")
        return []
    (match,) = matches
    try:
        numbers, shown = list(claim.numbers()), match.groups()
    except WITHOUT_NUMBERS as error:
        where = f"{page.path}:{line_of(text, match.start())}"
        result.problems.append(f"{where}: no numbers for {claim.text!r}: {error}")
        return [Span(*match.span(), "")]
    if len(numbers) != len(shown):
        result.problems.append(
            f"{page.path}:{line_of(text, match.start())}: {len(shown)} numbers stand in "
            f"{claim.text!r}, its claim gives {len(numbers)}"
        )
        return []
    for index, (stated, number) in enumerate(zip(shown, numbers, strict=True), start=1):
        result.compared += 1
        if not agrees(stated, number):
            where = f"{page.path}:{line_of(text, match.start(index))}"
            result.problems.append(_differs(where, stated, number, claim.text))
    return [Span(*match.span(), "")]


def agrees(stated: str, number: Number) -> bool:
    """Whether a number from rows is the stated one, to the precision that it stands with.

    >>> agrees("0.19", 0.1949), agrees("0.19", 0.1951), agrees("1,024", 1024)
    (True, False, True)
    """
    value = float(stated.replace(",", ""))
    if isinstance(number, Below):
        return number.value < value
    return abs(value - number) <= 0.5 * 10.0 ** -_decimals(stated) * (1 + 1e-6)


def _decimals(stated: str) -> int:
    return len(stated.partition(".")[2])


def _differs(where: str, stated: str, number: Number, passage: str) -> str:
    if isinstance(number, Below):
        given = f"{number.value:.6g}, which is not below"
    else:
        sign = "+" if stated.startswith("+") else ""
        given = f"{number:{sign},.{_decimals(stated)}f} ({number:.6g})"
    return f"{where}: {stated} stands there, the rows give {given}, in {passage!r}"


# ---------------------------------------------------------------------------- tables


def find_tables(text: str) -> Iterator[TableText]:
    """The Markdown tables of a text, without those in fenced code."""
    block: list[tuple[int, list[str]]] = []
    lines = blank(text, [match.span() for match in _FENCE.finditer(text)]).splitlines()
    for number, line in enumerate([*lines, ""], start=1):
        if line.startswith("|"):
            block.append((number, [cell.strip() for cell in line.strip().strip("|").split("|")]))
        elif block:
            if len(block) > 2:
                (_, header), _, *rows = block
                yield TableText(header, [cells for _, cells in rows], [at for at, _ in rows])
            block = []


def _check_tables(
    page: Page, table: Table, tables: Sequence[TableText], text: str, result: Result
) -> list[Span]:
    pattern = re.compile(table.header)
    matching = [each for each in tables if pattern.match(f"| {' | '.join(each.header)} |")]
    if not matching and not table.is_optional:
        result.problems.append(f"{page.path}: no table has the header {table.header!r}")
    starts = line_starts(text)
    spans = []
    for each in matching:
        spans.append(Span(starts[each.lines[0] - 3], starts[each.lines[-1]], ""))
        try:
            given_rows = table.cells(each)
        except WITHOUT_NUMBERS as error:
            where = f"{page.path}:{each.lines[0]}"
            result.problems.append(f"{where}: no cells for the table {each.header}: {error}")
            continue
        for cells, line, expected in zip(each.rows, each.lines, given_rows, strict=True):
            where = f"{page.path}:{line}"
            if len(cells) != len(expected):
                result.problems.append(
                    f"{where}: {len(cells)} cells stand there, the rows give {len(expected)}"
                )
                continue
            for name, cell, given in zip(each.header, cells, expected, strict=True):
                _check_cell(f"{where}, column {name!r} of {cells[0]!r}", cell, given, result)
    return spans


def _check_cell(where: str, cell: str, given: Expected, result: Result) -> None:
    if given is None:
        return
    if isinstance(given, str):
        result.compared += 1
        if cell != given:
            result.problems.append(f"{where}: {cell!r} stands there, the rows give {given!r}")
        return
    numbers = [given] if isinstance(given, Below | int | float) else list(given)
    shown = NUMBER.findall(cell)
    if len(shown) != len(numbers):
        result.problems.append(
            f"{where}: {cell!r} holds {len(shown)} numbers, the rows give {len(numbers)}"
        )
        return
    for stated, number in zip(shown, numbers, strict=True):
        result.compared += 1
        if not agrees(stated, number):
            result.problems.append(_differs(where, stated, number, cell))


# ---------------------------------------------------------------------------- coverage


def _check_coverage(page: Page, text: str, spans: Sequence[Span], result: Result) -> None:
    sections = list(find_sections(text))
    titles = {title for title, *_ in sections}
    for title in {*page.exempt_sections, *page.unchecked} - titles:
        result.problems.append(f"{page.path}: there is no section {title!r}")
    for title, start, stop in sections:
        for match in NUMBER.finditer(text, start, stop):
            covering = [span for span in spans if span.start <= match.start() < span.stop]
            if any(not span.reason for span in covering):
                continue
            if covering:
                result.exempt[covering[0].reason] += 1
            elif title in page.exempt_sections:
                result.exempt[page.exempt_sections[title]] += 1
            elif title in page.unchecked:
                result.unchecked[title] = page.unchecked[title]
            else:
                around = " ".join(text[max(0, match.start() - 50) : match.end() + 30].split())
                result.problems.append(
                    f"{page.path}:{line_of(text, match.start())}: {match[0]} has neither a claim "
                    f"nor an exemption: {around!r}"
                )


def find_sections(text: str) -> Iterator[tuple[str, int, int]]:
    """Title, start and end of what stands before the first "## " line, and under each.

    >>> [title for title, *_ in find_sections("# A\\nb\\n## C\\nd\\n## E\\n")]
    ['', 'C', 'E']
    """
    plain = blank(text, [match.span() for match in _FENCE.finditer(text)])
    title, start = "", 0
    for match in re.finditer(r"^## (.*)$", plain, flags=re.MULTILINE):
        yield title, start, match.start()
        title, start = match[1].strip(), match.start()
    yield title, start, len(text)


def blank(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Spaces in place of spans; lines stay where they are."""
    for start, stop in spans:
        text = text[:start] + re.sub(r"[^\n]", " ", text[start:stop]) + text[stop:]
    return text


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def line_starts(text: str) -> list[int]:
    """Offset of each line, and the end."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts
