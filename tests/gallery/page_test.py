"""The gallery's page and figures, from rows that no model made."""

import json
import math
import re

import pytest

from fope_jax.gallery.page import alt_text, method_figure, overview_figure, write_gallery
from fope_jax.report.rows import ReportError

LENGTH, REACH = 16, 4


def make_row(label="turning", **changes):
    values = [4 * math.cos(d / 3) for d in range(REACH * LENGTH + 1)]
    row = {
        "label": label,
        "method": "rope",
        "kind": "rotation",
        "summary": "RoPE(theta=<5>)",
        "training_length": LENGTH,
        "reach": REACH,
        "quantity": "logits",
        "note": "exact",
        "lines": [{"label": "all heads", "value": values}],
        "frequencies": [{"label": "fixed", "values": [1.0, 0.1, 0.0, 0.0]}],
        "parameters": [],
        "others": [],
    }
    return row | changes


ALIBI = make_row(
    "penalty",
    lines=[
        {"label": f"head {n}", "value": [-s * d for d in range(65)]}
        for n, s in ((1, 0.5), (2, 0.01))
    ],
    frequencies=[],
    parameters=[{"label": "slopes", "values": [0.5, 0.01]}],
)
FLAT = make_row(
    "flat/one",
    lines=[{"label": "all heads", "value": [8.0] * 65}],
    frequencies=[],
    others=["table: 2 x 2, 0 ± 1"],
)
RANGED = make_row(
    "ranged",
    lines=[
        {
            "label": "mean over heads",
            "value": [1.0] * 5 + [3.0] * 60,
            "low": [0.0] * 65,
            "high": [4.0] * 65,
        }
    ],
)


def test_the_page_holds_every_method_and_needs_no_network(tmp_path):
    page = write_gallery([make_row(), ALIBI, FLAT, RANGED], tmp_path / "new" / "gallery")
    text = page.read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Overview",
        "turning",
        "penalty",
        "flat/one",
        "ranged",
    ]
    assert text.count('<img src="data:image/svg+xml;base64,') == 5
    assert not re.search(r'(src|href)="https?:', text)
    assert "RoPE(theta=&lt;5&gt;)" in text and "table: 2 x 2" in text
    for stem in ("overview", "turning", "penalty", "flat_one", "ranged"):
        assert (page.parent / f"{stem}.png").stat().st_size > 5_000
        assert (page.parent / f"{stem}.svg").exists()
    assert json.loads((page.parent / "gallery.json").read_text())[1] == ALIBI


def test_the_same_rows_give_the_same_bytes(undrawn, tmp_path):
    first, second = (write_gallery([make_row(), ALIBI], tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_text_alternative_has_the_numbers():
    words = alt_text(make_row())
    assert f"all heads: 4.00 at 0, {4 * math.cos(16 / 3):.2f} at 16" in words
    assert "2 frequencies (fixed), 2 at zero" in words
    short = make_row(lines=[{"label": "table", "value": [1.0, 0.5]}])
    assert "table: 1.00 at 0, 0.50 at 1;" in alt_text(short)


def test_axes_say_what_and_in_which_unit():
    left, right = method_figure(make_row()).axes
    assert left.get_xlabel() == "distance from query to key (tokens)"
    assert left.get_ylabel() == "logits"
    assert right.get_ylabel() == "period (tokens)"
    marks = [line.get_xdata()[0] for line in left.lines if len(set(line.get_xdata())) == 1]
    assert marks == [LENGTH]


def test_zero_frequencies_are_shown_as_such_and_lines_differ_without_colour():
    _, right = method_figure(make_row()).axes
    still = next(line for line in right.lines if line.get_label() == "never turns (2)")
    assert list(still.get_xdata()) == [2, 3] and still.get_marker() == "x"
    assert min(still.get_ydata()) > max(2 * math.pi / 0.1, LENGTH)
    left, slopes = method_figure(ALIBI).axes
    heads = [line for line in left.lines if line.get_label().startswith("head")]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in heads}) == 2
    assert list(slopes.lines[0].get_ydata()) == [0.5, 0.01]
    assert slopes.get_yscale() == "log"


def test_a_flat_line_does_not_look_like_noise_and_an_early_one_gets_room():
    left, right = method_figure(FLAT).axes
    assert left.get_ylim() == (0, 12)
    assert "table: 2 x 2" in right.texts[0].get_text()
    assert method_figure(RANGED).axes[0].get_xscale() == "symlog"
    assert method_figure(make_row()).axes[0].get_xscale() == "linear"


def test_the_overview_has_a_panel_for_each_method():
    panels = overview_figure([make_row(), ALIBI, FLAT, RANGED, make_row("last")]).axes
    assert [axes.get_title() for axes in panels][:5] == [
        "turning",
        "penalty",
        "flat/one",
        "ranged",
        "last",
    ]
    assert [axes.axison for axes in panels] == [True] * 5 + [False] * 3


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write the gallery to .*file/x: Not a directory"):
        write_gallery([make_row()], tmp_path / "file" / "x")
