"""The tables of README.md, from the rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.pretrained.units import LABELS
from fope_jax.evaluate.metrics import read_rows

RESULTS = Path(__file__).parent / "results"
# The metric of each set: those that others report of this model, and the only one of social_iqa
# that lm-evaluation-harness has.
METRICS = {"piqa": "acc_norm", "social_iqa": "acc", "arc_easy": "acc", "hellaswag": "acc_norm"}

BASELINE = ("rope", 0)  # method and updates


class Difference(NamedTuple):
    """A difference of shares of right answers, in points, and half of its 95% interval."""

    points: float
    around: float


def answers() -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Method and updates -> set -> whether each answer is right, of the set's metric."""
    models: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for row in read_rows(RESULTS / "answers.jsonl"):
        right = np.array([answer == "1" for answer in row[METRICS[row["set"]]]])
        models.setdefault((row["method"], row["updates"]), {})[row["set"]] = right
    return models


def share(right: np.ndarray) -> Difference:
    """Per cent that are right; the interval is over items."""
    return difference(right, np.zeros_like(right))


def difference(right: np.ndarray, baseline: np.ndarray) -> Difference:
    """Of two models on the same items, item by item; the interval is over items."""
    points = 100 * (right.astype(float) - baseline)
    return Difference(
        float(points.mean()), 1.96 * float(points.std(ddof=1)) / math.sqrt(len(points))
    )


def joined(of_sets: dict[str, np.ndarray]) -> np.ndarray:
    """The answers of all sets, which have as many items each."""
    return np.concatenate([of_sets[name] for name in METRICS])


def all_tables() -> str:
    """Shares of right answers, and all four sets against RoPE as it was published."""
    models = answers()
    lines = [
        f"| | {' | '.join(METRICS)} | all | all minus RoPE |",
        "|---" * (len(METRICS) + 3) + "|",
    ]
    for model, sets in models.items():
        if sets.keys() != METRICS.keys():
            continue
        cells = [f"{share(sets[name]).points:.1f}" for name in METRICS]
        whole = share(joined(sets))
        cells.append(f"{whole.points:.1f} ± {whole.around:.1f}")
        away = difference(joined(sets), joined(models[BASELINE]))
        cells.append("" if model == BASELINE else f"{away.points:+.1f} ± {away.around:.1f}")
        method, updates = model
        label = LABELS[method] + (", trained" if updates else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)
