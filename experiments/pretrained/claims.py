"""Where the numbers of README.md come from; `python -m experiments.check pretrained`.

Tables need no claim. They are recognised by their header: those that `python -m
experiments.pretrained tables` prints, whole or with fewer columns or rows, and the two formats of
``stretch_cells`` and ``key_cells``. A row's method is named as in units.py, or as in ``NAMES``,
with ", trained" after a short training. A passage of prose with numbers of rows is a `Claim` of
``CLAIMS``.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from experiments.check.claims import Claim, Expected, Page, Table, TableText
from experiments.check.compare import find_tables
from experiments.check.rows import EXPERIMENTS
from experiments.pretrained.tables import Results, all_tables, found_interval, loss_by_position
from experiments.pretrained.units import FLOORS, LENGTH, METHODS, TRAININGS, UPDATES

STRETCH = 2048  # tokens
NAMES = {
    "RoPE": "rope",
    "YaRN": "yarn",
    "NTK": "ntk",
    "PI": "pi",
    "Llama 3": "llama3",
    "dynamic NTK": "dynamic_ntk",
    "Self-Extend": "self_extend",
    "ReRoPE": "rerope",
    "log-length scaling": "log_n",
    "DroPE": "drope",
    "FoPE, floor of 8,192": "fope",
    "floor of 8,192 alone": "clip",
    "FoPE, floor of 2,048": "fope-2048",
    "floor of 2,048 alone": "clip-2048",
    "FoPE as released, floor of 2,048": "fope-official-2048",
}
TRAINED = ", trained"


@cache
def results() -> Results:
    return Results(EXPERIMENTS / "pretrained/results")


def method_of(label: str) -> str:
    """The method that a row's label names.

    Raises:
      ValueError: the label is unknown.
    """
    label = label.removesuffix(TRAINED)
    method = NAMES.get(label, label)
    if method not in (METHODS | FLOORS | TRAININGS):
        raise ValueError(f"{label!r} names no method; add it to NAMES of {__name__}")
    return method


def updates_of(label: str) -> int:
    """Of the training that a row's label names."""
    return UPDATES if label.endswith(TRAINED) else 0


# ---------------------------------------------------------------------------- losses


def stretches(
    method: str, tokens: int = STRETCH, context: int = 2 * LENGTH, text: str = "books", **fields
) -> np.ndarray:
    """Nats a token of stretches of a window, the mean over windows.

    ``fields`` such as ``updates=UPDATES`` say which training came before; without, none did.
    """
    fields = {"text": text, "context": context, "updates": 0, "seed": 0} | fields
    rows = results().of("loss", method=method, **fields)
    if not rows:
        raise LookupError(f"no loss of {method!r} with {fields} in results/")
    return np.mean([loss_by_position(row, tokens) for row in rows], axis=0)


def at(method: str, begin: int, end: int, **fields) -> float:
    """Nats a token from one position to another, in units of 1,024 tokens."""
    if begin % (end - begin):
        raise ValueError(f"{begin} to {end} k is no stretch: {begin} is no multiple of its length")
    return float(stretches(method, 1024 * (end - begin), **fields)[begin // (end - begin)])


def stretch_cells(header: list[str], row: list[str]) -> list[Expected]:
    """Of columns such as "8 to 10k", in units of 1,024 tokens."""
    method, cells = method_of(row[0]), []
    for name in header[1:]:
        begin, end = map(int, re.findall(r"\d+", name))
        cells.append(f"{at(method, begin, end, updates=updates_of(row[0])):.2f}")
    return [None, *cells]


# ---------------------------------------------------------------------------- keys


def keys(method: str, context: int, text: str = "noise", updates: int = 0) -> list[float]:
    """Keys that are found, of how many, the interval's two ends, the mean rank and nats."""
    fields = {"method": method, "context": context, "text": text, "updates": updates, "seed": 0}
    rows = results().of("every_key", **fields)
    if not rows:
        raise LookupError(f"no keys with {fields} in results/")
    windows = [row["correct"] for row in rows]
    rank, nats = (float(np.mean([row[name] for row in rows])) for name in ("rank", "nats"))
    total = sum(map(len, windows))
    return [sum(map(sum, windows)), total, *found_interval(windows), rank, nats]


def key_cells(header: list[str], row: list[str]) -> list[Expected]:
    """Of rows with a method, a text ("noise" or "books"), and a context."""
    text = {"noise": "noise", "books": "corpus"}[row[1]]
    context, updates = int(row[2].replace(",", "")), updates_of(row[0])
    found, total, low, high, rank, nats = keys(method_of(row[0]), context, text, updates)
    return [None, None, None, (found, total), (low, high), rank, nats]


# ---------------------------------------------------------------------------- printed tables


def printed() -> list[TableText]:
    """The tables that `python -m experiments.pretrained tables` prints."""
    return list(find_tables(all_tables(results())))


def printed_cells(table: TableText) -> list[list[Expected]]:
    """The cells of the printed table that has these columns and rows, the nearest if several do.

    Raises:
      ValueError: no printed table has them.
    """
    candidates = []
    for source in printed():
        labels = {method_of_or_label(row[0]): row for row in source.rows}
        wanted = [method_of_or_label(row[0]) for row in table.rows]
        if set(table.header[1:]) <= set(source.header) and set(wanted) <= set(labels):
            columns = [source.header.index(name) for name in table.header[1:]]
            cells = [[None, *(labels[name][column] for column in columns)] for name in wanted]
            differing = sum(
                one != other
                for row, given in zip(table.rows, cells, strict=True)
                for one, other in zip(row[1:], given[1:], strict=True)
            )
            candidates.append((differing, cells))
    if not candidates:
        raise ValueError(
            f"no table of `python -m experiments.pretrained tables` has the columns {table.header} "
            f"and the rows {[row[0] for row in table.rows]}"
        )
    return min(candidates, key=lambda each: each[0])[1]


def method_of_or_label(label: str) -> str:
    return NAMES.get(label, label)


def cells(table: TableText) -> list[list[Expected]]:
    """The cells of any table of the page, by its header."""
    first, *columns = table.header
    if first == "part":  # times
        return [[None] * len(table.header) for _ in table.rows]
    if columns[:3] == ["keys in", "context", "found"]:
        return [key_cells(table.header, row) for row in table.rows]
    if all(re.fullmatch(r"\d+ to \d+ ?k", name) for name in columns):
        return [stretch_cells(table.header, row) for row in table.rows]
    return printed_cells(table)


# ---------------------------------------------------------------------------- prose


def worse_than_yarn() -> list[float]:
    """At 10 to 12, 12 to 14 and 14 to 16 k."""
    return [at("rope", k, k + 2) - at("yarn", k, k + 2) for k in (10, 12, 14)]


def cost_within(method: str) -> list[float]:
    """Least and most nats that a method costs in the stretches within the trained length."""
    costs = (stretches(method) - stretches("rope"))[: LENGTH // STRETCH]
    return [min(costs), max(costs)]


CLAIMS = (
    Claim("then loses {} (10 to 12 k), {} and {} nats a token (14 to 16 k) on it", worse_than_yarn),
    Claim(
        "{} nats at 14 to 16 k, at a cost of {} to {} nats within the trained length. NTK with the "
        "same factor reads as well, to {} nats.",
        lambda: [
            at("yarn", 14, 16),
            *cost_within("yarn"),
            max(abs(stretches("ntk") - stretches("yarn"))),
        ],
    ),
    Claim(
        "the right number costs {} nats and ranks by chance. YaRN gives it {} nats, nearly the {} "
        "of RoPE at 8,192, but writes one of ten, where RoPE writes three at 8,192",
        lambda: [
            keys("rope", 2 * LENGTH)[-1],
            keys("yarn", 2 * LENGTH)[-1],
            keys("rope", LENGTH)[-1],
        ],
    ),
    Claim(
        "costs {} nats inside the trained length** ({} against {} at 6 to 8 k) and rises slowly "
        "beyond it ({} at 14 to 16 k)",
        lambda: [
            at("clip", 6, 8) - at("rope", 6, 8),
            at("clip", 6, 8),
            at("rope", 6, 8),
            at("clip", 14, 16),
        ],
    ),
    Claim(
        "differ by at most {} nats in any stretch of 1,024 tokens",
        lambda: [max(abs(stretches("fope", 1024) - stretches("clip", 1024)))],
    ),
)

PAGE = Page(
    path="experiments/pretrained/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|", cells, is_optional=True),),
    exempt={
        "settings": [
            "One window of 16,384 tokens",
            "stretches of 2,048 tokens (k is 1,024)",
            "has every 1,024.",
            "as YaRN does at 8 to 10 k",
            "YaRN with factor 2 needs",
            "At 16,384 tokens RoPE",
            "quantised to 4 bits",
        ]
    },
    exempt_sections={"": "settings", "What is measured": "settings", "Time": "times"},
)
