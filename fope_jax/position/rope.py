"""RoPE: rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import ModelShape, PositionEmbedding, Variables
from fope_jax.position.rotation import angles, check_head_dim, inverse_frequencies, rotate
from fope_jax.typing import Array


@dataclass(frozen=True)
class RoPE(PositionEmbedding):
    """Rotary position embedding: q and k turn by an angle proportional to their position.

        q.k at positions m, n depends on m - n only:  (R_m q).(R_n k) = q.(R_{n-m} k)

    Knobs:
      theta: base of the frequencies ``theta ** (-2 m / H)``; the paper and its code use 10,000.
      interleaved: pair dimensions ``2 m, 2 m + 1`` in place of ``m, m + H/2``.

    Reference: Su et al. 2021, "RoFormer", Eq. 13-15 and 34.
    """

    theta: float = 10_000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"theta={self.theta}: the rotary base must be above 0")

    def check(self, shape: ModelShape) -> None:
        check_head_dim(shape.head_dim)

    def frequencies(self, head_dim: int) -> np.ndarray:
        return inverse_frequencies(head_dim, self.theta)

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> tuple[Array, Array]:
        phase = angles(positions, self.frequencies(head_dim))
        return jnp.cos(phase), jnp.sin(phase)

    def rotate(
        self, variables: Variables, tables: tuple[Array, Array], q: Array, k: Array
    ) -> tuple[Array, Array]:
        cos, sin = tables
        return (
            rotate(q, cos, sin, interleaved=self.interleaved),
            rotate(k, cos, sin, interleaved=self.interleaved),
        )
