"""Numbers of a run's spectrum, and the interval of their correlation with the gap."""

from pathlib import Path

import numpy as np
import pytest

from fope_jax.report.correlation import correlate, spectrum_points
from fope_jax.report.rows import Run

# context -> profile energy, leakage and energy under the floor of two heads
HEADS = {
    64: ([1.0, 1.0], [0.9, 0.9], [0.9, 0.9]),
    128: ([3.0, 1.0], [0.2, 0.6], [0.7, 0.7]),
    256: ([1.0, 1.0], [0.8, 0.8], [0.8, 0.8]),
    512: ([1.0, 4.0], [0.5, 0.7], [0.1, 0.6]),
}


def numbers_at(*contexts):
    """The numbers of a run trained on 128 tokens and measured at these contexts."""
    rows = [
        {
            "kind": "spectrum",
            "step": 9,
            "split": "validation",
            "context": context,
            "profile_energy": HEADS[context][0],
            "leakage": HEADS[context][1],
            "floor_energy": HEADS[context][2],
            "undertrained_energy": [0.2, 0.6],
            "q_leakage": 0.5,
            "k_leakage": 0.7,
        }
        for context in contexts
    ]
    config = {"name": "rope", "seed": 0, "train": {"length": 128}}
    (point,) = spectrum_points([Run(Path("rope"), config, {}, tuple(rows), 9)])
    return point.numbers


def test_heads_count_by_their_profile_energy_where_they_are_pooled():
    assert numbers_at(64, 128, 256, 512) == pytest.approx(
        {
            "logits' leakage ratio": (3 * 0.2 + 0.6) / 4,
            "energy under the floor, longest context": (0.1 + 4 * 0.6) / 5,
            "undertrained energy": 0.4,
            "leakage ratio of q and k": 0.6,
        }
    )


@pytest.mark.parametrize(
    ("contexts", "leakage", "floor"),
    [((64, 128, 256), 0.3, 0.8), ((512, 256), 0.8, 0.5), ((64,), 0.9, 0.9)],
)
def test_numbers_are_at_the_training_length_or_else_the_shortest_and_at_the_longest(
    contexts, leakage, floor
):
    numbers = numbers_at(*contexts)
    assert numbers["logits' leakage ratio"] == pytest.approx(leakage)
    assert numbers["energy under the floor, longest context"] == pytest.approx(floor)


@pytest.mark.parametrize(
    ("y", "is_reached"), [((1, 0, 2, 4, 3), False), ((2, 3, 0, 1, 4), True)], ids=["1.9%", "3.8%"]
)
def test_an_interval_leaves_out_a_fortieth_of_the_draws_at_each_end(y, is_reached):
    """A draw of five variants that holds two alone has r = rho = ±1.

    For each pair these are 30 of the 3,120 draws that hold more than one. Two falling pairs are
    1.9% of the draws and below the interval, four are 3.8% and reach into it.
    """
    x, y = np.arange(5.0), np.array(y, float)
    falling = sum(y[i] > y[j] for j in range(5) for i in range(j))
    assert (falling * 30 / 3120 > 0.025) == is_reached
    own, turned = correlate(x, y, list("abcde")), correlate(x, -y, list("abcde"))
    lows = [own.pearson_interval[0], own.spearman_interval[0]]
    highs = [turned.pearson_interval[1], turned.spearman_interval[1]]
    assert lows == pytest.approx([-1, -1]) if is_reached else min(lows) > -0.99
    assert highs == pytest.approx([1, 1]) if is_reached else max(highs) < 0.99
