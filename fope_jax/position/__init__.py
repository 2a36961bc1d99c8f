"""Position embeddings as pure functions of positions; needs jax and numpy only."""

from fope_jax.position.absolute import Learned, Sinusoidal, sinusoidal_table
from fope_jax.position.alibi import ALiBi, alibi_bias, alibi_slopes
from fope_jax.position.base import ModelShape, NoPE, PositionEmbedding, PositionVariables
from fope_jax.position.fope import FoPE
from fope_jax.position.fourier import (
    coefficient_std,
    fourier_coefficients,
    fourier_tables,
    mix_tables,
    normalise_columns,
)
from fope_jax.position.rope import RoPE
from fope_jax.position.rotation import angles, inverse_frequencies, rotate
from fope_jax.position.scaling import clip_floor, floor_frequency, position_interpolation, yarn
from fope_jax.position.table import METHODS, Fingerprint, fingerprint, make, name_of

__all__ = [
    "METHODS",
    "ALiBi",
    "Fingerprint",
    "FoPE",
    "Learned",
    "ModelShape",
    "NoPE",
    "PositionEmbedding",
    "PositionVariables",
    "RoPE",
    "Sinusoidal",
    "alibi_bias",
    "alibi_slopes",
    "angles",
    "clip_floor",
    "coefficient_std",
    "fingerprint",
    "floor_frequency",
    "fourier_coefficients",
    "fourier_tables",
    "inverse_frequencies",
    "make",
    "mix_tables",
    "name_of",
    "normalise_columns",
    "position_interpolation",
    "rotate",
    "sinusoidal_table",
    "yarn",
]
