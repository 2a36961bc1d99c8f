"""The table of methods, for the terminal and as Markdown in the documentation."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fope_jax.gallery.catalogue import Entry, knobs
from fope_jax.position.checks import find
from fope_jax.position.registry import METHODS, SCALINGS
from fope_jax.report.markdown import markdown_table

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
WIDTH = 96  # characters of a line in the terminal


class MarkersError(ValueError):
    """A file without valid markers for the tables."""


def methods_text(methods: Sequence[Entry], scalings: Sequence[Entry]) -> str:
    """Both tables for the terminal, one paragraph per entry, nothing cut off."""
    lines = ["Methods (--config.position.method=NAME)", ""]
    for entry in methods:
        fields = {
            "kind": entry.kind,
            "knobs": ", ".join(entry.knobs) or "none",
            "learnable": entry.learnable,
            "beyond training": entry.extends,
            "source": entry.source,
        }
        lines += [*_paragraph(entry, fields), ""]
    lines += ["Scalings of rotary frequencies (the knob scaling of rope and fope)", ""]
    for entry in scalings:
        fields = {"knobs": ", ".join(entry.knobs) or "none", "source": entry.source}
        lines += [*_paragraph(entry, fields), ""]
    return "\n".join(lines).rstrip()


def describe(names: Sequence[str]) -> str:
    """What the docstrings say of methods and scalings: equations, knobs and source.

    Raises:
      ValueError: a name is unknown.
    """
    parts = []
    for name in names:
        cls = find("method or scaling", name, METHODS | SCALINGS)
        where = "method" if name in METHODS else "scaling"
        given = ", ".join(knobs(cls)) or "no knobs"
        parts.append(f"{name}, a {where}: {given}\n\n{inspect.getdoc(cls)}")
    return "\n\n\n".join(parts)


def _paragraph(entry: Entry, fields: dict[str, str]) -> list[str]:
    lines, indent = [f"{entry.name}: {entry.about}"], " " * 18
    for name, text in fields.items():
        field = f"  {name:16}{text}"
        lines += textwrap.wrap(field, WIDTH, subsequent_indent=indent)
    return lines


def methods_markdown(methods: Sequence[Entry], scalings: Sequence[Entry]) -> str:
    """Both tables as markdown."""

    def code(knobs: Sequence[str]) -> str:
        return " ".join(f"`{knob}`" for knob in knobs) or "none"

    of_methods = markdown_table(
        ["method", "kind", "knobs", "learnable", "beyond training", "source"],
        (
            [
                f"`{e.name}`",
                e.kind,
                code(e.knobs),
                e.learnable.replace("learnable=True", "`learnable=True`"),
                e.extends,
                e.source,
            ]
            for e in methods
        ),
    )
    of_scalings = markdown_table(
        ["scaling", "what it does", "knobs", "source"],
        ([f"`{e.name}`", e.about, code(e.knobs), e.source] for e in scalings),
    )
    between = "Scalings of the frequencies, in the knob `scaling` of `rope` and `fope`:"
    return "\n\n".join([of_methods, between, of_scalings])


def between_markers(text: str, name: str = "text") -> str:
    """The text between the markers; MarkersError unless each is there once, in order.

    >>> between_markers(f"above\\n{BEGIN}\\nold\\n{END}\\nbelow")
    'old'
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkersError(
            f"{name}: the tables of methods go between one line {BEGIN!r} and, after it, one line "
            f"{END!r}"
        )
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def write_between_markers(path: Path, markdown: str) -> bool:
    """Puts ``markdown`` between the file's markers; returns whether the file changed.

    Raises MarkersError, leaving the file unchanged, or OSError.
    """
    if not path.is_file():
        raise MarkersError(
            f"{path} is no file; the tables are written into one between {BEGIN} and {END}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MarkersError(f"{path} is no text in UTF-8: {error}") from error
    old = between_markers(text, str(path))
    if old == markdown:
        return False
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n{markdown}\n{END}{tail}", encoding="utf-8")
    return True
