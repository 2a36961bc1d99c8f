"""Scalings: what methods of length extension do to rotary frequencies."""

from fope_jax.position.scaling.base import (
    RotaryFrequencies,
    Scaling,
    apply_scaling,
    check_chain,
    scaled_frequencies,
)
from fope_jax.position.scaling.interpolation import (
    AdjustedBase,
    DynamicNTK,
    NTKAware,
    PositionInterpolation,
)
from fope_jax.position.scaling.llama3 import Llama3
from fope_jax.position.scaling.longrope import LongRoPE
from fope_jax.position.scaling.selection import (
    ClipFloor,
    PRoPE,
    Proportional,
    SnapToCycles,
    clip_floor,
    floor_frequency,
)
from fope_jax.position.scaling.yarn import YaRN, yarn_temperature
