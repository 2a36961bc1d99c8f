"""The paper's theory as functions, and measured on trained models: ``fope spectrum``.

The names are handed on from the modules that define them; ``capture``, ``measure`` and ``run`` look
at models.
"""

from fope_jax.spectrum.damage import (
    damaged_tone,
    harmonics,
    intermodulation,
    leaked_amplitudes,
    predicted_lines,
)
from fope_jax.spectrum.leakage import Basis, energies, floor_basis, frequency_basis, leakage
from fope_jax.spectrum.nudft import attention_coefficients, components, extend, fit
from fope_jax.spectrum.series import (
    Series,
    TrainedPair,
    factors,
    layer_methods,
    series_of,
    trained_pairs,
)
from fope_jax.spectrum.transform import bins, dirichlet, nudft, periodogram, truncation

__all__ = [
    "Basis",
    "Series",
    "TrainedPair",
    "attention_coefficients",
    "bins",
    "components",
    "damaged_tone",
    "dirichlet",
    "energies",
    "extend",
    "factors",
    "fit",
    "floor_basis",
    "harmonics",
    "intermodulation",
    "layer_methods",
    "leaked_amplitudes",
    "leakage",
    "nudft",
    "frequency_basis",
    "periodogram",
    "predicted_lines",
    "series_of",
    "trained_pairs",
    "truncation",
]
