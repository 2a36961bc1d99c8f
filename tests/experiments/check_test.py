"""The numbers on the experiments' pages are those of the rows, and a changed one is found."""

import doctest
import re

import pytest

from experiments.check import __main__ as program
from experiments.check import compare, rows
from experiments.check.claims import Below, Claim, Page, Table, by_row
from experiments.check.compare import check_page

PAGES = {page.path: page for page in program.all_pages()}
ABLATIONS = PAGES["experiments/fope_ablations/README.md"]


@pytest.mark.parametrize("path", PAGES)
def test_every_number_on_a_page_is_that_of_the_rows(path):
    result = program.check(PAGES[path])
    assert result.problems == []
    assert result.compared or not PAGES[path].claims


@pytest.mark.parametrize("module", [compare, rows])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


def text_of(page):
    return (program.ROOT / page.path).read_text(encoding="utf-8")


def changed(old, new):
    """Problems of the ablations' page with one passage changed, and the line that it stands in."""
    text = text_of(ABLATIONS)
    assert text.count(old) == 1
    problems = check_page(ABLATIONS, text.replace(old, new)).problems
    return problems, text.count("\n", 0, text.index(old)) + 1


def test_a_changed_digit_in_a_sentence_is_found():
    problems, line = changed("RoPE's by 0.063 ± 0.105", "RoPE's by 0.064 ± 0.105")
    (problem,) = problems
    assert problem.startswith(f"{ABLATIONS.path}:{line}: 0.064 stands there, the rows give 0.063 (")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| D = 64 | 115.37 ± 0.79", "| D = 64 | 115.38 ± 0.79"),
        ("+0.339 ± 0.051 *", "+0.339 ± 0.051"),
        ("-0.097 ± 0.014 *", "+0.097 ± 0.014 *"),
    ],
)
def test_a_changed_cell_is_found(old, new):
    problems, line = changed(old, new)
    (problem,) = problems
    assert problem.startswith(f"{ABLATIONS.path}:{line}, column")
    was, now = (re.findall(r"[^|]+$", cell)[0].removeprefix(" D = 64 | ") for cell in (old, new))
    assert now.strip() in problem and was.strip() in problem


def test_a_number_that_nothing_covers_is_found():
    problems, line = changed("The floor, which both have,", "The floor, worth 0.123 nats,")
    (problem,) = problems
    assert problem.startswith(
        f"{ABLATIONS.path}:{line}: 0.123 has neither a claim nor an exemption"
    )


PAGE = Page(
    path="page.md",
    claims=[Claim("falls by {}, to below {}%", lambda: [0.25, Below(1.5)])],
    tables=[Table(r"\| name \|", by_row(lambda header, row: [None, (1.0, 2.0)]))],
    exempt={"settings": ["at 128 tokens"]},
    exempt_sections={"Time": "times"},
)
TEXT = """# Title
It falls by 0.25, to
below 2%, at 128 tokens of `code 7` in Figure 4.

| name | value |
|---|---|
| a 5 | 1.0 ± 2.0 |

## Time
7 hours
"""


def test_what_is_compared_and_what_is_exempt():
    result = check_page(PAGE, TEXT)
    assert result.problems == []
    assert result.compared == 4
    assert result.exempt == {"settings": 1, "times": 1, "code and links": 1, "the paper's parts": 1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25", "0.26", "page.md:2: 0.26 stands there, the rows give 0.25"),
        ("2%", "1%", "page.md:3: 1 stands there, the rows give 1.5, which is not below"),
        ("falls", "rises", "page.md: does not stand there: 'falls by {}, to below {}%'"),
        ("2.0", "2.1", "page.md:7, column 'value' of 'a 5': 2.1 stands there"),
        ("1.0 ± 2.0", "1.0", "'1.0' holds 1 numbers, the rows give 2"),
        ("| a 5 |", "| a | b |", "page.md:7: 3 cells stand there, the rows give 2"),
        ("| name |", "| names |", "page.md: no table has the header"),
        (
            "at 128 tokens",
            "at length",
            "page.md: exempt, but does not stand there: 'at 128 tokens'",
        ),
        ("## Time", "## Times", "page.md: there is no section 'Time'"),
        ("7 hours", "7 hours\n## More\n8 hours", "page.md:12: 8 has neither a claim nor"),
    ],
)
def test_what_does_not_agree_is_named_with_its_line(old, new, message):
    problems = check_page(PAGE, TEXT.replace(old, new)).problems
    assert any(message in problem for problem in problems), problems


def test_the_status_says_whether_all_agrees(capsys, monkeypatch):
    assert program.main(["fope_ablations"]) == 0
    assert re.match(rf"{ABLATIONS.path}: \d+ compared", capsys.readouterr().out)
    text = text_of(ABLATIONS).replace("94.90 ± 1.02", "94.91 ± 1.02", 1)
    monkeypatch.setattr(program, "check", lambda page: check_page(page, text))
    assert program.main(["fope_ablations"]) == 1
    assert "1 problems" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["unknown"])
    assert "experiments/unknown/README.md has no claims" in capsys.readouterr().err
