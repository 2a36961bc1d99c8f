"""The account of a run's time."""

import pytest

from fope_jax.report.goodput import goodput_table, seconds_by_phase
from fope_jax.report.page import write_report
from fope_jax.report.rows import read_run

pytestmark = pytest.mark.usefixtures("undrawn")

SECONDS = [
    ("start", 4.0),
    ("compile", 6.0),
    ("data", 1.0),
    ("step", 50.0),
    ("save", 2.0),
    ("lost", 5.0),
    ("start", 3.0),
    ("restore", 1.0),
    ("compile", 4.0),
    ("step", 20.0),
    ("evaluate: restore", 1.0),
    ("evaluate same-tokens (validation)", 3.0),
]


@pytest.fixture
def run(make_run, synthetic):
    rows = [row for row in synthetic.rows_of("rope", 0) if row["kind"] != "time"]
    times = [
        {"kind": "time", "phase": phase, "step": 10, "seconds": seconds}
        for phase, seconds in SECONDS
    ]
    return make_run("rope", rows=[*rows, *times])


def test_phases_add_up_over_all_starts_of_a_run(run):
    seconds = seconds_by_phase(read_run(run))
    assert seconds == {
        "start": 7.0,
        "compile": 10.0,
        "data": 1.0,
        "step": 70.0,
        "save": 2.0,
        "lost": 5.0,
        "restore": 1.0,
        "evaluation": 4.0,
    }
    table = goodput_table([read_run(run)])
    assert table.columns == [
        "start",
        "compile",
        "restore",
        "data",
        "step",
        "save",
        "evaluation",
        "lost",
        "total",
        "goodput",
    ]
    ((title, cells),) = table.rows
    assert title == "rope"
    assert cells[4] == "70.0 (70.0%)"
    assert cells[-2:] == ["100.0", "70.0%"]


@pytest.mark.slow
def test_a_run_without_an_account_is_left_out_and_the_page_has_a_section(run, make_run, tmp_path):
    old = make_run("fope")  # of before: the time of its compilation alone
    table = goodput_table([read_run(old), read_run(run)])
    assert [title for title, _ in table.rows] == ["rope"]
    page = write_report([old, run], tmp_path / "report").read_text()
    assert "<summary>Where the time went" in page and "70.0 (70.0%)" in page
    assert "<h2>Time</h2>" not in write_report([old], tmp_path / "other").read_text()
