"""The algebra of Eq. 6-8: which tones come out of a linear layer, and out of an activation."""

import math

import numpy as np
import pytest
from scipy.special import erf

from fope_jax.spectrum.damage import (
    damaged_tone,
    harmonics,
    intermodulation,
    leaked_amplitudes,
    predicted_lines,
)

T = 512
N = np.arange(T)


def amplitudes(signal):
    """Of the cosine at each bin, from 0 to pi."""
    found = np.abs(np.fft.rfft(signal)) / T
    found[1 : (T + 1) // 2] *= 2
    return found


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


ACTIVATIONS = {"relu": relu, "gelu": gelu, "cubic": lambda x: x**3 - x**2, "tanh": np.tanh}


def test_tones_through_a_linear_layer_stay_the_tones_that_were_given():
    weight = np.random.default_rng(0).standard_normal((5, 3))
    given, sizes = np.array([7, 40, 41]), np.array([1.0, 0.5, 2.0])
    x = sizes[:, None] * np.cos(2 * np.pi * np.multiply.outer(given, N) / T)
    found = np.array([amplitudes(y) for y in weight @ x])
    np.testing.assert_allclose(found[:, given], np.abs(leaked_amplitudes(weight, sizes)), atol=1e-5)
    elsewhere = np.delete(found, given, axis=1)
    assert elsewhere.max() < 1e-10


def test_a_damaged_tone_has_no_period_of_its_own():
    own, other = 2 * np.pi / 20, 2 * np.pi / 33
    n = np.arange(200)
    np.testing.assert_allclose(
        damaged_tone(0.0, own, other, n + 20), damaged_tone(0.0, own, other, n), atol=1e-12
    )
    apart = np.abs(damaged_tone(0.3, own, other, n + 20) - damaged_tone(0.3, own, other, n))
    expected = 0.3 * abs(np.exp(20j * other) - 1)  # what leaked in, and nothing else, has moved
    np.testing.assert_allclose(apart, expected, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_gives_a_tone_its_harmonics_and_nothing_else(name):
    activation, tone = ACTIVATIONS[name], 6
    found = amplitudes(activation(1.5 * np.cos(2 * np.pi * tone * N / T)))
    # 512 samples do not see harmonics above pi, which fold back: relu's fall as 1 / j^2.
    predicted = np.abs(harmonics(activation, 1.5, 12))
    at = tone * np.arange(12)
    np.testing.assert_allclose(found[at], predicted, atol=2e-3 if name == "relu" else 1e-5)
    assert found[np.arange(len(found)) % 2 == 1].max() < 1e-12  # no multiple of 6, folded or not


def test_harmonics_of_relu_are_the_known_ones():
    """a / pi, a / 2, and (-1)^(j/2 + 1) 2 a / (pi (j^2 - 1)) for even j."""
    a = 0.7
    expected = [a / np.pi, a / 2, 2 * a / (3 * np.pi), 0, -2 * a / (15 * np.pi), 0]
    np.testing.assert_allclose(harmonics(relu, a, 6), expected, atol=1e-8)


def test_harmonics_of_a_polynomial_are_exact():
    """x^3 of a tone: 3/4 a^3 at w and 1/4 a^3 at 3 w."""
    np.testing.assert_allclose(harmonics(lambda x: x**3, 2.0, 5), [0, 6.0, 0, 2.0, 0], atol=1e-12)


@pytest.mark.parametrize("name", ["cubic", "gelu", "tanh"])
def test_two_tones_give_products_at_the_predicted_frequencies(name):
    """j w1 + k w2, with those above pi folded back, and energy nowhere else."""
    activation, first, second = ACTIVATIONS[name], 44, 61
    x = 0.8 * np.cos(2 * np.pi * first * N / T) + 0.5 * np.cos(2 * np.pi * second * N / T)
    found = amplitudes(activation(x))
    products = intermodulation(activation, (0.8, 0.5), 14)
    at, heights = predicted_lines(products, 2 * np.pi * first / T, 2 * np.pi * second / T)
    assert at.max() <= np.pi
    predicted = np.zeros(T // 2 + 1)
    np.add.at(predicted, np.round(at * T / (2 * np.pi)).astype(int), heights)
    np.testing.assert_allclose(found, np.abs(predicted), atol=1e-5)
    assert products[1, 1] != 0
    if name == "tanh":  # odd: only products of odd order
        assert abs(products[1, 1]) < 1e-12 < abs(products[1, 2])


def test_a_square_gives_sum_and_difference():
    products = intermodulation(np.square, (2.0, 3.0), 3)
    seen = {jk: round(c, 9) for jk, c in products.items() if abs(c) > 1e-12}
    assert seen == {(0, 0): 6.5, (2, 0): 2.0, (0, 2): 4.5, (1, 1): 6.0, (1, -1): 6.0}


# ---------------------------------------------------------------------------- the demo's numbers


def test_what_the_demo_shows_is_what_is_predicted(demo_numbers):
    for name in ("linear_lines", "activation_lines"):
        lines = demo_numbers["damage"][name]
        np.testing.assert_allclose(lines["measured"], lines["predicted"], atol=1e-4)
    for tone in demo_numbers["truncation"]["tones"]:
        np.testing.assert_allclose(tone["numeric"], tone["analytic"], atol=1e-9)
    assert [tone["whole"] for tone in demo_numbers["truncation"]["tones"]] == [3, 0]


def test_one_frequency_does_not_extend_a_damaged_dimension(demo_numbers):
    cases = demo_numbers["extension"]["cases"]
    linear, activation = (cases[name]["errors"] for name in ("linear", "activation"))
    assert max(linear["FoPE"]) < 1e-9 < 0.3 < min(linear["RoPE"])
    # A new frequency is none of FoPE's either: better than one, far from those that are there.
    assert activation["frequency-matched"][1] < 0.02
    assert 0.15 < activation["FoPE"][1] < activation["RoPE"][1]


def test_decay_is_that_of_the_means(demo_numbers):
    rows = {row["mean"]: row for row in demo_numbers["decay"]["rows"]}
    for row in rows.values():
        apart = np.abs(np.subtract(row["measured"], row["expected"])) / row["error"]
        assert apart.max() < 4.5  # standard errors, over 513 distances
    assert set(rows[0.0]["expected"]) == {0.0}
    far = rows[1.0]["expected"]
    assert far[0] == 128 and np.mean(far[256:]) < 0.1 * far[0]
