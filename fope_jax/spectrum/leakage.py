"""Leakage: the share of a signal's energy that is not at given frequencies.

    leakage = 1 - <P x, P x> / <x, x>,   <x, y> = sum_n v(n) x(n) y(n)

for a real signal x at tokens n = 0 .. T - 1, weights v(n) of its samples, and P the projection on
the span of cos(w n) and sin(w n) for the frequencies w; the constant is removed from both.

- A tone at a given frequency has leakage 0, whether or not the window holds whole periods.
- The resolution is 2 pi / T. A tone that far from a lone frequency has leakage 1; at offset delta a
  complex tone keeps |D(delta) / T| ** 2 (``transform.dirichlet``), 0.41 at half a step.
- Frequencies closer than the resolution to each other, or to 0, are not independent. Directions
  below ``TOLERANCE`` of the largest singular value are left out; the rest is the rank R.
- White noise has mean leakage 1 - R / (T - 1): the null value to compare with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import null_space

TOLERANCE = 1e-4  # of the largest singular value; a tone along a dropped direction loses 1e-7


class Basis(NamedTuple):
    """Orthonormal directions in the weighted samples.

    Attributes:
      rows: ``[R, T]``, orthonormal for signals multiplied by ``scale``.
      scale: ``[T]`` square roots of the weights.
      centred: whether the constant is removed.
    """

    rows: np.ndarray
    scale: np.ndarray
    centred: bool

    @property
    def null(self) -> float:
        """The share of white noise that lies in the basis."""
        return len(self.rows) / (len(self.scale) - self.centred)


def frequency_basis(
    frequencies: np.ndarray, length: int, weights: np.ndarray | None = None, centred: bool = True
) -> Basis:
    """Cosines and sines of ``frequencies [F]`` (radians per token) over ``length`` samples.

    ``weights [T]`` None are equal. ``centred`` removes the constant, which a softmax does not see.

    Raises:
      ValueError: the basis fills more than half of all directions.
    """
    scale = _scale(length, weights)
    phase = np.multiply.outer(frequencies, np.arange(length))
    rows = _unit_rows(np.concatenate([np.cos(phase), np.sin(phase)]) * scale)
    rows = _orthonormal(_remove_constant(rows, scale) if centred else rows)
    if len(rows) > (length - centred) / 2:
        raise ValueError(
            f"{len(frequencies)} frequencies in a window of {length} tokens: at its resolution of "
            f"2 pi / {length} they fill {len(rows)} of {length - centred} directions, and what "
            "lies elsewhere says nothing; take a longer window"
        )
    return Basis(rows, scale, centred)


def floor_basis(floor: float, length: int, weights: np.ndarray | None = None) -> Basis:
    """All frequencies under ``floor`` (radians per token) that T samples resolve.

    These are the first ``2 T floor / 2 pi`` discrete prolate spheroidal sequences, whose energy is
    mostly below the floor, without the constant. In the training length (T = L) only the trend is
    left, which holds 0.84 of the energy of a sine at the floor.

    Raises:
      ValueError: the window is shorter than the period of the floor.

    Reference: Slepian 1978, "Prolate Spheroidal Wave Functions, Fourier Analysis, and Uncertainty
    V".
    """
    turns = length * floor / (2 * np.pi)
    if turns < 1 - 1e-9:
        raise ValueError(
            f"a window of {length} tokens holds {turns:.2f} periods of the floor {floor:.4g}: it "
            f"takes {np.ceil(2 * np.pi / floor):.0f} tokens or more to resolve what is under it"
        )
    from scipy.signal.windows import dpss  # slow to import

    scale = _scale(length, weights)
    rows = _orthonormal(_unit_rows(np.asarray(dpss(length, turns, round(2 * turns))) * scale))
    # Subtracting the constant would leave energy above the floor in the direction nearest to it.
    orthogonal = null_space((rows @ scale)[None])
    return Basis(orthogonal.T @ rows, scale, centred=True)


def _scale(length: int, weights: np.ndarray | None) -> np.ndarray:
    return np.sqrt(np.ones(length) if weights is None else np.asarray(weights, np.float64))


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(sizes == 0, 1.0, sizes)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[values > TOLERANCE * values.max(initial=0.0)]


def _remove_constant(scaled: np.ndarray, scale: np.ndarray) -> np.ndarray:
    constant = scale / np.linalg.norm(scale)
    return scaled - (scaled @ constant)[..., None] * constant


def energies(signal: np.ndarray, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """``<P x, P x>`` and ``<x, x>``, ``[...]`` each, of a real ``signal [..., T]``."""
    scaled = np.asarray(signal, np.float64) * basis.scale
    if basis.centred:
        scaled = _remove_constant(scaled, basis.scale)
    return np.sum((scaled @ basis.rows.T) ** 2, axis=-1), np.sum(scaled**2, axis=-1)


def leakage(signal: np.ndarray, basis: Basis) -> np.ndarray:
    """``1 - <P x, P x> / <x, x>`` of ``signal [..., T]``; NaN of a constant.

    >>> n = np.arange(64)
    >>> basis = frequency_basis(np.array([0.3, 0.7]), 64)
    >>> abs(leakage(np.cos(0.3 * n) - 2 * np.sin(0.7 * n) + 5, basis).item()) < 1e-12
    True
    """
    inside, whole = energies(signal, basis)
    given = np.sum((np.asarray(signal, np.float64) * basis.scale) ** 2, axis=-1)
    return 1 - inside / np.where(whole <= 1e-24 * given, np.nan, whole)  # else rounding noise
