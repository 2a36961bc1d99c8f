"""The look of curves: colour, marker and line style, readable without colour.

A method of ``KNOWN`` looks the same in every figure and every report, whatever it is compared with.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
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


# Methods, and variants that stand in more than one figure of experiments/. No two share marker and
# line style, nor colour and marker; a new one gets a line of its own, so that none changes.
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
    # Parts and variants of FoPE, and normed queries and keys in the colour of their method.
    "floor": Style("#332288", "<", "--"),
    "series-all": Style("#E69F00", ">", ":"),
    "fope-zero-phase": Style("#AA4499", "<", ":"),
    "fope-d-64": Style("#999933", "<", LINES[4]),
    "whole-cycles": Style("#000000", "<", "-."),
    "rope-qk-norm": Style("#0072B2", ">", LINES[4]),
    "fope-qk-norm": Style("#D55E00", "<", LINES[5]),
    "nope-qk-norm": Style("#CC79A7", ">", "-"),
    "whole-cycles-qk-norm": Style("#000000", ">", "--"),
}


def line_styles(names: Iterable[str]) -> dict[str, Style]:
    """Styles by order, for curves that are no methods, such as layers."""
    return {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def method_styles(labels: Iterable[str]) -> dict[str, Style]:
    """Styles by name: of known methods from a table, of others from a checksum of the name.

    Two labels of one call never share both marker and line style, nor both colour and marker, while
    there is a choice. Others than RoPE and FoPE are not in their colours, and take those that the
    call has least. A method trained at several lengths keeps its colour.

    >>> method_styles(["fope", "rope"])["rope"] == method_styles(["rope"])["rope"]
    True
    """
    labels = list(dict.fromkeys(labels))
    styles = {label: KNOWN[label] for label in labels if label in KNOWN}
    pairs = list(itertools.product(MARKERS, LINES))
    colours = (COLOURS + MORE_COLOURS)[2:]
    taken = {style[1:] for style in KNOWN.values()}
    looks = {style[:2] for style in KNOWN.values()}
    for label in sorted(set(labels) - set(styles)):
        checksum = zlib.crc32(label.encode())
        start = checksum % len(pairs)
        used = [style.color for style in styles.values()]
        method = KNOWN.get(re.sub(r" \(.*\)$", "", label))
        turned = rotated(colours, checksum // len(pairs))
        colour = method.color if method else min(turned, key=used.count)
        free = [pair for pair in rotated(pairs, start) if pair not in taken]
        best = [pair for pair in free if (colour, pair[0]) not in looks]
        pair = next(iter([*best, *free, pairs[start]]))
        taken.add(pair)
        looks.add((colour, pair[0]))
        styles[label] = Style(colour, *pair)
    return {label: styles[label] for label in labels}


def rotated(values: Sequence[T], start: int) -> list[T]:
    """The values from ``start`` on, then those before it.

    >>> rotated("abc", 4)
    ['b', 'c', 'a']
    """
    start %= len(values)
    return [*values[start:], *values[:start]]
