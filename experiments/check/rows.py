"""Numbers from the committed rows, by seed: losses, perplexities, recall, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.report.differences import LEVEL, Difference, paired_difference
from fope_jax.report.sums import Spread, add_up, spread
from fope_jax.storage.files import read_json_lines

EXPERIMENTS = Path(__file__).parents[1]
Row = dict[str, Any]
BySeed = dict[int, float]


@cache
def read(pattern: str) -> tuple[Row, ...]:
    """The rows of ``experiments/PATTERN``; every file of results.

    Raises:
      FileNotFoundError: no file matches.
    """
    paths = sorted(EXPERIMENTS.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no file matches {EXPERIMENTS / pattern}")
    return tuple(row for path in paths for _, row in read_json_lines(path))


@cache
def _grouped(pattern: str, kind: str, fields: tuple[str, ...]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in read(pattern):
        if row["kind"] == kind:
            groups.setdefault(tuple(row.get(name) for name in fields), []).append(row)
    return groups


def select(pattern: str, kind: str, **wanted: Any) -> list[Row]:
    """Rows of a kind with these fields.

    Raises:
      LookupError: there is none.
    """
    found = _grouped(pattern, kind, tuple(wanted)).get(tuple(wanted.values()))
    if not found:
        raise LookupError(f"{pattern} has no {kind!r} row with {wanted}")
    return found


def _by_seed(rows: Iterable[Row], number: Callable[[Any], float]) -> BySeed:
    seeds: dict[int, list[Row]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], []).append(row)
    return {seed: float(number(add_up(of_seed))) for seed, of_seed in sorted(seeds.items())}


@cache
def loss(pattern: str, variant: str, context: int, split: str = "validation") -> BySeed:
    """Nats per token on the same tokens, all documents together."""
    wanted = {"variant": variant, "context": context, "split": split, "protocol": "same-tokens"}
    return _by_seed(select(pattern, "perplexity", **wanted), lambda sums: sums.loss())


class Losses(NamedTuple):
    """Losses of an experiment's variants, by the names that stand on its page.

    Attributes:
      pattern: of its files of rows.
      variants: the name of each in the rows.
      length, longest: tokens of L and of 16L.
    """

    pattern: str
    variants: Mapping[str, str]
    length: int
    longest: int

    def at(self, variant: str, context: int) -> BySeed:
        return loss(self.pattern, self.variants[variant], context)

    def gap(self, variant: str) -> BySeed:
        """Loss at 16L minus loss at L."""
        return minus(self.at(variant, self.longest), self.at(variant, self.length))

    def behind(self, one: str, other: str, context: int) -> BySeed:
        """How many nats a token ``one`` loses more than ``other``."""
        return minus(self.at(one, context), self.at(other, context))


def accuracy(
    pattern: str, variant: str, contexts: Sequence[int], kind: str = "retrieval", **wanted: Any
) -> BySeed:
    """Percent of trials that are right, over all ``contexts`` together."""
    fields = {"variant": variant} | wanted
    rows = [row for c in contexts for row in select(pattern, kind, context=c, **fields)]
    return _by_seed(rows, lambda sums: sums.accuracy())


class Answers(NamedTuple):
    """Right answers of an experiment's variants, by the names that stand on its page.

    Attributes:
      pattern: of its files of rows.
      variants: the name of each in the rows.
      length, beyond: tokens of L, and of the contexts beyond it.
      kind: of row.
      wanted: fields of these rows, such as the task.
    """

    pattern: str
    variants: Mapping[str, str]
    length: int
    beyond: Sequence[int]
    kind: str
    wanted: Mapping[str, str]

    def right(self, name: str, *contexts: int) -> BySeed:
        """Percent of trials that are right, over all ``contexts`` together."""
        variant = self.variants[name]
        return accuracy(self.pattern, variant, contexts, self.kind, **self.wanted)

    def apart(self, one: str, other: str) -> BySeed:
        """Points by which ``one`` answers more than ``other``, over all lengths beyond L."""
        return minus(self.right(one, *self.beyond), self.right(other, *self.beyond))

    def differences(self, name: str) -> list[str]:
        """The cells of ``name`` minus RoPE's and minus the floor's; empty for itself."""
        others = ("RoPE", "floor alone")
        return ["" if name == other else starred(self.apart(name, other), 1) for other in others]

    def extremes(self, name: str, context: int) -> tuple[float, float]:
        """The lowest and the highest seed, in percent."""
        seeds = self.right(name, context).values()
        return min(seeds), max(seeds)

    def trials(self) -> int:
        """Of a seed and length."""
        fields = {"variant": "fope", "context": self.length, "seed": 0} | self.wanted
        return sum(row["total"] for row in select(self.pattern, self.kind, **fields))


def recall(
    pattern: str, variants: Mapping[str, str], length: int, beyond: Sequence[int]
) -> Answers:
    """Answers of the task recall."""
    return Answers(pattern, variants, length, beyond, "retrieval", {"task": "recall"})


def passkeys(
    pattern: str, variants: Mapping[str, str], length: int, beyond: Sequence[int], template: str
) -> Answers:
    """Keys found, all depths together."""
    return Answers(pattern, variants, length, beyond, "passkey", {"template": template})


def late_loss(pattern: str, after: float) -> float:
    """Nats per token of the training batches of the updates beyond ``after``."""
    return add_up(row for row in select(pattern, "train") if row["step"] > after).loss()


# ---------------------------------------------------------------------------- of numbers by seed


def minus(one: BySeed, other: BySeed) -> BySeed:
    """Paired differences, over the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in one.keys() & other.keys()}


def over(one: BySeed, other: BySeed) -> BySeed:
    """Paired ratios."""
    return {seed: one[seed] / other[seed] for seed in one.keys() & other.keys()}


def exp(numbers: BySeed) -> BySeed:
    return {seed: math.exp(number) for seed, number in numbers.items()}


def mean(numbers: BySeed) -> float:
    return spread(list(numbers.values())).mean


def spread_of(numbers: BySeed) -> Spread:
    """Mean and sample standard deviation over seeds."""
    return spread(list(numbers.values()))


def interval(differences: BySeed) -> Difference:
    """The 95% interval of a mean of paired differences."""
    difference = paired_difference(differences, dict.fromkeys(differences, 0.0))
    assert difference is not None, "no seeds"
    return difference


def ends(differences: BySeed, sign: int = 1) -> tuple[float, float]:
    """Mean and half width, as "0.187 ± 0.167"; ``sign=-1`` for "smaller by"."""
    difference = interval(differences)
    return sign * difference.mean, difference.half_width


def holm_count(differences: Mapping[Any, BySeed]) -> int:
    """How many intervals leave out 0 with all tested together (Holm 1979), at any seed count.

    The report's `holm` asks for five seeds.
    """
    count = 0
    for p in sorted(interval(each).p for each in differences.values()):
        if p > (1 - LEVEL) / (len(differences) - count):
            break
        count += 1
    return count


# ---------------------------------------------------------------------------- as cells


def plus_minus(numbers: Spread, digits: int) -> str:
    """``12.3 ± 0.4``: mean and sample standard deviation.

    >>> plus_minus(Spread(8900.4, 12.0, 3), 0)
    '8,900 ± 12'
    """
    return f"{numbers.mean:,.{digits}f} ± {numbers.deviation:,.{digits}f}"


def starred(differences: BySeed, digits: int = 3) -> str:
    """``-0.306 ± 0.055 *``: mean, 95% interval, and whether that leaves out 0."""
    difference = interval(differences)
    mark = " *" if difference.leaves_out_zero else ""
    return f"{difference.mean:+.{digits}f} ± {difference.half_width:.{digits}f}{mark}"
