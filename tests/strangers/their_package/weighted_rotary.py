"""A rotation whose frequencies are trained, and whose amplitudes too: one of each a pair."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fope_jax.position import (
    PositionEmbedding,
    PositionVariables,
    angles,
    inverse_frequencies,
    rotate,
)


@dataclass(frozen=True)
class WeightedRotary(PositionEmbedding):
    """q.k -> sum_m a_m^2 (q_m, k_m turned by w_m (i - j)),  a_m = 2 sigmoid(s_m), s_m trained

    Knobs:
      theta: base of the inverse frequencies w_m.
    """

    kind: ClassVar[str] = "rotation"
    extends: ClassVar[str] = "poorly"

    theta: float = 10_000.0

    def frequencies(self, head_dim):
        return inverse_frequencies(head_dim, self.theta)

    def init(self, key, shape):
        del key
        return PositionVariables(model_params={"amplitudes": jnp.zeros(shape.head_dim // 2)})

    def tables(self, variables, positions, head_dim):
        phase = angles(positions, self.frequencies(head_dim))
        amplitude = 2 * jax.nn.sigmoid(variables["amplitudes"])
        return amplitude * jnp.cos(phase), amplitude * jnp.sin(phase)

    def rotate(self, variables, tables, q, k):
        return rotate(q, *tables), rotate(k, *tables)
