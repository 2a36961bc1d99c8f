"""The paper's theory on synthetic signals: spectrum damage, truncation, RoPE's decay.

Numbers for figures like Figure 3 and the one on decay of Hua et al. 2025. Nothing is trained.
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

LENGTH = 64  # tokens of the fit
REACH = 256  # tokens of the extension
HEAD_DIM = 32
TOKENS = 4096  # of a signal: its spectrum resolves 2 pi / 4096
ORDER = 6  # largest order of the predicted products
WEIGHT = np.array([[0.8, 0.6], [-0.3, 1.1]])
SEED = 0
DRAWS = 20  # sets of random frequencies


def gelu(x: np.ndarray) -> np.ndarray:
    """``x Phi(x)``, Phi the distribution function of the normal distribution."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def demo() -> dict[str, Any]:
    """All numbers and arrays, by the name of the figure."""
    tones = inverse_frequencies(HEAD_DIM)[[2, 3]]  # above the floor, no multiples of each other
    return {
        "damage": _damage(tones),
        "truncation": _truncation(),
        "extension": _extension(tones),
        "decay": _decay(),
    }


def _damage(tones: np.ndarray) -> dict[str, Any]:
    """Spectra of two tones, of a linear mix of them, and of its GELU, with Eq. 7-8."""
    n = np.arange(TOKENS)
    mixed = (WEIGHT @ np.cos(np.multiply.outer(tones, n)))[0]
    at = np.linspace(0, np.pi, 4000)
    products = intermodulation(gelu, (float(WEIGHT[0, 0]), float(WEIGHT[0, 1])), ORDER)
    lines, heights = predicted_lines(products, *tones.tolist())

    def amplitudes(signal: np.ndarray, where: np.ndarray) -> np.ndarray:
        # A cosine has half its amplitude at -w; a constant has all of it in its line around 0.
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
    """|X(w)| of two tones cut off by a window: numeric, analytic (Dirichlet), and Eq. 10."""
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
    """Least-squares fits of ``LENGTH`` tokens, extended to ``REACH`` (Eq. 11-13)."""
    n = np.arange(REACH)
    mixed = WEIGHT[0] @ np.cos(np.multiply.outer(tones, n))
    products = intermodulation(gelu, (float(WEIGHT[0, 0]), float(WEIGHT[0, 1])), 2)
    kept = clip_floor(inverse_frequencies(HEAD_DIM), LENGTH)
    kept = np.concatenate([[0.0], kept[kept > 0]])
    # "FoPE, drawn" adds random frequencies from [0, pi] up to H in all, and shows medians.
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
    """E[q.k](d) = 2 mu^2 sum_m cos(w_m d) under RoPE, entries of q and k from N(mu, 1)."""
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
