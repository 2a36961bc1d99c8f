"""Attention logits as a non-uniform Fourier sum over a method's own frequencies (Eq. 1-5).

For a query q at position p and a key k at position r, both before the rotation, each pair of
dimensions read as a complex number,

    q.k after the rotation = Re sum_f G_f exp((i w_f + g_f) p)
    G_f = sum_m q_m conj(k_m) conj(u_m(r)) c_mf                     (``series.Series``)

With the key at position 0, RoPE's coefficients are the products q_m conj(k_m) alone and p is the
distance: the paper's h(n) = sum_m H_m exp(i w_m n). FoPE's depend on r: its logits are a function
of both positions.

Reference: Hua et al. 2025, "Fourier Position Embedding", Eq. 1-5.
"""

from __future__ import annotations

import numpy as np

from fope_jax.spectrum.series import Series, factors


def attention_coefficients(
    series: Series, q: np.ndarray, k: np.ndarray, key_positions: np.ndarray | int = 0
) -> np.ndarray:
    """G_f of pairs of a query and a key.

    Args:
      series: of their layer.
      q: ``[..., N, H]`` before the rotation.
      k: ``[..., N, H]`` before the rotation, key-value heads repeated.
      key_positions: ``[...]`` tokens, r.

    Returns:
      ``[..., N, F]`` complex.
    """
    q, k = as_complex(series, q), as_complex(series, k)
    turned = factors(series, np.asarray(key_positions), of_keys=True)
    return np.einsum("...nm,nmf->...nf", q * np.conj(k * turned), series.coefficients)


def as_complex(series: Series, x: np.ndarray) -> np.ndarray:
    """Pairs of dimensions of ``x [..., H]`` as complex numbers ``[..., P]``."""
    x = np.asarray(x, np.float64)
    return x[..., series.pairs[:, 0]] + 1j * x[..., series.pairs[:, 1]]


def components(series: Series, coefficients: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The part h_f of the logits that each frequency carries.

        h_f(p) = Re G_f exp((i w_f + g_f) p),  and without growth h_f(p + 2 pi / w_f) = h_f(p)

    Args:
      series: of the layer.
      coefficients: ``[..., F]`` from ``attention_coefficients``.
      positions: ``[T]`` of the query, not necessarily whole, so that a period can be met exactly.

    Returns:
      ``[..., F, T]``; their sum over F is q.k, before it is divided by sqrt(H).

    Reference: Hua et al. 2025, Eq. 4-5.
    """
    waves = np.exp(np.multiply.outer(1j * series.frequencies + series.growth, positions))
    return np.real(coefficients[..., None] * waves)


def fit(signal: np.ndarray, frequencies: np.ndarray, cut: float = 0.1) -> np.ndarray:
    """Least-squares amplitudes of a real signal over ``frequencies``: what a training length shows.

        signal(n) ~ Re sum_f a_f exp(i w_f n),  n = 0 .. T - 1

    Args:
      signal: ``[T]``.
      frequencies: ``[F]`` radians per token.
      cut: directions that hold less than this of the largest singular value stay unused: the
        signal hardly determines them, and extended they would outgrow everything.

    Returns:
      ``[F]`` complex.
    """
    n = np.arange(len(signal))
    phase = np.multiply.outer(n, frequencies)
    basis = np.concatenate([np.cos(phase), -np.sin(phase)], axis=1)
    found = np.linalg.lstsq(basis, signal, rcond=cut)[0]
    return found[: len(frequencies)] + 1j * found[len(frequencies) :]


def extend(amplitudes: np.ndarray, frequencies: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The periodic extension ``Re sum_f a_f exp(i w_f n)`` at any positions ``[T]``."""
    return np.real(np.exp(1j * np.multiply.outer(positions, frequencies)) @ amplitudes)
