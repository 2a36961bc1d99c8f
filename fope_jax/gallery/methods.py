"""The table of methods: in the terminal, and as the markdown that stands in the README."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
COMMAND = "fope methods --write"
WIDTH = 96  # characters of a line in the terminal


class MarkersError(ValueError):
    """A file that does not say where the tables go."""


def methods_text(methods: Sequence[Any], scalings: Sequence[Any]) -> str:
    """Both tables for the terminal: a paragraph for each entry, so that nothing is cut.

    Args:
      methods: entries with ``name kind knobs learnable extends about source``, see
        ``fope_jax.gallery.catalogue``.
      scalings: the same, of the scalings of rotary frequencies.
    """
    lines = ["Methods (--config.position.method=NAME)", ""]
    for entry in methods:
        lines += [
            f"{entry.name}: {entry.about}",
            *_item("kind", entry.kind),
            *_item("knobs", ", ".join(entry.knobs) or "none"),
            *_item("learnable", entry.learnable),
            *_item("beyond training", entry.extends),
            *_item("source", entry.source),
            "",
        ]
    lines += ["Scalings of rotary frequencies (the knob scaling of rope and fope)", ""]
    for entry in scalings:
        lines += [
            f"{entry.name}: {entry.about}",
            *_item("knobs", ", ".join(entry.knobs) or "none"),
            *_item("source", entry.source),
            "",
        ]
    return "\n".join(lines).rstrip()


def _item(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name:16}{text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 18)


def methods_markdown(methods: Sequence[Any], scalings: Sequence[Any]) -> str:
    """Both tables as markdown; arguments as for ``methods_text``."""
    columns = ["method", "kind", "knobs", "learnable", "beyond training", "source"]
    rows = [
        [f"`{e.name}`", e.kind, _code(e.knobs), _short(e.learnable), e.extends, e.source]
        for e in methods
    ]
    steps = [[f"`{e.name}`", e.about, _code(e.knobs), e.source] for e in scalings]
    return "\n\n".join(
        [
            _markdown(columns, rows),
            "Scalings of the frequencies, in the knob `scaling` of `rope` and `fope`:",
            _markdown(["scaling", "what it does", "knobs", "source"], steps),
        ]
    )


def _short(learnable: str) -> str:
    """Code font for the knob in ``with learnable=True``."""
    head, equals, value = learnable.rpartition("learnable=")
    return f"{head}`{equals}{value}`" if equals else learnable


def _code(knobs: Sequence[str]) -> str:
    return " ".join(f"`{knob}`" for knob in knobs) or "none"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    bar = "\\|"  # a bar inside a cell would end it
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [" | ".join(cell.replace("|", bar) for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in cells)


def between_markers(text: str, name: str = "text") -> str:
    """What stands between the markers.

    >>> between_markers(f"above\\n{BEGIN}\\nold\\n{END}\\nbelow")
    'old'

    Raises:
      MarkersError: the markers are not there, or not once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkersError(
            f"{name}: the tables of methods go between one line {BEGIN!r} and, after it, one line "
            f"{END!r}"
        )
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def write_between_markers(path: Path, markdown: str) -> bool:
    """Puts ``markdown`` between the markers of the file; returns whether that changed it.

    Raises:
      MarkersError: see ``between_markers``; the file is left as it is.
      OSError: the file cannot be read or written.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MarkersError(f"{path} is no text in UTF-8: {error}") from error
    if between_markers(text, str(path)) == markdown:
        return False
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n{markdown}\n{END}{tail}", encoding="utf-8")
    return True
