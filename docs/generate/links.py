"""Links between Markdown files of the repository, and from them to pages of the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!!)(?P<text>\[[^\]\n]*\])\((?P<target>[^)\s]+)\)")
_IMAGE = re.compile(r"!\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)


class Link(NamedTuple):
    target: str  # as written, without the anchor
    anchor: str
    is_image: bool


def included_pages() -> dict[str, str]:
    """Markdown files outside docs/ that are pages of the site: ``{file: page}``."""
    pages = {
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
        "benchmarks/README.md": "findings/benchmarks.md",
        "experiments/README.md": "findings/experiments.md",
        "tpu_scripts/README.md": "howto/tpu_scripts.md",
    }
    for path in sorted(ROOT.glob("experiments/*/README.md")):
        pages[path.relative_to(ROOT).as_posix()] = f"findings/{path.parent.name}.md"
    return pages


def site_files() -> dict[str, str]:
    """Every file of the repository that has a place on the site: ``{file: place}``."""
    files = {
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    for path in sorted(ROOT.glob("experiments/*/figures/*")):
        file = path.relative_to(ROOT).as_posix()
        files[file] = f"findings/figures/{path.parts[-3]}/{path.name}"
    return files | included_pages() | {"README.md": "index.md"}


def links(markdown: str) -> Iterator[Link]:
    """The relative links and images of a text, without those in code.

    >>> found = links("[a](b.md#c), [d](https://example.org) ![f](g.png)")
    >>> [(link.target, link.anchor) for link in found]
    [('b.md', 'c'), ('g.png', '')]
    """
    text = _FENCE.sub("", markdown)
    for pattern in (_LINK, _IMAGE):
        for match in pattern.finditer(text):
            target, _, anchor = match["target"].partition("#")
            if not is_external(target):
                yield Link(target, anchor, pattern is _IMAGE)


def is_external(target: str) -> bool:
    return "://" in target or target.startswith("mailto:")


def anchors(markdown: str) -> set[str]:
    """The anchors of a text's headings, as the site and code hosts form them.

    >>> sorted(anchors("# Many devices\\n## `fope plan`: will it fit?\\n"))
    ['fope-plan-will-it-fit', 'many-devices']
    """
    headings = re.findall(r"^#+ +(.*?) *$", _FENCE.sub("", markdown), re.MULTILINE)
    return {slug(heading) for heading in headings}


def slug(heading: str) -> str:
    kept = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
    return re.sub(r"[\s]+", "-", kept)


def for_site(markdown: str, source: str, page: str) -> str:
    """A text of the file ``source`` with its links as they are on ``page`` of the site.

    A link to a file without a page, such as a program, becomes plain text.
    """
    places = site_files()

    def replace(match: re.Match[str]) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or is_external(target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file in places:
            moved = posixpath.relpath(places[file], posixpath.dirname(page) or ".")
            return match[0].replace(match["target"], moved + hash_ + anchor)
        if match.re is _LINK and (ROOT / file).exists():
            return match["text"][1:-1]
        return match[0]

    parts, start = [], 0
    for fence in [*_FENCE.finditer(markdown), None]:
        text = markdown[start : fence.start() if fence else None]
        parts.append(_IMAGE.sub(replace, _LINK.sub(replace, text)))
        if fence:
            parts.append(fence[0])
            start = fence.end()
    return "".join(parts)
