"""Which differences between variants are significant: paired by seed, with intervals and ranks.

Runs of one seed share initial draws and batches, so their difference is less noisy than either
run. The interval of the mean difference d of n seeds is

    d  ±  t(0.975, n - 1) * s / sqrt(n),      s the sample standard deviation of the n differences,

which assumes normal differences. Few seeds bear little:

    seeds      what is shown
    1 or 2     the difference; no statement
    3 or 4     its interval, and ° where that leaves out 0; not called significant
    5 or more  its interval, and * where that leaves out 0: significant at 95%

Some of many pairs would be significant by chance; `holm` corrects for that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fope_jax.report.comparison import Comparison, differing_keys
from fope_jax.report.rows import Run
from fope_jax.report.sums import Metric, add_up, spread

LEVEL = 0.95
SEEDS_FOR_INTERVAL, SEEDS_FOR_SIGNIFICANCE = 3, 5
Numbers = Mapping[str, Mapping[int, float]]  # label -> seed -> number


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of one variant's number minus another's."""

    mean: float
    half_width: float  # of the 95% interval; NaN with one seed
    p: float  # of the two-sided paired t-test; NaN with one seed
    seeds: int

    @property
    def has_interval(self) -> bool:
        return self.seeds >= SEEDS_FOR_INTERVAL

    @property
    def leaves_out_zero(self) -> bool:
        return self.has_interval and abs(self.mean) > self.half_width

    @property
    def is_significant(self) -> bool:
        return self.leaves_out_zero and self.seeds >= SEEDS_FOR_SIGNIFICANCE

    @property
    def mark(self) -> str:
        """``*`` where significant, ``°`` where only the interval of a few seeds leaves out 0."""
        return "*" if self.is_significant else "°" if self.leaves_out_zero else ""

    def text(self, digits: int = 3) -> str:
        """``mean ± half width mark``; the mean alone where there are too few seeds."""
        mean = f"{self.mean:+.{digits}f}"
        if not self.has_interval:
            return mean
        return f"{mean} ± {self.half_width:.{digits}f} {self.mark}".rstrip()


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """``one - other`` over the shared seeds; None where there are none.

    >>> paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.9, 1: 1.9, 2: 3.0}).text()
    '+0.067 ± 0.143'
    """
    pairs = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not pairs:
        return None
    mean, deviation, count = spread(pairs)
    if count < 2:
        return Difference(mean, math.nan, math.nan, count)
    from scipy import stats  # slow to import

    error = deviation / math.sqrt(count)
    if not error:
        return Difference(mean, 0.0, float(mean == 0), count)
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, error * float(stats.t.ppf((1 + LEVEL) / 2, count - 1)), p, count)


def holm(differences: Mapping[tuple[str, str], Difference]) -> set[tuple[str, str]]:
    """Pairs significant with all of them tested together (Holm 1979, step-down).

    >>> d = lambda p: Difference(1.0, 0.5, p, 5)
    >>> sorted(holm({("a", "b"): d(0.01), ("a", "c"): d(0.04), ("b", "c"): d(0.03)}))
    [('a', 'b')]
    """
    known = [pair for pair, d in differences.items() if d.seeds >= SEEDS_FOR_SIGNIFICANCE]
    significant = set()
    for index, pair in enumerate(sorted(known, key=lambda pair: differences[pair].p)):
        if not differences[pair].p <= (1 - LEVEL) / (len(differences) - index):  # also if NaN
            break
        significant.add(pair)
    return significant


def metric_by_seed(
    comparison: Comparison, metric: Metric, contexts: Collection[int]
) -> dict[str, dict[int, float]]:
    """``{label: {seed: metric of the rows pooled over these contexts}}``."""
    table: dict[str, dict[int, float]] = {}
    for label, seeds in comparison.curves.items():
        for rows in seeds:
            pooled = [row for row in rows if row["context"] in contexts]
            if pooled:
                table.setdefault(label, {})[pooled[0]["seed"]] = metric(add_up(pooled))
    return table


def all_differences(numbers: Numbers) -> dict[tuple[str, str], Difference]:
    """The paired difference of every two labels with a common seed, in the order of ``numbers``."""
    differences = {
        (one, other): paired_difference(numbers[one], numbers[other])
        for one, other in itertools.combinations(numbers, 2)
    }
    return {pair: difference for pair, difference in differences.items() if difference is not None}


def ranks(numbers: Numbers) -> dict[str, float]:
    """Mean rank over the seeds that all labels have; 1 is the smallest number, ties share a rank.

    >>> ranks({"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 0.5}})
    {'a': 1.5, 'b': 1.5}
    """
    seeds = set.intersection(*(set(by_seed) for by_seed in numbers.values()))
    if not seeds:
        return dict.fromkeys(numbers, math.nan)
    from scipy import stats

    values = [[by_seed[seed] for seed in seeds] for by_seed in numbers.values()]
    return dict(zip(numbers, stats.rankdata(values, axis=0).mean(axis=1).tolist(), strict=True))


# Where the text lies may change, but for runs that are compared it may be another text.
_TEXT = ("data.train_files", "data.validation_files", "data.tfds_data_dir")


def config_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Keys in which runs of one seed differ, but for the position embedding: key -> values."""
    differing: dict[str, set[str]] = {}
    for seed in {run.seed for run in runs}:
        alike = [run for run in runs if run.seed == seed]
        for key, values in differing_keys(alike, matter=_TEXT).items():
            if key != "position" and not key.startswith("position."):
                differing.setdefault(key, set()).update(values)
    return {key: sorted(values) for key, values in sorted(differing.items())}
