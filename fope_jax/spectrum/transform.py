"""Spectra of sampled signals: windows, periodograms, and a tone cut off by a window (Eq. 9-10)."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.signal
from scipy.special import diric


def nudft(signal: np.ndarray, frequencies: np.ndarray, window: str = "boxcar") -> np.ndarray:
    """The non-uniform discrete Fourier transform, scaled so that a tone gives its amplitude.

        X(w) = sum_n v(n) x(n) exp(-i w n) / sum_n v(n)

    Args:
      signal: ``[..., T]`` real or complex.
      frequencies: ``[F]`` radians per token, any.
      window: name of v in ``scipy.signal.get_window``: "boxcar" (rectangular), "hann", ...

    Returns:
      ``[..., F]`` complex.

    >>> tone = 3 * np.exp(0.3j * np.arange(50))
    >>> nudft(tone, np.array([0.3])).round(6).tolist()
    [(3+0j)]
    """
    length = np.shape(signal)[-1]
    taper = np.asarray(scipy.signal.get_window(window, length))
    waves = np.exp(-1j * np.multiply.outer(np.arange(length), frequencies))
    return (signal * taper) @ waves / taper.sum()


def bin_frequencies(length: int) -> np.ndarray:
    """The frequencies ``2 pi k / T``, k = 0 .. T // 2, of a window of T tokens."""
    return 2 * np.pi * np.arange(length // 2 + 1) / length


def periodogram(signal: np.ndarray, window: str = "boxcar") -> np.ndarray:
    """One-sided energy of a real signal ``[..., T]`` at ``bin_frequencies``, ``[..., T // 2 + 1]``.

        P_k = (1 or 2) |sum_n v(n) x(n) exp(-2 pi i k n / T)| ** 2 / (T sum_n v(n) ** 2)

    The sum over k is the mean square of ``x`` with the rectangular window (Parseval), and in
    expectation with any window for white noise. ``window`` as for ``nudft``.
    """
    keep_mean: Any = False  # scipy documents False, its types know only names
    density = scipy.signal.periodogram(signal, window=window, detrend=keep_mean)[1]
    return density / np.shape(signal)[-1]


# ---------------------------------------------------------------------------- truncation


def dirichlet(offset: np.ndarray, length: int) -> np.ndarray:
    """What a window of T tokens makes of a tone, at ``offset`` from its frequency.

        D(delta) = sum_{n < T} exp(-i delta n)
                 = exp(-i delta (T - 1) / 2) sin(T delta / 2) / sin(delta / 2)

    ``offset [...]`` is w - w_m in radians per token; the result is complex, T at offset 0.

    Reference: Hua et al. 2025, Eq. 9-10, of whose sinc this is the form for whole tokens.
    """
    offset = np.asarray(offset, np.float64)
    return length * diric(offset, length) * np.exp(-0.5j * offset * (length - 1))


def truncated_tone(frequency: float, length: int, at: np.ndarray) -> tuple[int, np.ndarray]:
    """The two terms of a truncated tone as the paper writes them (Eq. 10).

        X(w) = a delta(w - w_m) + sin(R (w - w_m)) / (w - w_m)
        a = floor(N / N_m) whole periods,  R = N - a N_m tokens beyond them,  N_m = 2 pi / w_m

    The tone of whole periods is only itself; the cut-off rest is spread. A frequency whose period
    is longer than the window has a = 0: all of it is spread.

    Args:
      frequency: w_m, radians per token, above 0.
      length: N, tokens.
      at: ``[F]`` w, radians per token.

    Returns:
      a, and the second term ``[F]``.

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
    """Least-squares amplitudes of a real signal over ``frequencies``: what a training length shows.

        signal(n) ~ Re sum_f a_f exp(i w_f n),  n = 0 .. T - 1

    Directions below ``cutoff`` of the largest singular value stay unused: the signal hardly
    determines them, and extrapolated they would outgrow everything. Returns ``[F]`` complex.
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
