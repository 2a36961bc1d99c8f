"""One self-contained HTML page of text, tables and figures; figures are also saved as files.

Figures of curves are live charts where scripts run, else and in print the picture.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.extras import require
from fope_jax.report import interactive
from fope_jax.report.charts import Chart
from fope_jax.report.plots import chart_figure, save_figure
from fope_jax.report.rows import ReportError
from fope_jax.report.styles import Style
from fope_jax.report.tables import Table
from fope_jax.storage.paths import local_path


class Note(str):
    """A paragraph in small print."""


class Bullets(tuple[str, ...]):
    """Sentences, one below the other."""


class Listing(str):
    """Preformatted text, such as JSON."""


class Picture(NamedTuple):
    """A figure, shown as SVG in the page and saved as ``stem.png`` and ``stem.svg``."""

    figure: Any
    stem: str
    alt: str
    caption: str
    live: Live | None = None


class Live(NamedTuple):
    """What the page needs to draw a chart itself."""

    keys: list[interactive.Key]
    specification: str


def chart_picture(
    chart: Chart, styles: Mapping[str, Style], stem: str, alt: str, caption: str
) -> Picture:
    """A chart as a picture, and live where scripts run."""
    specification = interactive.as_json(interactive.vega_lite(chart, styles))
    live = Live(interactive.keys(chart, styles), specification)
    return Picture(chart_figure(chart, styles), stem, alt, caption, live)


def live_by_context(charts: Mapping[int, Chart], styles: Mapping[str, Style]) -> Live:
    """The live form of a figure with a panel for each context length."""
    specification = interactive.vega_lite_by_context(charts, styles)
    return Live(interactive.keys(charts[max(charts)], styles), interactive.as_json(specification))


class Details(NamedTuple):
    summary: str
    parts: Sequence[Part]


class Section(NamedTuple):
    """Parts under a heading."""

    title: str
    parts: Sequence[Part]

    @property
    def id(self) -> str:
        """The anchor of its heading."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


Part = str | Note | Bullets | Listing | Table | Picture | Details | Section  # a str is a paragraph


def write_page(out: Path, title: str, parts: Sequence[Part], lead: Sequence[Part] = ()) -> Path:
    """Writes ``out/index.html`` and every figure; returns the path of the page.

    ``lead`` stands above the list of sections.
    """
    images, pictures = {}, list(_pictures(parts))
    for picture in pictures:
        _, svg = save_figure(picture.figure, out, picture.stem)
        images[picture.stem] = base64.b64encode(svg.read_bytes()).decode()
    sections = [part for part in parts if isinstance(part, Section)]
    page = out / "index.html"
    jinja2 = require("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        title=title,
        parts=parts,
        lead=lead,
        sections=sections,
        images=images,
        library=interactive.library() if any(picture.live for picture in pictures) else "",
    )
    page.write_text(text.lstrip(), encoding="utf-8")
    return page


def make_output(out: str | Path, what: str) -> Path:
    """Makes the directory ``out``; the ReportError where it cannot names ``out`` and ``what``."""
    require("jinja2", "train")  # fail before the long work
    try:
        path = local_path(out)
        path.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise ReportError(f"cannot write {what} to {error}") from error
    except OSError as error:
        raise ReportError(f"cannot write {what} to {out}: {error.strerror}") from error
    return path


def file_stem(name: str) -> str:
    """``name`` with every character but letters, digits, "_" and "-" replaced by "_"."""
    return re.sub(r"[^\w-]", "_", name)


def _pictures(parts: Sequence[Part]) -> Iterator[Picture]:
    for part in parts:
        if isinstance(part, Picture):
            yield part
        elif isinstance(part, Section | Details):
            yield from _pictures(part.parts)
