"""Spectra of known signals."""

import numpy as np
import pytest

from fope_jax.spectrum.transform import (
    bin_frequencies,
    dirichlet,
    nudft,
    periodogram,
    truncated_tone,
)


@pytest.mark.parametrize("window", ["boxcar", "hann", "blackmanharris"])
def test_a_tone_has_its_amplitude_at_its_frequency(window):
    tone = (2 - 1j) * np.exp(0.7j * np.arange(200))
    assert abs(nudft(tone, np.array([0.7]), window)[0] - (2 - 1j)) < 1e-5


def test_the_transform_at_the_bins_is_the_fft():
    signal = np.random.default_rng(0).standard_normal((3, 50))
    found = nudft(signal, bin_frequencies(50))
    np.testing.assert_allclose(found, np.fft.rfft(signal) / 50, atol=1e-12)


@pytest.mark.parametrize("length", [63, 64])
def test_energy_is_conserved(length):
    """Parseval, for an odd and an even number of tokens."""
    signal = np.random.default_rng(1).standard_normal((4, length)) + 0.5
    np.testing.assert_allclose(
        periodogram(signal).sum(axis=-1), np.mean(signal**2, axis=-1), rtol=1e-12
    )


def test_a_window_keeps_the_energy_of_noise_and_narrows_a_tone():
    rng = np.random.default_rng(2)
    noise = periodogram(rng.standard_normal((4000, 64)), "hann").sum(axis=-1)
    assert abs(noise.mean() - 1) < 0.02
    tone = np.cos(1.0 * np.arange(256))  # between two bins
    far = np.abs(bin_frequencies(256) - 1.0) > 0.3
    boxcar, hann = (periodogram(tone, window)[far].sum() for window in ("boxcar", "hann"))
    assert hann < 1e-3 * boxcar


@pytest.mark.parametrize("length", [1, 7, 64])
def test_a_truncated_tone_is_a_dirichlet_kernel(length):
    """Numeric against analytic, at its own frequency and a turn away as well."""
    w, at = 0.31, np.array([0.31, 0.3, 0.5, 2.0, -1.0, 0.31 + 2 * np.pi])
    tone = np.exp(1j * w * np.arange(length))
    np.testing.assert_allclose(
        length * nudft(tone, at), dirichlet(at - w, length), atol=1e-9 * length
    )


def test_truncation_splits_a_tone_into_whole_periods_and_a_rest():
    """Eq. 10: at multiples of w the whole periods vanish, and the rest alone is the spectrum.

    The paper's window reaches R on both sides of its middle: a rest of 2 R is compared with.
    """
    period, length = 400.0, 1000.0
    w = 2 * np.pi / period
    at = np.array([2.0, 3.0, 7.0]) * w
    whole, _ = truncated_tone(w, 1000, at)
    assert whole == 2
    fine = np.arange(0, length, 0.01)
    numeric = np.abs(np.exp(1j * np.multiply.outer(w - at, fine)).sum(axis=-1) * 0.01)
    _, half = truncated_tone(w, 900, at)  # a rest of 100 on each side
    np.testing.assert_allclose(numeric, 2 * np.abs(half), atol=0.05)


def test_a_tone_slower_than_the_window_is_all_spread():
    whole, spread = truncated_tone(2 * np.pi / 100, 64, np.array([2 * np.pi / 100]))
    assert (whole, spread.item()) == (0, 64.0)
    whole, spread = truncated_tone(2 * np.pi / 16, 64, np.array([0.1, 2 * np.pi / 16]))
    assert whole == 4
    np.testing.assert_allclose(spread, 0, atol=1e-9)  # periods that fit spread nothing
    with pytest.raises(ValueError, match="frequency=0: a tone that is cut off has one above 0"):
        truncated_tone(0, 64, np.array([0.1]))
