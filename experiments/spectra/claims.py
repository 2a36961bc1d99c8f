"""Where the numbers of README.md come from; `python -m experiments.check spectra`."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache

import numpy as np

from experiments.check.claims import Below, Claim, Number, Page, Table, by_row
from experiments.check.rows import EXPERIMENTS, ends, loss, mean, minus, select
from experiments.fope_ablations.claims import wider
from experiments.spectra.null import noise_leakage
from fope_jax.report.correlation import MEASURES, Correlation, Point, correlate, spectrum_points
from fope_jax.report.rows import Run, read_runs

ROWS = "spectra/results/*.jsonl"
LENGTH, BEYOND, LONGEST = 128, 1024, 2048
LAYERS, TRAINED = (0, 1, 2), 300  # updates
UPPER = (1, 2)

# ---------------------------------------------------------------------------- by layer


def layer(method: str, index: int, name: str, context: int = LENGTH, step: int = TRAINED) -> float:
    """A field of one layer's row, the mean over heads."""
    wanted = {"variant": method, "layer": index, "context": context, "step": step}
    (row,) = select(ROWS, "spectrum", **wanted)
    return float(np.mean(row[name]))


FIELDS = {  # of a row's label: field, context, and whether untrained stands before trained
    "logits' leakage, inside": ("leakage", LENGTH, True),
    "of which noise of 8 windows, trained": ("noise_share", LENGTH, False),
    "logits' leakage, beyond": ("leakage", BEYOND, True),
    "q's leakage, inside": ("q_leakage", LENGTH, True),
    "undertrained energy, inside": ("undertrained_energy", LENGTH, True),
    "energy under the floor, beyond": ("floor_energy", BEYOND, True),
    "share of the logits' variance that distance decides, inside": ("profile_share", LENGTH, True),
    "position-locked share of the hidden states, trained": ("hidden_locked", LENGTH, False),
}


def layer_cells(header: list[str], row: list[str]) -> list:
    name, context, has_both = FIELDS[row[0]]
    cells: list = [None]
    for column in header[1:]:
        method, index = column.lower().split()
        steps = (0, TRAINED) if has_both else (TRAINED,)
        numbers = [layer(method, int(index), name, context, step) for step in steps]
        cells.append(numbers if any(numbers) else 0)
    return cells


def upper_at_own_frequencies() -> list[float]:
    """Least and most percent of the mean logit's energy, over both methods' upper layers."""
    values = [100 * (1 - layer(m, i, "leakage")) for m in ("rope", "fope") for i in UPPER]
    return [min(values), max(values)]


def at_own_pair(step: int) -> list[float]:
    return [100 * (1 - layer("rope", index, "q_leakage", step=step)) for index in LAYERS]


def hidden_states() -> list[Number]:
    leaks, nulls = (
        np.mean([layer("rope", i, name) for i in LAYERS])
        for name in ("hidden_leakage", "hidden_null")
    )
    return [leaks, nulls, Below(most_locked())]


def most_locked() -> float:
    """Percent of the hidden states' energy that is the same at a position whatever the text."""
    layers = itertools.product(("rope", "fope"), LAYERS)
    return 100 * max(abs(layer(method, index, "hidden_locked")) for method, index in layers)


def distance(method: str, context: int) -> float:
    """Mean distance that the last 64 queries attend to, over layers and heads."""
    return float(np.mean([layer(method, index, "distance", context) for index in LAYERS]))


def even_distance(context: int) -> float:
    """The same with equal attention to every token up to the query."""
    return float(np.mean(np.arange(context - 64, context)) / 2)


def lost(method: str) -> float:
    """Nats a token from 128 to 2,048 tokens."""
    return mean(minus(loss(ROWS, method, LONGEST), loss(ROWS, method, LENGTH)))


def under_the_floor(method: str) -> float:
    """Percent of the energy of all heads' mean logits at 1,024 tokens."""
    inside = whole = 0.0
    for index in LAYERS:
        wanted = {"variant": method, "layer": index, "context": BEYOND, "step": TRAINED}
        (row,) = select(ROWS, "spectrum", **wanted)
        energy = np.array(row["profile_energy"])
        inside, whole = inside + energy @ np.array(row["floor_energy"]), whole + energy.sum()
    return 100 * inside / whole


def nulls(context: int) -> list[float]:
    return [layer(method, 0, "leakage_null", context) for method in ("rope", "fope")]


def turns_under_the_floor() -> float:
    """Turns within 128 tokens of the fastest pair that turns less than once, 16 pairs."""
    turns = LENGTH * 10_000.0 ** (-np.arange(16) / 16) / (2 * math.pi)
    return float(turns[turns < 1].max())


# ---------------------------------------------------------------------------- correlation

SAME_AS_OTHERS = "books_(rope|fope|p-rope-6|fope-sigma-0.0|fope-sigma-0.3)_"  # of the ablations
UNDERTRAINED, OF_Q_AND_K = "undertrained energy", "leakage ratio of q and k"
LOGITS, FLOOR = "logits' leakage ratio", "energy under the floor, longest context"


@cache
def runs_of(which: str) -> list[Run]:
    """Runs: "extended" are 27 of two experiments, "all" those of tournament and ablations."""
    if which == "extended":
        patterns = [("extrapolation", "*"), ("books_to_web", "alibi_*"), ("books_to_web", "nope_*")]
    else:
        patterns = [("tournament", "books_*"), ("fope_ablations", "*")]
    return read_runs(
        path
        for folder, pattern in patterns
        for path in sorted((EXPERIMENTS / folder / "results").glob(f"{pattern}.jsonl"))
        if not (folder == "fope_ablations" and re.match(SAME_AS_OTHERS, path.name))
    )


@cache
def points(which: str) -> tuple[Point, ...]:
    """One point a run that has a spectrum."""
    return tuple(spectrum_points(runs_of(which)))


def known(which: str, name: str, without: str = "") -> list[tuple[Point, float, float]]:
    """Points that have the number and a gap."""
    return [
        (point, number, point.gap)
        for point in points(which)
        if (number := point.numbers[name]) is not None
        and point.gap is not None
        and point.label != without
    ]


@cache
def correlation(which: str, name: str, without: str = "") -> Correlation:
    found, numbers, gaps = zip(*known(which, name, without), strict=True)
    return correlate(numbers, gaps, [point.label for point in found])


def correlation_cells(which: str):
    def cells(header: list[str], row: list[str]) -> list:
        assert row[0] in {measure.name for measure in MEASURES}, row[0]
        result = correlation(which, row[0])
        intervals = [
            f"{x:+.2f} to {y:+.2f}" for x, y in (result.pearson_interval, result.spearman_interval)
        ]
        by_name = {
            "number": [None],
            "Pearson's r": [f"{result.pearson:+.2f}", intervals[0]],
            "Spearman's rho": [f"{result.spearman:+.2f}", intervals[1]],
            "runs, variants": [f"{result.runs}, {result.variants}"],
        }
        given: list = []
        for name, after in itertools.zip_longest(header, header[1:]):
            if name in by_name:
                given += by_name[name][: 2 if after == "95% interval" else 1]
        return given

    return cells


def mean_of(which: str, label: str, name: str = UNDERTRAINED) -> float:
    """The mean over a variant's runs that have the number."""
    return float(
        np.mean([number for point, number, _ in known(which, name) if point.label == label])
    )


def gap_of(label: str, which: str = "all") -> float:
    return float(np.mean([p.gap for p in points(which) if p.label == label and p.gap is not None]))


def labels_without_undertrained(which: str) -> list[str]:
    labels = {point.label for point, *_ in known(which, UNDERTRAINED)}
    return sorted(label for label in labels if mean_of(which, label) == 0)


def gaps_without_undertrained() -> list[float]:
    """Least and most of the runs, of variants and extensions that have none."""
    gaps = [gap for _, number, gap in known("extended", UNDERTRAINED) if number == 0]
    return [min(gaps), max(gaps)]


def undertrained_correlation() -> list[float]:
    """Runs, variants, r and its interval, over all methods."""
    result = correlation("all", UNDERTRAINED)
    return [result.runs, result.variants, result.pearson, *result.pearson_interval]


@cache
def among_those_with_any(without: str = "") -> list[float]:
    """r, its interval and the number of variants, without those that have none by construction."""
    found = [each for each in known("all", UNDERTRAINED, without) if each[1] > 0]
    measured, numbers, gaps = zip(*found, strict=True)
    result = correlate(numbers, gaps, [point.label for point in measured])
    return [result.pearson, *result.pearson_interval, result.variants]


def noise() -> list[float]:
    """Leakage of noise by windows, at the first layer's share; what that layer has."""
    share = layer("rope", 0, "profile_share")
    by_windows = [noise_leakage(windows, share) for windows in (8, 64, 512)]
    return [*by_windows, 100 * share, *(layer("rope", 0, x) for x in ("leakage", "noise_share"))]


def without_log_n() -> list[float]:
    result = correlation("all", UNDERTRAINED, "rope-log-n")
    return [result.pearson, *result.pearson_interval, result.spearman, *result.spearman_interval]


def largest_leakage() -> list[float]:
    """Of the logits: the two variants with most, which are said to be these two."""
    labels = {point.label for point, *_ in known("all", LOGITS)}
    largest = sorted(labels, key=lambda label: -mean_of("all", label, LOGITS))[:2]
    assert largest == ["fope-qk-norm", "fope-wide-heads"], largest
    return [mean_of("all", label, LOGITS) for label in largest]


def runs_without_number() -> list[int]:
    """Runs, variants, and runs without a spectrum that own frequencies can be told from."""
    runs = runs_of("all")
    return [len(runs), len({run.variant for run in runs}), len(runs) - len(points("all"))]


CLAIMS = (
    Claim(
        "White noise: logits {} inside and {} beyond (RoPE), {} and {} (FoPE); q {} and {} inside.",
        lambda: [
            *(x for pair in zip(nulls(LENGTH), nulls(BEYOND), strict=True) for x in pair),
            *(layer(method, 0, "pair_null") for method in ("rope", "fope")),
        ],
    ),
    Claim(
        "In the two upper layers {} to {}% of the energy of the mean logit",
        upper_at_own_frequencies,
    ),
    Claim(
        "have a leakage of {} with 8 windows, {} with 64 and {} with 512 where distance decides "
        "{}% of the variance of the logits, as in the first layer (`python -m "
        "experiments.spectra.null`). The first layer itself has {}, of which {} is noise",
        noise,
    ),
    Claim(
        "**Among the variants that have any** it is not resolved: r is {} ({} to {}, {} variants), "
        "without `rope-log-n` {} ({} to {})",
        lambda: [*among_those_with_any(), *among_those_with_any("rope-log-n")[:3]],
    ),
    Claim(
        "hardly depend on distance ({}% of their variance)",
        lambda: [100 * layer("rope", 0, "profile_share")],
    ),
    Claim(
        "rises from {}, {} and {}% in RoPE's three layers to {}, {} and {}%, and k's",
        lambda: [*at_own_pair(0), *at_own_pair(TRAINED)],
    ),
    Claim(
        "(leakage {}, null {}), and what is the same at a position whatever the text is 0 to "
        "within {}%",
        hidden_states,
    ),
    Claim("share of dimensions ({})", lambda: [layer("rope", 0, "undertrained_null")]),
    Claim("({} turns in training)", lambda: [turns_under_the_floor()]),
    Claim(
        "goes from {} of {} tokens (if all keys were alike) at 128 to {} of {} at 1,024 for RoPE, "
        "{} for FoPE; ALiBi's only from {} to {}. Both lose {} nats per token from 128 to 2,048, "
        "ALiBi {}.",
        lambda: [
            distance("rope", LENGTH),
            even_distance(LENGTH),
            distance("rope", BEYOND),
            even_distance(BEYOND),
            distance("fope", BEYOND),
            distance("alibi", LENGTH),
            distance("alibi", BEYOND),
            lost("rope"),
            lost("alibi"),
        ],
    ),
    Claim(
        "Of the energy of all heads' mean logits at 1,024 tokens FoPE has {}% under the floor and "
        "RoPE {}%",
        lambda: [under_the_floor("fope"), under_the_floor("rope")],
    ),
    Claim("how a model extends? {} runs", lambda: [len(points("extended"))]),
    Claim("gaps still go from {} to {}.", gaps_without_undertrained),
    Claim("And over all methods: {} runs", lambda: [len(points("all"))]),
    Claim("without extension, {} variants", lambda: [len({p.label for p in points("all")})]),
    Claim(
        "by a smaller number than over the {} runs above ({})",
        lambda: [
            correlation("extended", UNDERTRAINED).runs,
            correlation("extended", UNDERTRAINED).pearson,
        ],
    ),
    Claim(
        "{} of the {} variants have none by construction. `rope-log-n` is RoPE's training once "
        "more; without it the interval of r just excludes zero ({}, {} to {}; rho {}, {} to {})",
        lambda: [
            len(labels_without_undertrained("all")),
            correlation("all", UNDERTRAINED).variants,
            *without_log_n(),
        ],
    ),
    Claim(
        "xPos is the exception: {} of its energy lies there, as RoPE's {}, and it loses {} nats "
        "where RoPE loses {}.",
        lambda: [mean_of("all", "xpos"), mean_of("all", "rope"), gap_of("xpos"), gap_of("rope")],
    ),
    Claim(
        "has the most ({}) and loses {}.",
        lambda: [mean_of("all", "rope-500k"), gap_of("rope-500k")],
    ),
    Claim(
        "that have none some lose as little as {} (sigma 0.5) and some as much as {} (QK-norm). "
        "Without the floor FoPE has a share like RoPE's ({}) and loses {}, more than FoPE with its "
        "floor ({}; by {} ± {}), and not significantly more than RoPE ({}).",
        lambda: [
            gap_of("fope-sigma-0.5"),
            gap_of("fope-qk-norm"),
            mean_of("all", "fope-no-floor"),
            gap_of("fope-no-floor"),
            gap_of("fope"),
            *ends(wider("without the floor", "FoPE")),
            gap_of("rope"),
        ],
    ),
    Claim(
        "The leakage of q and k, {} over {} runs",
        lambda: [
            correlation("extended", OF_Q_AND_K).pearson,
            correlation("extended", OF_Q_AND_K).runs,
        ],
    ),
    Claim(
        "FoPE with QK-norm ({}) and with wide heads ({}), both far behind at L; the first extends "
        "badly ({}), the second in between ({}).",
        lambda: [*largest_leakage(), gap_of("fope-qk-norm"), gap_of("fope-wide-heads")],
    ),
    Claim(
        "at the longest context tells nothing here either ({})",
        lambda: [correlation("all", FLOOR).pearson],
    ),
    Claim("Of the {} runs of these {} variants {} have no number", runs_without_number),
)

PAGE = Page(
    path="experiments/spectra/README.md",
    claims=CLAIMS,
    tables=(
        Table(r"\| layer \| RoPE 0", by_row(layer_cells)),
        Table(r"\| number \|.* rho \| runs", by_row(correlation_cells("extended"))),
        Table(r"\| number \|.* rho \| 95% interval \| runs", by_row(correlation_cells("all"))),
    ),
    exempt={
        "settings": [
            "Trained models: 1.2 M parameters, 300 steps of 128 tokens",
            "windows of 128 tokens (inside) and 1,024 (beyond)",
            "1,000 steps at 128 tokens (and 100 more at 256 for five of them)",
            "at 2,048 tokens minus",
            "(YaRN with factor 16",
            "(500 steps at 128 tokens)",
            "theta = 500,000",
            "with 32 frequencies and more",
            "128 tokens can tell apart",
            "every seed of D = 64 and 128; two of three of the equations and of sigma 0.1 and 0.5",
        ],
        "read off a figure": ["at 570 tokens RoPE's is nearly as high as at 0"],
    },
    exempt_sections={"": "settings and times", "What this cannot show": "settings"},
    unchecked={
        "The theory, on signals made for it": "`fope spectrum --demo` computes it, from no rows"
    },
)
