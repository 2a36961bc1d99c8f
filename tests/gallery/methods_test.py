"""The table of methods: current in docs/, read off the code, and written where it belongs."""

from pathlib import Path
from typing import NamedTuple

import pytest

from fope_jax.gallery.catalogue import method_entries, scaling_entries
from fope_jax.gallery.methods import (
    BEGIN,
    END,
    MarkersError,
    between_markers,
    methods_markdown,
    methods_text,
    write_between_markers,
)

PAGE = Path(__file__).parents[2] / "docs/methods/index.md"


class Entry(NamedTuple):
    name: str = "sliding"
    kind: str = "bias"
    knobs: tuple = ("width", "scale=2", "form='a|b'")
    learnable: str = "with learnable=True"
    extends: str = "yes"
    about: str = "Slides"
    source: str = 'Someone 2020, "A | B", Eq. 1'


def cells(line):
    return [cell.strip() for cell in line.replace(r"\|", "!").strip("|").split("|")]


def test_the_page_of_methods_is_current():
    shown = between_markers(PAGE.read_text(encoding="utf-8"), PAGE.name)
    current = methods_markdown(method_entries(), scaling_entries())
    assert shown == current, "run: fope methods --write docs/methods/index.md"


def test_markdown_has_one_row_of_as_many_cells_as_heads():
    lines = methods_markdown([Entry(), Entry(name="other", knobs=())], [Entry()]).splitlines()
    head, rule, first, second = (cells(line) for line in lines[:4])
    assert len(head) == len(rule) == len(first) == len(second) == 6
    assert first[:2] == ["`sliding`", "bias"]
    assert first[2] == "`width` `scale=2` `form='a!b'`"
    assert first[3] == "with `learnable=True`"
    assert second[2] == "none"
    assert cells(lines[-1])[:2] == ["`sliding`", "Slides"]


def test_text_loses_nothing():
    knobs = tuple(f"a_long_name_of_a_knob_{n}={n}" for n in range(20))
    text = methods_text([Entry(knobs=knobs)], [Entry(name="stretch")])
    assert all(f"{knob}" in text for knob in knobs)
    assert max(map(len, text.splitlines())) <= 96
    assert "sliding: Slides" in text and "stretch: Slides" in text


def test_only_what_stands_between_the_markers_changes(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert write_between_markers(path, "new\nlines")
    assert path.read_text() == f"above\n{BEGIN}\nnew\nlines\n{END}\nbelow\n"
    assert not write_between_markers(path, "new\nlines")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(MarkersError, match="nothing.md is no file; the tables are written into"):
        write_between_markers(tmp_path / "nothing.md", "new")


@pytest.mark.parametrize(
    "text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}\n{END}"]
)
def test_a_file_without_its_markers_is_left_alone(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(MarkersError) as caught:
        write_between_markers(path, "new")
    assert str(path) in str(caught.value)
    assert BEGIN in str(caught.value) and END in str(caught.value)
    assert path.read_text() == text
