"""Spectrum damage: linear layers mix tones and activations create new ones (Eq. 6-8).

Equations are those of Hua et al. 2025, "Fourier Position Embedding".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Activation = Callable[[np.ndarray], np.ndarray]


def damaged_tone(
    share: float, frequency: float, leaked: float, positions: np.ndarray
) -> np.ndarray:
    """A dimension of one frequency into which another has leaked (Eq. 6), ``[T]`` complex.

        h(n) = (1 - s) exp(i w_m n) + s exp(i w_o n)

    for s = ``share``, w_m = ``frequency`` and w_o = ``leaked`` (radians per token). It is no longer
    periodic in 2 pi / w_m, unless w_o is a multiple of w_m.
    """
    tones = np.exp(1j * np.multiply.outer([frequency, leaked], positions))
    return np.array([1 - share, share]) @ tones


def leaked_amplitudes(weight: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """Amplitudes ``[K, M]`` of tone m in output k of a linear layer ``weight [K, M]`` (Eq. 7).

        y_k(n) = sum_m W_km a_m exp(i w_m n)   has   Y_k(w_m) = W_km a_m, and no other frequency

    Input m carries the tone w_m with amplitude a_m.
    """
    return np.asarray(weight) * np.asarray(amplitudes)


def harmonics(
    activation: Activation, amplitude: float, count: int, points: int = 2**16
) -> np.ndarray:
    """The first coefficients ``[count]`` of the Fourier series of an activation of a tone.

        f(a cos(t)) = sum_j c_j cos(j t),   c_j = (1 or 2) / 2 pi * integral f(a cos t) cos(j t) dt

    Exact for polynomials; else harmonics above ``points / 2`` alias onto the first ones.

    >>> (harmonics(lambda x: x**2, 2.0, 4).round(6) + 0.0).tolist()
    [2.0, 0.0, 2.0, 0.0]

    Reference: Lemma 3.1 and Eq. 14-18, there by Taylor expansion.
    """
    turn = 2 * np.pi * np.arange(points) / points
    coefficients = np.fft.rfft(activation(amplitude * np.cos(turn))).real[:count] / points
    coefficients[1:] *= 2
    return coefficients


def intermodulation(
    activation: Activation, amplitudes: tuple[float, float], order: int, points: int = 512
) -> dict[tuple[int, int], float]:
    """Products c_jk with |j| + |k| <= order that an activation makes of two tones (Eq. 8).

        f(a_1 cos(t_1) + a_2 cos(t_2)) = sum_jk c_jk cos(j t_1 + k t_2)

    Tones w_1 and w_2 give one at every |j w_1 + k w_2|. (j, k) also stands for (-j, -k).

    >>> products = intermodulation(lambda x: x**2, (1.0, 1.0), 2)
    >>> {jk: round(c, 6) for jk, c in products.items() if abs(c) > 1e-9}
    {(0, 0): 1.0, (0, 2): 0.5, (1, -1): 1.0, (1, 1): 1.0, (2, 0): 0.5}
    """
    wave = np.cos(2 * np.pi * np.arange(points) / points)
    samples = activation(np.add.outer(amplitudes[0] * wave, amplitudes[1] * wave))
    coefficients = np.fft.fft2(samples).real / points**2
    return {
        (j, k): float(coefficients[j, k] * (1 if j == k == 0 else 2))
        for j in range(order + 1)
        for k in range(-order, order + 1)
        if abs(j) + abs(k) <= order and (j > 0 or k >= 0)
    }


def predicted_lines(
    products: dict[tuple[int, int], float], first: float, second: float
) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and amplitudes ``[J]`` of ``products`` in the spectrum of a sampled signal.

    Frequencies are in radians per token, aliased to 0 .. pi; w_1 = ``first`` and w_2 = ``second``.
    """
    turns = np.array([j * first + k * second for j, k in products]) % (2 * np.pi)
    return np.minimum(turns, 2 * np.pi - turns), np.array(list(products.values()))
