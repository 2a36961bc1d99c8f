"""The look of curves: colour, marker and line style, readable without colour.

A method of ``KNOWN`` looks the same in every figure and every report, whatever it is compared with.
So does a variant in reports that are given the same list of names (`fope report --styles`).
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

# Okabe and Ito's colour-blind safe palette, without the yellow that is invisible on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MORE_COLOURS = ("#882255", "#44AA99", "#999933", "#332288", "#AA4499")  # of Paul Tol's "muted"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))


class Style(NamedTuple):
    """Colour, marker and line style in matplotlib's terms."""

    color: str
    marker: str
    linestyle: Any


# Methods. No two share marker and line style, nor colour and marker.
KNOWN = {
    "rope": Style("#0072B2", "o", "-"),
    "fope": Style("#D55E00", "s", "--"),
    "alibi": Style("#009E73", "^", "-."),
    "nope": Style("#CC79A7", "D", ":"),
    "t5": Style("#56B4E9", "v", LINES[4]),
    "kerple": Style("#E69F00", "P", LINES[5]),
    "fire": Style("#000000", "X", "-"),
    "cope": Style("#882255", "*", "--"),
    "xpos": Style("#44AA99", "o", "-."),
    "sinusoidal": Style("#999933", "s", ":"),
    "learned": Style("#332288", "^", LINES[4]),
    "p-rope": Style("#AA4499", "D", LINES[5]),
    "pope": Style("#56B4E9", "<", "-"),
    # Extensions of a trained RoPE.
    "yarn": Style("#009E73", "v", "-"),
    "ntk": Style("#56B4E9", "P", "--"),
    "pi": Style("#44AA99", "*", ":"),
    "dynamic_ntk": Style("#000000", "s", LINES[5]),
    "llama3": Style("#E69F00", "o", LINES[4]),
    "self_extend": Style("#882255", "X", "-."),
    "rerope": Style("#CC79A7", "^", "-"),
    "log_n": Style("#AA4499", "v", "--"),
    "drope": Style("#999933", "D", "-."),
    "clip": Style("#332288", "P", ":"),
    "floor": Style("#332288", "<", "--"),  # the same in a model trained with it
    # Normed queries and keys, in the colour of their method.
    "rope-qk-norm": Style("#0072B2", ">", LINES[4]),
    "fope-qk-norm": Style("#D55E00", "<", LINES[5]),
    "nope-qk-norm": Style("#CC79A7", ">", "-"),
    "whole-cycles": Style("#000000", "<", "-."),
    "whole-cycles-qk-norm": Style("#000000", ">", "--"),
}


def line_styles(names: Iterable[str]) -> dict[str, Style]:
    """Styles by order, for curves that are no methods, such as layers."""
    return {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def read_names(path: Path) -> list[str]:
    """The names in a file, one a line; what stands after # is left out.

    Raises:
      ValueError: the file cannot be read as text, or a name stands twice, with its line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no text file with a variant's name in each line: {error}"
        ) from error
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        if not (name := line.partition("#")[0].strip()):
            continue
        if name in names:
            raise ValueError(f"{path}:{number}: {name!r} stands there twice")
        names.append(name)
    return names


def method_styles(labels: Iterable[str], first: Iterable[str] = ()) -> dict[str, Style]:
    """Styles by name: of those of ``KNOWN`` the same in every call.

    Other names take theirs in the order of ``first``, so that they are the same in every call with
    the same ``first``, or with one that goes on after it; then those that it lacks.

    Two labels of one call share neither marker and line style, nor colour and marker, while there
    is a choice. A method trained at several lengths keeps its colour.

    >>> method_styles(["fope", "rope"])["rope"] == method_styles(["rope"])["rope"]
    True
    """
    labels = list(dict.fromkeys(labels))
    styles = dict(KNOWN)
    for label in first:
        if label not in styles:
            styles[label] = _new_style(label, styles)
    styles = {name: style for name, style in styles.items() if name in KNOWN or name in labels}
    for label in sorted(set(labels).difference(styles)):
        styles[label] = _new_style(label, styles)
    return {label: styles[label] for label in labels}


def _new_style(label: str, styles: Mapping[str, Style]) -> Style:
    """The style that ``styles`` have least; the name decides between equals.

    The colours of RoPE and FoPE are theirs alone.
    """
    checksum = zlib.crc32(label.encode())
    pairs = list(itertools.product(MARKERS, LINES))
    colours = Counter(style.color for style in styles.values())
    used = Counter(style[1:] for style in styles.values())
    looks = Counter(style[:2] for style in styles.values())
    others = rotated((COLOURS + MORE_COLOURS)[2:], checksum // len(pairs))
    method = KNOWN.get(re.sub(r" \(.*\)$", "", label))  # of "rope (trained on 64)"
    colour = method.color if method else min(others, key=lambda name: colours[name])
    turned = rotated(pairs, checksum % len(pairs))
    return Style(colour, *min(turned, key=lambda pair: (looks[colour, pair[0]], used[pair])))


def rotated(values: Sequence[T], start: int) -> list[T]:
    """The values from ``start`` on, then those before it.

    >>> rotated("abc", 4)
    ['b', 'c', 'a']
    """
    start %= len(values)
    return [*values[start:], *values[:start]]
