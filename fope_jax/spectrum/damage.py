"""What layers do to tones: a linear layer mixes them, an activation makes new ones (Eq. 6-8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Activation = Callable[[np.ndarray], np.ndarray]


def damaged_tone(share: float, own: float, other: float, positions: np.ndarray) -> np.ndarray:
    """A dimension that should carry one frequency and carries some of another.

        h(n) = (1 - s) exp(i w_m n) + s exp(i w_o n)

    It has no period 2 pi / w_m any more, unless w_o is a multiple of w_m.

    Args:
      share: s, what leaked in.
      own: w_m, radians per token.
      other: w_o, radians per token.
      positions: ``[T]`` tokens.

    Returns:
      ``[T]`` complex.

    Reference: Hua et al. 2025, "Fourier Position Embedding", Eq. 6.
    """
    return (1 - share) * np.exp(1j * own * positions) + share * np.exp(1j * other * positions)


def leaked_amplitudes(weight: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """Amplitudes of the tones in each output of a linear layer.

        y_k(n) = sum_m W_km a_m exp(i w_m n)   has   Y_k(w_m) = W_km a_m, and no other frequency

    Args:
      weight: ``[K, M]``.
      amplitudes: ``[M]`` complex, input m carries the tone w_m with amplitude a_m.

    Returns:
      ``[K, M]`` complex: output k, frequency m.

    Reference: Hua et al. 2025, Eq. 7.
    """
    return np.asarray(weight) * np.asarray(amplitudes)


def harmonics(
    activation: Activation, amplitude: float, count: int, points: int = 2**16
) -> np.ndarray:
    """The Fourier series of an activation of a tone.

        f(a cos(t)) = sum_j c_j cos(j t),   c_j = (1 or 2) / 2 pi * integral f(a cos t) cos(j t) dt

    Exact for polynomials; else the harmonics above ``points / 2`` fold onto the first ones.

    Args:
      activation: f, element by element.
      amplitude: a.
      count: of harmonics, the constant included.
      points: samples of a period.

    Returns:
      ``[count]``, c_0 the constant.

    >>> (harmonics(lambda x: x**2, 2.0, 4).round(6) + 0.0).tolist()
    [2.0, 0.0, 2.0, 0.0]

    Reference: Hua et al. 2025, Lemma 3.1 and Eq. 14-18, there by Taylor expansion.
    """
    turn = 2 * np.pi * np.arange(points) / points
    found = np.fft.rfft(activation(amplitude * np.cos(turn))).real[:count] / points
    found[1:] *= 2
    return found


def intermodulation(
    activation: Activation, amplitudes: tuple[float, float], order: int, points: int = 512
) -> dict[tuple[int, int], float]:
    """What an activation makes of the sum of two tones.

        f(a_1 cos(t_1) + a_2 cos(t_2)) = sum_jk c_jk cos(j t_1 + k t_2)

    so that tones w_1 and w_2 give one at every |j w_1 + k w_2|.

    Args:
      activation: f.
      amplitudes: a_1, a_2.
      order: the largest |j| + |k|.
      points: samples of a period.

    Returns:
      c_jk by (j, k), j >= 0, and k >= 0 where j = 0: each product once.

    >>> found = intermodulation(lambda x: x**2, (1.0, 1.0), 2)
    >>> {jk: round(c, 6) for jk, c in found.items() if abs(c) > 1e-9}
    {(0, 0): 1.0, (0, 2): 0.5, (1, -1): 1.0, (1, 1): 1.0, (2, 0): 0.5}

    Reference: Hua et al. 2025, Eq. 8.
    """
    turn = 2 * np.pi * np.arange(points) / points
    first, second = np.meshgrid(turn, turn, indexing="ij")
    sampled = activation(amplitudes[0] * np.cos(first) + amplitudes[1] * np.cos(second))
    found = np.fft.fft2(sampled).real / points**2
    return {
        (j, k): float(found[j, k] * (1 if j == k == 0 else 2))
        for j in range(order + 1)
        for k in range(-order, order + 1)
        if abs(j) + abs(k) <= order and (j > 0 or k >= 0)
    }


def predicted_lines(
    products: dict[tuple[int, int], float], first: float, second: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the products of ``intermodulation`` stand in the spectrum of a sampled signal.

    Args:
      products: c_jk.
      first: w_1, radians per token.
      second: w_2, radians per token.

    Returns:
      ``[J]`` radians per token, from 0 to pi (whole tokens do not tell a faster tone from a slower
      one), and ``[J]`` the amplitudes.
    """
    turns = np.array([j * first + k * second for j, k in products]) % (2 * np.pi)
    return np.minimum(turns, 2 * np.pi - turns), np.array(list(products.values()))
