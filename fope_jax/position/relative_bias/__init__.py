"""Learned biases that depend on distance: T5's buckets, KERPLE and FIRE."""

from fope_jax.position.relative_bias.base import relative_distance
from fope_jax.position.relative_bias.fire import FIRE, fire_bias, fire_distance
from fope_jax.position.relative_bias.kerple import (
    Kerple,
    clamp_value,
    kerple_log_bias,
    kerple_power_bias,
)
from fope_jax.position.relative_bias.t5 import T5Bias, t5_bias, t5_buckets
