"""The paper's theory on signals made for it: spectrum damage, truncation, and RoPE's decay.

What Figure 3 and the figure on decay of Hua et al. 2025 show, in numbers for figures. Nothing is
trained and nothing is random but the vectors of the decay.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import erf

from fope_jax.position import ModelShape, RoPE, clip_floor, floor_frequency, inverse_frequencies
from fope_jax.spectrum.damage import intermodulation, leaked_amplitudes, predicted_lines
from fope_jax.spectrum.series import attention_coefficients, frequency_components, series_of
from fope_jax.spectrum.transform import (
    dirichlet,
    extrapolate,
    fit_amplitudes,
    nudft,
    truncated_tone,
)

LENGTH = 64  # tokens that the toy is fitted on
REACH = 256  # tokens that it is extended to
HEAD_DIM = 32
TOKENS = 4096  # of the signals whose spectra are taken: lines as thin as 2 pi / 4096
ORDER = 6  # of the intermodulation products that are predicted
WEIGHT = np.array([[0.8, 0.6], [-0.3, 1.1]])
SEED = 0
DRAWS = 20  # sets of drawn frequencies


def gelu(x: np.ndarray) -> np.ndarray:
    """``x Phi(x)`` with the normal distribution function."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def demo() -> dict[str, Any]:
    """All parts, numbers and arrays; each is described in its own function."""
    tones = inverse_frequencies(HEAD_DIM)[[2, 3]]  # above the floor, no multiples of each other
    return {
        "damage": _damage(tones),
        "truncation": _truncation(),
        "extension": _extension(tones),
        "decay": _decay(),
    }


def _damage(tones: np.ndarray) -> dict[str, Any]:
    """Two dimensions of one tone each, after a linear layer and after GELU: lines and predictions.

    Amplitudes are those of cosines. ``predicted`` are Eq. 7 and the products of Eq. 8 to ``ORDER``.
    """
    n = np.arange(TOKENS)
    mixed = (WEIGHT @ np.cos(np.multiply.outer(tones, n)))[0]
    at = np.linspace(0, np.pi, 4000)
    products = intermodulation(gelu, (float(WEIGHT[0, 0]), float(WEIGHT[0, 1])), ORDER)
    lines, heights = predicted_lines(products, *tones.tolist())

    def amplitudes(signal: np.ndarray, where: np.ndarray) -> np.ndarray:
        # A cosine is two turning numbers, a constant one: of that, the whole line of the window.
        double = np.where(where > 8 * np.pi / TOKENS, 2, 1)
        return double * np.abs(nudft(signal, where, "blackmanharris"))

    def predictions(signal: np.ndarray, where: np.ndarray, predicted: np.ndarray) -> dict:
        return {"at": where, "predicted": predicted, "measured": amplitudes(signal, where)}

    leaked = leaked_amplitudes(WEIGHT, np.ones(2))[0]
    before, linear, activation = amplitudes(
        np.stack([np.cos(tones[0] * n), mixed, gelu(mixed)]), at
    )
    return {
        "tones": tones,
        "at": at,
        "before": before,
        "linear": linear,
        "activation": activation,
        "linear_lines": predictions(mixed, tones, leaked),
        "activation_lines": predictions(gelu(mixed), lines, np.abs(heights)),
    }


def _truncation() -> dict[str, Any]:
    """A tone that turns fully within the window and one that does not: |X(w)| over the tokens.

    ``analytic`` is the Dirichlet kernel; ``whole`` and ``spread`` are the terms of Eq. 10.
    """
    at = np.linspace(0, 0.5, 600)
    rows = []
    for period in (20.0, 100.0):
        tone = 2 * np.pi / period
        whole, spread = truncated_tone(tone, LENGTH, at)
        numeric = np.abs(nudft(np.exp(1j * tone * np.arange(LENGTH)), at))
        analytic = np.abs(dirichlet(at - tone, LENGTH)) / LENGTH
        row = {"period": period, "numeric": numeric, "analytic": analytic}
        rows.append(row | {"whole": whole, "spread": np.abs(spread)})
    return {"at": at, "length": LENGTH, "floor": floor_frequency(LENGTH), "tones": rows}


def _extension(tones: np.ndarray) -> dict[str, Any]:
    """A dimension after a linear layer, and after GELU, seen for ``LENGTH`` tokens and extended.

    Each line is the least-squares fit of the training length by what the dimension may carry, and a
    constant: ``RoPE`` its own frequency alone; ``FoPE`` all of RoPE's above the floor; ``FoPE,
    drawn`` others from [0, pi] besides, as many as H in all (Eq. 11-13); ``frequency-matched`` the
    tones and second-order products that are there. Errors are root mean squares within and beyond
    the training length; of ``FoPE, drawn`` the medians over ``DRAWS``.
    """
    n = np.arange(REACH)
    mixed = WEIGHT[0] @ np.cos(np.multiply.outer(tones, n))
    products = intermodulation(gelu, (float(WEIGHT[0, 0]), float(WEIGHT[0, 1])), 2)
    kept = clip_floor(inverse_frequencies(HEAD_DIM), LENGTH)
    kept = np.concatenate([[0.0], kept[kept > 0]])
    carried = {
        "frequency-matched": [predicted_lines(products, *tones.tolist())[0]],
        "RoPE": [np.array([0.0, tones[0]])],
        "FoPE": [kept],
        "FoPE, drawn": [
            np.concatenate([kept, rng.uniform(0, np.pi, HEAD_DIM + 1 - len(kept))])
            for rng in map(np.random.default_rng, range(DRAWS))
        ],
    }
    cases = {}
    for name, truth in (("linear", mixed), ("activation", gelu(mixed))):
        lines, errors = {}, {}
        for label, sets in carried.items():
            fits = [(fit_amplitudes(truth[:LENGTH], given), given) for given in sets]
            extended = np.array([extrapolate(*fit, n) for fit in fits])
            squares = (extended - truth) ** 2
            parts = (squares[:, :LENGTH], squares[:, LENGTH:])
            lines[label] = extended[0]
            errors[label] = [float(np.median(np.sqrt(part.mean(axis=1)))) for part in parts]
        cases[name] = {"truth": truth, "lines": lines, "errors": errors}
    return {"length": LENGTH, "cases": cases}


def _decay(samples: int = 1000, head_dim: int = 128, reach: int = 4096) -> dict[str, Any]:
    """The mean of q.k under RoPE by distance, entries of q and k from N(mu, 1).

    E[q.k](d) = 2 mu^2 sum_m cos(w_m d),  with standard error sqrt(H (1 + 2 mu^2) / samples)
    """
    series = series_of(RoPE(), {}, ModelShape(head_dim, 1, 1, 1, head_dim))
    assert series is not None
    distances = np.arange(0, reach + 1, 8)
    random = np.random.default_rng(SEED)
    waves = np.cos(np.multiply.outer(distances, series.frequencies)).sum(axis=1)
    rows = []
    for mean in (0.0, 0.1, 1.0):
        q, k = mean + random.standard_normal((2, samples, 1, head_dim))
        coefficients = attention_coefficients(series, q, k).mean(axis=(0, 1))
        measured = frequency_components(series, coefficients, distances).sum(axis=0)
        error = math.sqrt(head_dim * (1 + 2 * mean**2) / samples)
        row = {"mean": mean, "measured": measured, "expected": 2 * mean**2 * waves}
        rows.append(row | {"error": error})
    return {"distances": distances, "samples": samples, "head_dim": head_dim, "rows": rows}
