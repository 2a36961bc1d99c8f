"""Spectra of sampled signals: transforms, a tone cut off by a window, and extrapolation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import diric


def nudft(signal: np.ndarray, frequencies: np.ndarray, window: str = "boxcar") -> np.ndarray:
    """The non-uniform discrete Fourier transform ``[..., F]``, complex; a tone gives its amplitude.

        X(w) = sum_n v(n) x(n) exp(-i w n) / sum_n v(n)

    Args:
      signal: ``[..., T]`` real or complex.
      frequencies: ``[F]`` radians per token.
      window: name of v in ``scipy.signal.get_window``: "boxcar" (rectangular), "hann", ...

    >>> tone = 3 * np.exp(0.3j * np.arange(50))
    >>> nudft(tone, np.array([0.3])).round(6).tolist()
    [(3+0j)]
    """
    from scipy.signal import get_window  # slow to import

    length = np.shape(signal)[-1]
    taper = np.asarray(get_window(window, length))
    waves = np.exp(-1j * np.multiply.outer(np.arange(length), frequencies))
    return (signal * taper) @ waves / taper.sum()


def bin_frequencies(length: int) -> np.ndarray:
    """The frequencies ``2 pi k / T``, k = 0 .. T // 2, of a window of T tokens."""
    return 2 * np.pi * np.arange(length // 2 + 1) / length


def periodogram(signal: np.ndarray, window: str = "boxcar") -> np.ndarray:
    """One-sided energy ``[..., T // 2 + 1]`` of a real signal ``[..., T]`` at ``bin_frequencies``.

        P_k = (1 or 2) |sum_n v(n) x(n) exp(-2 pi i k n / T)| ** 2 / (T sum_n v(n) ** 2)

    The sum over k is the mean square of ``x``: exactly with the rectangular window (Parseval), and
    in expectation with any window for white noise.
    """
    from scipy import signal as scipy_signal

    keep_mean: Any = False  # scipy documents False; its type stubs lack it
    density = scipy_signal.periodogram(signal, window=window, detrend=keep_mean)[1]
    return density / np.shape(signal)[-1]


# ---------------------------------------------------------------------------- truncation


def dirichlet(offset: np.ndarray, length: int) -> np.ndarray:
    """The transform of a tone in a window of T tokens, at ``offset`` from its frequency; complex.

        D(delta) = sum_{n < T} exp(-i delta n)
                 = exp(-i delta (T - 1) / 2) sin(T delta / 2) / sin(delta / 2)

    ``offset [...]`` is w - w_m in radians per token.

    Reference: Hua et al. 2025, Eq. 9-10, whose sinc this replaces for sampled signals.
    """
    offset = np.asarray(offset, np.float64)
    return length * diric(offset, length) * np.exp(-0.5j * offset * (length - 1))


def truncated_tone(frequency: float, length: int, at: np.ndarray) -> tuple[int, np.ndarray]:
    """The two terms of a truncated tone: a, and the second term ``[F]`` (Eq. 10).

        X(w) = a delta(w - w_m) + sin(R (w - w_m)) / (w - w_m)
        a = floor(N / N_m) whole periods,  R = N - a N_m tokens beyond them,  N_m = 2 pi / w_m

    Whole periods stay a line; the rest is spread over frequencies, all of it if the period exceeds
    the window. w_m = ``frequency`` > 0 and w = ``at [F]`` are radians per token, N = ``length``
    tokens.

    Reference: Hua et al. 2025, Eq. 10 and Appendix C.2.
    """
    if not frequency > 0:
        raise ValueError(f"frequency={frequency}: a tone that is cut off has one above 0")
    period = 2 * np.pi / frequency
    whole = int(length / period + 1e-9)
    rest = length - whole * period
    # np.sinc(x) is sin(pi x) / (pi x)
    return whole, rest * np.sinc(rest * (np.asarray(at) - frequency) / np.pi)


# ---------------------------------------------------------------------------- extrapolation


def fit_amplitudes(signal: np.ndarray, frequencies: np.ndarray, cutoff: float = 0.1) -> np.ndarray:
    """Least-squares amplitudes ``[F]``, complex, of a real signal over ``frequencies``.

        signal(n) ~ Re sum_f a_f exp(i w_f n),  n = 0 .. T - 1

    Directions below ``cutoff`` of the largest singular value are left out: the signal hardly
    determines them, and they would dominate an extrapolation.
    """
    phase = np.multiply.outer(np.arange(len(signal)), frequencies)
    basis = np.concatenate([np.cos(phase), -np.sin(phase)], axis=1)
    solution = np.linalg.lstsq(basis, signal, rcond=cutoff)[0]
    return solution[: len(frequencies)] + 1j * solution[len(frequencies) :]


def extrapolate(
    amplitudes: np.ndarray, frequencies: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """The periodic extension ``Re sum_f a_f exp(i w_f n)`` at any positions ``[T]``."""
    return np.real(np.exp(1j * np.multiply.outer(positions, frequencies)) @ amplitudes)
