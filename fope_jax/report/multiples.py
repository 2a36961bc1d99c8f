"""Numbers of methods at multiples of their training length, and which differences hold.

See `fope_jax.report.verdict` for the rules.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fope_jax.report.comparison import BASELINE, TASK_FIELD, Comparison, comparisons
from fope_jax.report.differences import (
    SEEDS_FOR_SIGNIFICANCE,
    Difference,
    holm,
    metric_by_seed,
    paired_difference,
)
from fope_jax.report.rows import Row, Run
from fope_jax.report.sums import Sums, add_up, spread

SOLVED = 80.0  # percent right at the training length from which a task counts as learned
PERPLEXITY = "perplexity"
TITLES = {  # how the methods are written
    "rope": "RoPE",
    "fope": "FoPE",
    "alibi": "ALiBi",
    "nope": "NoPE",
    "t5": "T5",
    "kerple": "KERPLE",
    "fire": "FIRE",
    "cope": "CoPE",
    "dape": "DAPE",
    "xpos": "xPos",
}


def title(name: str) -> str:
    """The method as it is written.

    >>> title("alibi"), title("rope (trained on 64)"), title("fope-wide")
    ('ALiBi', 'RoPE (trained on 64)', 'fope-wide')
    """
    method, _, rest = name.partition(" ")
    return f"{TITLES.get(method, method)} {rest}".strip()


@dataclass(frozen=True)
class Curve:
    """A method's numbers on one task or text.

    Attributes:
      name: the method as it is written.
      length: its training length in tokens.
      seeds: seed -> multiple of the training length -> percent right, or perplexity.
      trials: seed -> multiple -> (right, asked); empty for perplexity.
      scored: curves of the same number were scored on the same tokens or trials.
    """

    name: str
    length: int
    seeds: dict[int, dict[float, float]]
    trials: dict[int, dict[float, tuple[int, int]]]
    scored: int

    @property
    def multiples(self) -> list[float]:
        return sorted({multiple for numbers in self.seeds.values() for multiple in numbers})

    def at(self, multiple: float) -> list[float]:
        """The number of each seed that has it."""
        return [numbers[multiple] for numbers in self.seeds.values() if multiple in numbers]

    def mean(self, multiple: float) -> float:
        values = self.at(multiple)
        return spread(values).mean if values else math.nan

    def ratios(self, multiple: float) -> list[float]:
        """The number over that at the training length, of each seed that has both."""
        pairs = [n for n in self.seeds.values() if 1 in n and multiple in n]
        return [n[multiple] / n[1] if n[1] else math.nan for n in pairs]

    @property
    def measured(self) -> list[float]:
        """Multiples that every seed has; empty without the training length."""
        found = [m for m in self.multiples if len(self.at(m)) == len(self.seeds)]
        return found if found[:1] == [1] else []

    def beyond(self) -> list[float]:
        """Multiples above 1 that every seed has, before the first that is not finite."""
        finite = itertools.takewhile(lambda m: all(map(math.isfinite, self.at(m))), self.measured)
        return list(finite)[1:]


@dataclass(frozen=True)
class Topic:
    """A task or the perplexity of a text, and the curve of each method, best first."""

    name: str
    is_task: bool
    curves: list[Curve] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # methods scored on something else as well

    @property
    def learned(self) -> list[Curve]:
        """The curves that say something beyond the training length."""
        if not self.is_task:
            return [curve for curve in self.curves if curve.beyond()]
        return [curve for curve in self.curves if curve.at(1) and min(curve.at(1)) >= SOLVED]

    @property
    def baseline(self) -> Curve | None:
        """RoPE, or else the best of `learned`; None where it has learned nothing."""
        learned, rope = self.learned, title(BASELINE)
        named = [c for c in self.curves if c.name == rope or c.name.startswith(f"{rope} (trained")]
        return next((curve for curve in named or learned if curve in learned), None)


# ---------------------------------------------------------------------------- from rows


def read_topics(runs: Sequence[Run], kind: str) -> list[Topic]:
    """A topic for each task of "retrieval" or "passkey", or each text of "perplexity"."""
    topics: dict[str, list[Curve]] = {}
    for index, comparison in enumerate(comparisons(runs, kind)):
        if kind != PERPLEXITY or comparison.protocol == "same-tokens":
            found = topics.setdefault(_topic_name(comparison), [])
            found += _curves(comparison, index)
    is_task = kind != PERPLEXITY
    return [
        Topic(name, is_task, *_best_first(curves, is_task))
        for name, curves in sorted(topics.items())
        if curves
    ]


def _topic_name(comparison: Comparison) -> str:
    name = comparison.name.replace("_", " ")
    if comparison.kind == PERPLEXITY:
        return PERPLEXITY if name == "validation" else f"{PERPLEXITY} ({name})"
    return f"passkeys ({name})" if comparison.kind == "passkey" else name


def _curves(comparison: Comparison, index: int) -> list[Curve]:
    metric = Sums.accuracy if comparison.kind in TASK_FIELD else Sums.perplexity
    numbers = {c: metric_by_seed(comparison, metric, [c]) for c in comparison.contexts}
    curves = []
    for label, rows in comparison.curves.items():
        length = comparison.training_lengths[label]
        variant = label.removesuffix(f" (trained on {length})")
        multiples = {c: m for c in comparison.contexts if (m := quarters(c / length)) >= 1}
        seeds: dict[int, dict[float, float]] = {}
        trials: dict[int, dict[float, tuple[int, int]]] = {}
        for context, multiple in multiples.items():
            for seed, value in numbers[context].get(label, {}).items():
                seeds.setdefault(seed, {})[multiple] = float(value)
            for rows_of_seed in rows:
                asked = [row for row in rows_of_seed if row["context"] == context]
                if add_up(asked).total:
                    of_seed = trials.setdefault(asked[0]["seed"], {})
                    of_seed[multiple] = _independent_trials(asked)
        if seeds:
            curves.append(Curve(variant, length, seeds, trials, index))
    return curves


def _independent_trials(rows: Sequence[Row]) -> tuple[int, int]:
    """(right, asked); a window counts as one trial where all depths are asked for after it."""
    pooled, windows = add_up(rows), max(row.get("windows", 0) for row in rows)
    if not windows:
        return pooled.correct, pooled.total
    return round(windows * pooled.correct / pooled.total), windows


def quarters(ratio: float) -> float:
    """The ratio where it is a number of quarters, whole ones as int; 0 for all others.

    >>> quarters(2.0), quarters(1.5), quarters(1.3)
    (2, 1.5, 0)
    """
    if not (4 * ratio).is_integer():
        return 0
    return int(ratio) if ratio.is_integer() else ratio


def _best_first(curves: Sequence[Curve], is_task: bool) -> tuple[list[Curve], list[str]]:
    """One curve a method and training length, under its written name, and the names of others.

    Of several that were scored on other tokens it is the one of most seeds, and of most methods to
    compare it with.
    """
    together = Counter((curve.scored, curve.length) for curve in curves)

    def order(curve: Curve) -> tuple[int, int]:
        return -len(curve.seeds), -together[curve.scored, curve.length]

    kept: dict[tuple[str, int], Curve] = {}
    for curve in sorted(curves, key=order):
        kept.setdefault((curve.name, curve.length), curve)
    left_out = [c.name for c in curves if c is not kept[c.name, c.length]]
    methods = [name for name, _ in kept]

    def name(curve: Curve) -> str:
        is_one = methods.count(curve.name) == 1
        return title(curve.name if is_one else f"{curve.name} (trained on {curve.length:,})")

    def quality(curve: Curve) -> tuple[bool, float]:
        multiples = curve.beyond()
        if is_task:
            value = -curve.mean(multiples[0]) if multiples else math.inf
            return not is_solved(curve), value
        return not multiples, spread(curve.ratios(multiples[-1])).mean if multiples else math.inf

    named = (replace(curve, name=name(curve)) for curve in kept.values())
    return sorted(named, key=quality), [title(name) for name in dict.fromkeys(left_out)]


def best_beyond(topic: Topic) -> float:
    """The best answers at the first multiple beyond the training length."""
    return max((c.mean(c.beyond()[0]) for c in topic.curves if c.beyond()), default=0.0)


def is_solved(curve: Curve) -> bool:
    """Whether a seed has learned the task."""
    return any(value >= SOLVED for value in curve.at(1))


# ---------------------------------------------------------------------------- differences


class Held(NamedTuple):
    """Methods whose differences to the baseline at one multiple rest on the same.

    Attributes:
      basis: "test", "signs" or "trials", or "" where nothing can hold.
      compared: the methods.
      signs: of the differences that hold, by method.
      seeds: the fewest that a method shares with the baseline.
      trials: the fewest of a method, for "trials".
    """

    basis: str
    compared: list[str]
    signs: dict[str, int]
    seeds: int
    trials: int


def held_differences(topic: Topic, multiple: float) -> list[Held]:
    """Which methods differ from the baseline at ``multiple``, by the rules of this module.

    A method with fewer seeds than others is judged by those it has, and the others by theirs.
    """
    by_basis: dict[str, dict[str, Pair]] = {"test": {}, "signs": {}, "trials": {}, "": {}}
    for name, pair in _pairs(topic, multiple).items():
        by_basis[_basis(pair.difference.seeds, topic.is_task)][name] = pair
    return [_held(basis, pairs) for basis, pairs in by_basis.items() if pairs]


def _basis(seeds: int, is_task: bool) -> str:
    if seeds >= SEEDS_FOR_SIGNIFICANCE:
        return "test"
    if seeds > 1:
        return "signs"
    return "trials" if is_task else ""


def _held(basis: str, pairs: Mapping[str, Pair]) -> Held:
    if basis == "test":
        tested = holm({(name, ""): pair.difference for name, pair in pairs.items()})
        holding = {name for name, _ in tested}
    elif basis == "signs":
        holding = {name for name, pair in pairs.items() if pair.have_one_sign}
    elif basis == "trials":
        holding = {name for name, pair in pairs.items() if pair.are_apart}
    else:
        holding = set()
    signs = {
        name: int(math.copysign(1, pair.difference.mean))
        for name, pair in pairs.items()
        if name in holding
    }
    seeds = min(pair.difference.seeds for pair in pairs.values())
    return Held(basis, list(pairs), signs, seeds, min(pair.trials for pair in pairs.values()))


class Pair(NamedTuple):
    """A method minus the baseline: over the seeds both have, and over the trials."""

    difference: Difference
    have_one_sign: bool  # the differences of all seeds
    are_apart: bool  # the intervals of the trials
    trials: int  # asked, of the one seed; 0 without


def _pairs(topic: Topic, multiple: float) -> dict[str, Pair]:
    base, pairs = topic.baseline, {}
    if base is None:
        return pairs
    for curve in topic.learned:
        if curve is base or not are_comparable(base, curve):
            continue
        one, other = (_compared(c, topic, multiple) for c in (curve, base))
        difference = paired_difference(one, other)
        if difference is not None:
            signs = {np.sign(one[seed] - other[seed]) for seed in one.keys() & other.keys()}
            have_one_sign = len(signs) == 1 and 0 not in signs
            shared = sorted(one.keys() & other.keys())
            asked = [c.trials.get(shared[0], {}).get(multiple) for c in (base, curve)]
            counts = [count for count in asked if count is not None]
            apart = len(counts) == 2 and _are_apart(*counts)
            trials = min((count[1] for count in counts), default=0)
            pairs[curve.name] = Pair(difference, have_one_sign, apart, trials)
    return pairs


def _compared(curve: Curve, topic: Topic, multiple: float) -> dict[int, float]:
    """Finite numbers by seed: percent right, or the log of perplexity, beyond L of its growth."""
    numbers = {}
    for seed, values in curve.seeds.items():
        if topic.is_task or multiple == 1:
            value = values.get(multiple, math.nan)
        else:
            value = values.get(multiple, math.nan) / values.get(1, math.nan)
        numbers[seed] = value if topic.is_task or not value > 0 else math.log(value)
    return {seed: value for seed, value in numbers.items() if math.isfinite(value)}


def are_comparable(one: Curve, other: Curve) -> bool:
    return (one.scored, one.length) == (other.scored, other.length)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95% interval of a share of trials, in percent.

    >>> [round(end) for end in wilson(170, 200)]
    [79, 89]
    """
    from scipy import stats  # slow to import

    low, high = stats.binomtest(right, asked).proportion_ci(0.95, method="wilson")
    return 100 * low, 100 * high


def _are_apart(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the intervals of two (right, asked) do not overlap."""
    (low, high), (other_low, other_high) = wilson(*one), wilson(*other)
    return high < other_low or other_high < low
