"""What the logits' leakage is where nothing leaks: `python -m experiments.spectra.null`.

Entries of q and k are drawn from N(mu, 1), anew for each token, and turned by RoPE. Then every
logit is a sum of RoPE's own frequencies, and so is the expected logit by distance,

    E[q.k](d) = 2 mu^2 sum_m cos(w_m d),

whose leakage is 0. The mean over the pairs of W windows has noise besides, which lies at all
frequencies and falls as 1 / W; what is measured is its share. mu is that at which distance decides
a given share of the variance of the logits, since noise matters the more, the smaller that is.
"""

from __future__ import annotations

import math

import numpy as np

from fope_jax.spectrum.leakage import energies, frequency_basis

HEAD_DIM = 32
LENGTH = 128  # tokens
WINDOWS = 1024  # drawn in all; the mean over as many groups as they make is given
THETA = 10_000.0


def inverse_frequencies() -> np.ndarray:
    """RoPE's, radians per token."""
    return THETA ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))


def mean_size(share: float) -> float:
    """The mu at which distance decides ``share`` of the variance of the logits.

    With e the variance of sum_m cos(w_m d) over all pairs, share = 4 mu^4 e / (4 mu^4 e + H (1 + 2
    mu^2)): the second term is the variance of a logit at one distance.
    """
    counts = np.arange(LENGTH, 0, -1)
    waves = np.cos(np.multiply.outer(np.arange(LENGTH), inverse_frequencies())).sum(axis=1)
    mean = np.average(waves, weights=counts)
    a = 4 * np.average((waves - mean) ** 2, weights=counts) * (1 - share) / share
    return math.sqrt((2 * HEAD_DIM + math.sqrt(4 * HEAD_DIM**2 + 4 * a * HEAD_DIM)) / (2 * a))


def noise_leakage(windows: int, share: float, seed: int = 0) -> float:
    """Leakage of the mean logit by distance over ``windows`` windows."""
    random, mu = np.random.default_rng(seed), mean_size(share)
    positions = np.arange(LENGTH)
    counts = LENGTH - positions
    turn = np.exp(1j * np.multiply.outer(positions, inverse_frequencies()))
    later, earlier = np.tril_indices(LENGTH)
    basis = frequency_basis(inverse_frequencies(), LENGTH, counts)
    values = []
    for _ in range(WINDOWS // windows):
        drawn = mu + random.standard_normal((2, 2, LENGTH, windows, HEAD_DIM // 2))
        q, k = (drawn[0] + 1j * drawn[1]) * turn[:, None]
        total = (q.reshape(LENGTH, -1) @ k.reshape(LENGTH, -1).conj().T).real  # over windows
        by_distance = np.bincount(later - earlier, weights=total[later, earlier])
        inside, whole = energies(by_distance / (windows * counts), basis)
        values.append(1 - inside / whole)
    return float(np.mean(values))


if __name__ == "__main__":
    for number in (8, 64, 512):
        print(f"{number} windows, share 0.0125: {noise_leakage(number, 0.0125):.3f}")
    for layer_share in (0.23, 0.37):
        print(f"8 windows, share {layer_share}: {noise_leakage(8, layer_share):.4f}")
