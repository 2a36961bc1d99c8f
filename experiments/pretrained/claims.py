"""Where the numbers of README.md come from; `python -m experiments.check pretrained`.

Tables need no claim. They are recognised by their header: those that `python -m
experiments.pretrained tables` prints, whole or with fewer columns or rows, and the two formats of
``stretch_cells`` and ``key_cells``. A row's method is named as in units.py, or as in its ``NAMES``,
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
from experiments.pretrained.units import (
    FLOORS,
    LENGTH,
    MAIN,
    METHODS,
    NAMES,
    TRAINED_AT,
    TRAININGS,
    UPDATES,
    all_units,
    core_seconds,
    main_units,
)

STRETCH = 2048  # tokens
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
        raise ValueError(f"{label!r} names no method; add it to NAMES of units.py")
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
    method, context, updates = method_of(row[0]), int(row[2].replace(",", "")), updates_of(row[0])
    found, total, low, high, rank, nats = keys(method, context, text, updates)
    depths = by_depth(method, context, text, updates)
    return [None, None, None, (found, total), depths, (low, high), rank, nats]


def by_depth(method: str, context: int, text: str, updates: int) -> str:
    """The keys of each window from its beginning to its end, ``x`` where one is found."""
    fields = {"context": context, "text": text, "updates": updates, "seed": 0}
    rows = results().of("every_key", method=method, **fields)
    return " ".join("".join("x" if found else "·" for found in row["correct"]) for row in rows)


# ---------------------------------------------------------------------------- time


def time_cells(table: TableText) -> list[list[Expected]]:
    """Of the experiment's three parts: hours of two busy cores, and by the clock."""
    hours = np.zeros((3, 2))
    for row in results().rows:
        is_of_training = row["updates"] or row["method"] in FLOORS
        part = 2 if row["kind"] == "heads" else 1 if is_of_training else 0
        hours[part] += row["core_seconds"] / 7200, row["seconds"] / 3600
    return [[None, *map(float, each)] for each in hours]


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
    if first == "part":
        return time_cells(table)
    if columns[:4] == ["keys in", "context", "found", "by depth"]:
        return [key_cells(table.header, row) for row in table.rows]
    if all(re.fullmatch(r"\d+ to \d+ ?k", name) for name in columns):
        return [stretch_cells(table.header, row) for row in table.rows]
    return printed_cells(table)


# ---------------------------------------------------------------------------- prose


def worse_than_yarn() -> list[float]:
    """RoPE at 10 to 12, 12 to 14 and 14 to 16 k."""
    return [at("rope", k, k + 2) - at("yarn", k, k + 2) for k in (10, 12, 14)]


def costs_within(*methods: str) -> list[float]:
    """Least and most nats that methods cost in the stretches within the trained length."""
    costs = [(stretches(method) - stretches("rope"))[: LENGTH // STRETCH] for method in methods]
    return [np.min(costs), np.max(costs)]


def of_heads(name: str, context: int, method: str = "rope") -> float:
    """A mean over all heads of one window."""
    return float(np.mean(heads_row(context, method)[name]))


def heads_row(context: int, method: str = "rope") -> dict:
    (row,) = results().of("heads", method=method, context=context, updates=0)
    return row


def on_needle(context: int, method: str = "rope") -> np.ndarray:
    """Of each head, the share of its attention on the number that is asked for."""
    return np.mean(heads_row(context, method)["needle"], axis=-1).ravel()


def heads_on_needle(context: int, method: str = "rope") -> int:
    """Heads that put over a tenth of their attention there."""
    return int((on_needle(context, method) > 0.1).sum())


def same_heads_on_needle() -> list[float]:
    """How many heads do under YaRN at twice the length, which are those of RoPE at its length; and
    the correlation of all heads."""
    rope, yarn = on_needle(LENGTH), on_needle(2 * LENGTH, "yarn")
    assert np.array_equal(rope > 0.1, yarn > 0.1)
    return [int((yarn > 0.1).sum()), float(np.corrcoef(rope, yarn)[0, 1])]


def slow_pairs() -> list[float]:
    """Pairs that turn less than once in the trained length, of how many; percent of |q| |k| there
    and of the pairs."""
    row = heads_row(LENGTH)
    products = np.multiply(row["q_size"], row["k_size"])
    theta, pairs = row["position"]["theta"], products.shape[1]
    turns_once = 2 * np.pi * theta ** (np.arange(pairs) / pairs) <= LENGTH
    slow = int((~turns_once).sum())
    share = float(products[:, ~turns_once].sum() / products.sum())
    return [slow, pairs, 100 * share, 100 * slow / pairs]


def series_after_training() -> list[float]:
    """Least and most by which FoPE's curve is above that of the floor alone."""
    curves = [stretches(m, updates=UPDATES) for m in ("fope-2048", "clip-2048")]
    return [np.min(curves[0] - curves[1]), np.max(curves[0] - curves[1])]


def after_training(method: str, begin: int, end: int) -> float:
    return at(method, begin, end, updates=UPDATES)


def last_at_length(method: str) -> float:
    """The last stretch of a context of the original length, after training."""
    return float(stretches(method, context=LENGTH, updates=UPDATES)[-1])


def has_each_rank(method: str, context: int, updates: int = 0) -> list[float]:
    """No number; AssertionError unless the ten ranks in noise are 1 to 10."""
    fields = {"method": method, "context": context, "text": "noise", "updates": updates}
    (row,) = results().of("every_key", seed=0, window=0, **fields)
    assert sorted(row["rank"]) == list(range(1, 11)), row["rank"]
    return []


def found_at_twice() -> list[float]:
    """Keys in noise at twice the length: of YaRN and of NTK; AssertionError unless the others'
    stand to them as the page says."""
    found = {m: keys(m, 2 * LENGTH)[0] for m in (*MAIN, "ntk", "self_extend")}
    assert found["self_extend"] == found["yarn"]
    assert not any(found[m] for m in ("rope", "clip", "fope"))
    assert keys("yarn", 2 * LENGTH, "corpus")[0] == keys("yarn", STRETCH, "corpus")[0]
    assert keys("rope", 2 * LENGTH, "corpus")[0] == 0
    return [found["yarn"], found["ntk"]]


def found_by_half(method: str, text: str) -> list[float]:
    """Of a window of twice the length: keys found in its second half, in all, and in its first
    half, which is further from the questions than the trained length; and the keys there."""
    found = by_depth(method, 2 * LENGTH, text, 0)
    half = len(found) // 2
    return [found[half:].count("x"), found.count("x"), found[:half].count("x"), half]


def yarn_is_best() -> list[float]:
    """No number; AssertionError unless YaRN's curves stand to the others as the page says."""
    floors = {*FLOORS_TRAINED, *FLOORS_ALONE}
    trained = {m: stretches(m, updates=UPDATES) for m in ("rope", "yarn", *floors)}
    near = 10 * 1024 // STRETCH
    assert np.allclose(trained["yarn"][:near], trained["rope"][:near], atol=0.005)
    for method, curve in trained.items():
        assert np.all(trained["yarn"] <= curve + 0.005), method
    for method in floors:
        assert np.all(stretches("yarn")[1:] < trained[method][1:]), method
    return []


def higher_floors() -> list[float]:
    """Of the floors alone after the training, lowest first, and of RoPE and YaRN, nats at 0 to 2, 6
    to 8 and 14 to 16 k; AssertionError unless their curves stand to each other as the page says."""
    curves = [stretches(m, updates=UPDATES) for m in FLOORS_ALONE]
    higher = np.diff(curves, axis=0)
    assert np.all(higher[:, : TRAINED_AT // STRETCH] < 0)
    assert np.all(higher[:, TRAINED_AT // STRETCH :] > 0)
    rope, yarn = (stretches(m, updates=UPDATES) for m in ("rope", "yarn"))
    (ahead,) = np.nonzero(curves[-1] < rope)
    assert ahead.tolist() == [14 // 2], ahead
    places = [0, 6 // 2, 14 // 2]
    return [float(c[k]) for k in places for c in curves] + [
        float(c[k]) for c in (rope, yarn) for k in places
    ]


def higher_floors_without_training() -> list[float]:
    """Of the floors of 8,192 and of 2,048, nats at 4 to 6 k before training, then what training
    gains them at 6 to 8 k; AssertionError unless the first is behind from there on."""
    high, low = (stretches(m) for m in ("clip", "clip-2048"))
    assert np.all((high > low + 0.1)[4 // 2 :])
    k = 6 // 2
    gains = [
        high[k] - stretches("clip", updates=UPDATES)[k],
        low[k] - stretches("clip-2048", updates=UPDATES)[k],
    ]
    return [high[2], low[2], *gains]


def pairs_below_floors() -> list[float]:
    """Pairs that turn less than once in the floor's length, by floor, and all pairs."""
    position = heads_row(LENGTH)["position"]
    _, pairs, *_ = slow_pairs()
    periods = 2 * np.pi * position["theta"] ** (np.arange(pairs) / pairs)
    return [*(int((periods > floor).sum()) for floor in (2048, 4096, LENGTH)), pairs]


def keys_of_higher_floors() -> list[float]:
    """Keys that both write in noise; AssertionError unless they agree and it is the last."""
    found = set()
    for method in FLOORS_ALONE[1:]:
        found.add(tuple(keys(method, c, updates=UPDATES)[0] for c in (STRETCH, LENGTH)))
        fields = {"context": STRETCH, "text": "noise", "updates": UPDATES}
        (row,) = results().of("every_key", method=method, **fields)
        assert row["correct"][-1] == 1, row["correct"]
    (both,) = found
    return list(both)


def left_for_all() -> list[float]:
    """Units that only `run --all` measures, and their hours of two busy cores."""
    assert not list_undone(main_units())
    undone = list_undone(all_units())
    return [len(undone), sum(map(core_seconds, undone)) / 7200]


def list_undone(units: list) -> list:
    done = [unit.key for unit in units if results().of(**unit.key)]
    return [unit for unit in units if unit.key not in done]


def held_out(method: str) -> list[float]:
    """Nats a token of the held-out window before the first update and after the last."""
    (row,) = results().of("training", method=method, updates=UPDATES, seed=0)
    return [row["held_out_loss"][0][1], row["held_out_loss"][-1][1]]


def neighbours_differ() -> list[float]:
    """Least and most nats between neighbouring stretches of RoPE's curve within its length."""
    steps = abs(np.diff(stretches("rope")[: LENGTH // STRETCH]))
    return [np.min(steps), np.max(steps)]


def none_found() -> list[float]:
    """No number; AssertionError unless the flat ones find no key in any window."""
    assert not any(
        sum(row["correct"])
        for method in FLAT
        for row in results().of("every_key", method=method, updates=UPDATES)
    )
    return []


SIX = ("yarn", "ntk", "dynamic_ntk", "llama3", "self_extend", "rerope")
FLOORS_TRAINED = ("clip-2048", "fope-2048")
FLOORS_ALONE = ("clip-2048", "clip-4096", "clip")
FLAT = ("fope-official-2048", "drope")
CLAIMS = (
    Claim("then loses {} (10 to 12 k), {} and {} nats a token (14 to 16 k) on it", worse_than_yarn),
    Claim(
        "At 8,192 tokens its heads give {} of their attention to the first token and {} to the "
        "last 64; at 16,384 only {} and {}. They look {} tokens back on average in place of {}.",
        lambda: [
            *(of_heads(n, c) for c in (LENGTH, 2 * LENGTH) for n in ("first", "recent")),
            *(of_heads("distance", c) for c in (2 * LENGTH, LENGTH)),
        ],
    ),
    Claim(
        "the {} of {} pairs that turn less than once, which carry {}% of |q| |k| (an even share is "
        "{}%), have phases that they never had in training; that these cause it is not tested. Of "
        "the {} heads that put over a tenth on the number that is asked for, {} are left",
        lambda: [*slow_pairs(), heads_on_needle(LENGTH), heads_on_needle(2 * LENGTH)],
    ),
    Claim(
        "back at 16,384 tokens, without training: {}, {} and the same {} heads (over all heads, "
        "the share on the needle there goes with RoPE's at 8,192 with r = {})",
        lambda: [
            *(of_heads(name, 2 * LENGTH, "yarn") for name in ("first", "recent")),
            *same_heads_on_needle(),
        ],
    ),
    Claim(
        "end between {} and {} nats and cost at most {} within the trained length; PI costs {} to "
        "{} there. Log-length scaling alone does not help: {} at 14 to 16 k",
        lambda: [
            min(at(m, 14, 16) for m in SIX),
            max(at(m, 14, 16) for m in SIX),
            costs_within(*SIX)[1],
            *costs_within("pi"),
            at("log_n", 14, 16),
        ],
    ),
    Claim(
        "At 32,768 tokens, four times the length, it ends at {}.",
        lambda: [at("rope", 30, 32, context=4 * LENGTH)],
    ),
    Claim(
        "On joined news articles it is the same: RoPE ends at {}, YaRN at {}, NTK at {}. YaRN with "
        "factor 4 reads four times the length: {} at 30 to 32 k, and never above that before.",
        lambda: [
            *(at(m, 14, 16, text="news") for m in ("rope", "yarn", "ntk")),
            float(max(stretches("yarn", context=4 * LENGTH))),
        ],
    ),
    Claim(
        "the last 2,048 tokens of the window cost under YaRN {} nats after 6,144 tokens of the "
        "book, and {} and {} after 10,240 and 14,336",
        lambda: [
            float(stretches("yarn", context=c)[-1]) for c in (LENGTH, LENGTH * 3 // 2, 2 * LENGTH)
        ],
    ),
    Claim(
        "Of ten keys in 16,384 tokens of noise YaRN and Self-Extend write {}, NTK {}, RoPE "
        "and the two floors none, where RoPE writes {} at 8,192: intervals that overlap. In a"
        " book YaRN writes {} ({} to {}%) at 16,384 tokens, as many as at 2,048, and RoPE "
        "none; {} of the {} stand in the half of the window next to the questions, so that {} of "
        "the {} keys beyond 8,192 tokens is found. The right number costs YaRN {} nats in noise, "
        "nearly the {} of RoPE at 8,192, "
        "and RoPE {}, whose ten ranks are 1 to 10 once each",
        lambda: [
            *found_at_twice(),
            keys("rope", LENGTH)[0],
            *np.take(keys("yarn", 2 * LENGTH, "corpus"), [0, 2, 3]),
            *found_by_half("yarn", "corpus"),
            keys("yarn", 2 * LENGTH)[-1],
            keys("rope", LENGTH)[-1],
            keys("rope", 2 * LENGTH)[-1],
            *has_each_rank("rope", 2 * LENGTH),
        ],
    ),
    Claim(
        "costs {} nats inside the trained length** ({} against {} at 6 to 8 k; on news {} against "
        "{})",
        lambda: [
            at("clip", 6, 8) - at("rope", 6, 8),
            *(at(m, 6, 8, text=text) for text in ("books", "news") for m in ("clip", "rope")),
        ],
    ),
    Claim(
        "differ by at most {} nats in any stretch of 1,024 tokens",
        lambda: [max(abs(stretches("fope", 1024) - stretches("clip", 1024)))],
    ),
    Claim(
        "from {} to {} nats at 0 to 2 k, from {} to {} at 6 to 8 k, and from {} to {} at 14 to "
        "16 k. RoPE, trained the same way, is better up to 12 k ({} against {} at 8 to 10 k) and "
        "worse beyond ({} at 14 to 16 k).",
        lambda: [
            *(at("clip-2048", k, k + 2, updates=u) for k in (0, 6, 14) for u in (0, UPDATES)),
            *(after_training(method, 8, 10) for method in ("rope", "clip-2048")),
            after_training("rope", 14, 16),
        ],
    ),
    Claim(
        "{} nats in the last 2,048 tokens of a context of 8,192, where RoPE, trained the same way, "
        "has {}",
        lambda: [last_at_length("clip-2048"), last_at_length("rope")],
    ),
    Claim("4,096 and 8,192 take {}, {} and {} of the {} pairs)", pairs_below_floors),
    Claim(
        "the three end at {}, {} and {} nats at 0 to 2 k, at {}, {} and {} at 6 to 8 k, and at {}, "
        "{} and {} at 14 to 16 k, where RoPE, trained the same way, has {}, {} and {}, and YaRN {},"
        " {} and {}. So the floor of 8,192 is ahead of RoPE at 14 to 16 k alone.",
        higher_floors,
    ),
    Claim(
        "it already is behind that of 2,048 from 4 k on ({} against {} at 4 to 6 k), and the "
        "training gains it less: {} nats against {} at 6 to 8 k",
        higher_floors_without_training,
    ),
    Claim(
        "YaRN, trained the same way, is best everywhere**: it reads as RoPE does up to 10 k, with "
        "the same training, and ends at {}. Untrained it is ahead of every floor from 2 k on.",
        lambda: [*yarn_is_best(), after_training("yarn", 14, 16)],
    ),
    Claim("FoPE's curve is {} to {} nats above that of the floor alone", series_after_training),
    Claim(
        "{} at 0 to 2 k and {} at 14 to 16 k, and {} and {}. Their changes cost most ({} and {} "
        "nats on held-out text before the first update, {} and {} after the last).",
        lambda: [
            *(after_training(method, k, k + 2) for method in FLAT for k in (0, 14)),
            *(held_out(method)[end] for end in (0, 1) for method in FLAT),
        ],
    ),
    Claim(
        "Of ten keys in 2,048 tokens of noise the floor alone writes {} and FoPE {}, the last ones "
        "of the window, and at 8,192 tokens {} and {}. The floor's ranks are 1 to 10 once each at "
        "both lengths. RoPE, trained the same way, writes {} and {}, YaRN {} and {}; "
        "FoPE as released and DroPE none.",
        lambda: [
            *none_found(),
            *(keys(m, c, updates=UPDATES)[0] for c in (STRETCH, LENGTH) for m in FLOORS_TRAINED),
            *(x for c in (STRETCH, LENGTH) for x in has_each_rank("clip-2048", c, UPDATES)),
            *(keys(m, c, updates=UPDATES)[0] for m in ("rope", "yarn") for c in (STRETCH, LENGTH)),
        ],
    ),
    Claim(
        "Floors of longer lengths find no more: each of them writes {}, the last of the window, "
        "and {}.",
        keys_of_higher_floors,
    ),
    Claim(
        "`run --all` would measure {} units more, about {} hours of two busy cores", left_for_all
    ),
    Claim(
        "neighbouring stretches of RoPE's curve differ by {} to {} nats within its length",
        neighbours_differ,
    ),
)

PAGE = Page(
    path="experiments/pretrained/README.md",
    claims=CLAIMS,
    tables=(Table(r"\|", cells, is_optional=True),),
    exempt={
        "settings": [
            "One window of 16,384 tokens",
            "as many keys in a book at twice the length as in 2,048 tokens",
            "stretches of 2,048 tokens (k is 1,024)",
            "The last 2,048 tokens of that window, with ever more of the book before them (context "
            "in tokens; at 32,768 scalings have factor 4):",
            "FoPE with the floor of 8,192 after the training, the floor of 4,096 alone before it, "
            "all methods on news and in keys (8,192 and 16,384 tokens of noise and of a book, and "
            "12,288), and at 32,768 tokens the other nine and, after the training, the floor of "
            "2,048 with and without the series",
            "(the floors of 2,048, 4,096 and 8,192 take",
            "in the 2,048 tokens of a window of the training",
            "has every 1,024.",
            "as YaRN does at 8 to 10 k",
            "Scalings have factor 2, Self-Extend groups of 4.",
            "32 updates of one window of 2,048 tokens each, then the same window of 16,384 tokens:",
            "the 12 frequencies that turn less than once in 8,192 tokens:",
            "**A short training at 2,048 tokens",
            "for the loss beyond 12 k alone",
            "one seed of 66 k tokens",
            "trains on 0.5% and more of the tokens before, of SmolLM2's 2 T at least 10 B, and "
            "fits the factor on its logits beyond the length, 1 + 0.412 ln(length / 8,192) here",
            "with the floor of 2,048 alone",
            "quantised to 4 bits",
        ]
    },
    exempt_sections={"": "settings", "What is measured": "settings", "Time": "settings"},
)
