"""The leakage ratio: exact for own tones, predicted for others, known for noise."""

import numpy as np
import pytest

from fope_jax.position import inverse_frequencies
from fope_jax.spectrum.leakage import energies, floor_basis, frequency_basis, leakage
from fope_jax.spectrum.transform import dirichlet

T = 128
N = np.arange(T)
PAIRS = np.arange(T, 0, -1)  # of tokens at each distance
ROPE = inverse_frequencies(32)


@pytest.mark.parametrize("weights", [None, PAIRS], ids=["even", "pairs"])
def test_a_pure_own_tone_does_not_leak(weights):
    """Fast, slow, and slower than the window, with any constant; and so do their sums."""
    basis = frequency_basis(ROPE, T, weights)
    tones = np.cos(np.multiply.outer(ROPE, N) + 0.4) + 3
    assert leakage(tones, basis).max() < 1e-5
    assert leakage(tones.sum(axis=0), basis) < 1e-5


@pytest.mark.parametrize("steps", [0.25, 0.5, 0.8, 1.0, 3.5])
def test_a_tone_beside_its_own_frequency_leaks_what_the_kernel_says(steps):
    """Own frequency on a bin, where its cosine and sine are orthogonal and without a constant."""
    own = 2 * np.pi * 20 / T
    other = own + steps * 2 * np.pi / T
    x = np.cos(other * N + 0.3)
    line = (
        np.exp(0.3j) * dirichlet(own - other, T) + np.exp(-0.3j) * dirichlet(own + other, T)
    ) / 2
    expected = 1 - 2 * abs(line) ** 2 / T / np.sum((x - x.mean()) ** 2)
    found = leakage(x, frequency_basis(np.array([own]), T))
    assert found == pytest.approx(expected, abs=1e-9)
    alone = 1 - abs(dirichlet(steps * 2 * np.pi / T, T) / T) ** 2
    assert found == pytest.approx(alone, abs=0.03)  # as for a complex tone, up to w + w'


def test_white_noise_has_the_null_value():
    noise = np.random.default_rng(0).standard_normal((4000, T))
    for basis in (frequency_basis(ROPE, T), frequency_basis(ROPE, T, centred=False)):
        assert leakage(noise, basis).mean() == pytest.approx(1 - basis.null, abs=2e-3)
    weighted = frequency_basis(ROPE, T, PAIRS)
    assert leakage(noise / np.sqrt(PAIRS), weighted).mean() == pytest.approx(
        1 - weighted.null, abs=2e-3
    )


def test_energy_is_split_in_two():
    x = np.random.default_rng(1).standard_normal((5, T))
    basis = frequency_basis(ROPE, T, PAIRS)
    inside, whole = energies(x, basis)
    mean = (x * PAIRS).sum(axis=1, keepdims=True) / PAIRS.sum()
    np.testing.assert_allclose(whole, np.sum(PAIRS * (x - mean) ** 2, axis=1), rtol=1e-12)
    centred = (x - mean) * basis.scale
    rest = centred - centred @ basis.rows.T @ basis.rows
    np.testing.assert_allclose(whole - inside, np.sum(rest**2, axis=1), rtol=1e-9)


def test_close_frequencies_span_fewer_directions_than_there_are_of_them():
    """RoPE's ten frequencies under 2 pi / 128 are as good as a polynomial there."""
    basis = frequency_basis(ROPE, T)
    assert len(basis.rows) < 2 * 9
    np.testing.assert_allclose(basis.rows @ basis.rows.T, np.eye(len(basis.rows)), atol=1e-10)
    assert np.isnan(leakage(np.full(T, 2.0), basis))


def test_energy_under_the_floor():
    floor = 2 * np.pi / T
    length = 8 * T
    n, pairs = np.arange(length), np.arange(length, 0, -1)
    for weights in (None, pairs):
        basis = floor_basis(floor, length, weights)
        assert len(basis.rows) == 2 * 8 - 1
        slow, fast = np.cos(0.3 * floor * n + 1), np.cos(3 * floor * n + 1)
        assert 1 - leakage(slow + 5, basis) > 0.98
        assert 1 - leakage(fast, basis) < 0.02
        assert abs(leakage(np.full(length, 5.0) + slow, basis) - leakage(slow, basis)) < 1e-9
    assert basis.null == pytest.approx(15 / (length - 1))


def test_within_the_training_length_only_a_trend_is_under_the_floor():
    basis = floor_basis(2 * np.pi / T, T)
    assert len(basis.rows) == 1
    assert 1 - leakage(N.astype(float), basis) > 0.85
    assert 1 - leakage(np.cos(2 * np.pi * 2 * N / T), basis) < 1e-3


def test_windows_that_resolve_nothing_are_refused():
    with pytest.raises(ValueError, match="40 frequencies in a window of 64 tokens: at its "):
        frequency_basis(np.linspace(0.05, 3.0, 40), 64)
    with pytest.raises(ValueError, match=r"a window of 64 tokens holds 0.50 periods .* 128 tokens"):
        floor_basis(2 * np.pi / 128, 64)
