"""xPos: a rotation whose amplitude decays with distance, each frequency at its own rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import Limits, ModelShape, PositionEmbedding, Variables
from fope_jax.position.checks import check_above_zero, check_switches
from fope_jax.position.rotation import (
    angles,
    check_head_dim,
    check_theta,
    inverse_frequencies,
    position_values,
    rotate,
)
from fope_jax.typing import Array

# Log of the largest factor on a key: far enough below float32's limit, e**88, that products and
# their gradients neither overflow nor vanish.
_LARGEST_EXPONENT = 64.0
_LARGEST_EXPONENT_16 = 8.0  # the same for float16, whose limit is e**11


def xpos_decay(head_dim: int, gamma: float = 0.4) -> np.ndarray:
    """The base of the decay of each pair of dimensions.

        zeta_m = (2 m / H + gamma) / (1 + gamma),  m = 0 .. H/2 - 1

    gamma is 0.4 in the paper; a larger one decays less. Returns ``[H/2]`` float64 in (0, 1),
    rising: slow frequencies decay least. Raises ValueError unless ``head_dim`` is even and
    ``gamma`` above 0.

    >>> xpos_decay(4).round(6).tolist()
    [0.285714, 0.642857]

    Reference: Sun et al. 2022, "A Length-Extrapolatable Transformer", Section 3.2.
    """
    check_head_dim(head_dim)
    check_above_zero("gamma", gamma, "the offset of the decay")
    return (np.arange(0, head_dim, 2) / head_dim + gamma) / (1 + gamma)


@dataclass(frozen=True)
class XPos(PositionEmbedding):
    """RoPE with an amplitude that decays exponentially with distance.

        (zeta ** (p / B) R_p q).(zeta ** (-s / B) R_s k) = q.(zeta ** ((p - s) / B) R_{s-p} k)

    Keys grow as queries shrink, so float32 limits the positions (``limits``: 26,156 tokens at the
    defaults, more with a larger ``scale_base``; float16, not bfloat16, holds an eighth). Later keys
    would grow with distance, so attention must be causal, as in the paper.

    Knobs:
      theta: base of the frequencies.
      scale_base: B, tokens over which pair m decays by zeta_m.
      gamma: see ``xpos_decay``.
      interleaved: pair dimensions ``2 m, 2 m + 1`` instead of ``m, m + H/2``.

    Reference: Sun et al. 2022, "A Length-Extrapolatable Transformer", Eq. 12 and Section 3.2.
    """

    kind: ClassVar[str] = "rotation"
    extends: ClassVar[str] = "claimed; to the limit of float32"

    theta: float = 10_000.0
    scale_base: float = 512.0
    gamma: float = 0.4
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_theta(self.theta)
        check_switches(self)
        check_above_zero("scale_base", self.scale_base, "tokens of the decay")
        xpos_decay(2, self.gamma)

    def check(self, shape: ModelShape) -> None:
        check_head_dim(shape.head_dim)

    @property
    def limits(self) -> Limits:
        """Up to where float32 holds the fastest decay, ``zeta_0 = gamma / (1 + gamma)``."""
        return Limits(max_length=self._longest(_LARGEST_EXPONENT), needs_causal_mask=True)

    def _longest(self, exponent: float) -> int:
        """Tokens within which no factor is beyond ``e ** exponent``."""
        # log((1 + gamma) / gamma) would be 0 for a large gamma, and divided by.
        decay_per_token = math.log1p(1 / self.gamma) / self.scale_base
        return min(math.floor(exponent / decay_per_token), 2**31 - 1)

    def frequencies(self, head_dim: int) -> np.ndarray:
        return inverse_frequencies(head_dim, self.theta)

    def tables(
        self, variables: Variables, positions: Array, head_dim: int
    ) -> tuple[Array, Array, Array]:
        """Cosine, sine and q's amplitude (k's inverted), ``[B, T, H/2]``; NaN beyond the limit."""
        phase = angles(positions, self.frequencies(head_dim))
        decay = (np.log(xpos_decay(head_dim, self.gamma)) / self.scale_base).astype(np.float32)
        distance = position_values(positions)[..., None]
        amplitude = jnp.exp(distance * decay.reshape((1, 1, -1)))
        longest: Any = self.limits.max_length
        inside = jnp.abs(distance) < longest
        return jnp.cos(phase), jnp.sin(phase), jnp.where(inside, amplitude, jnp.nan)

    def rotate(
        self, variables: Variables, tables: tuple[Array, Array, Array], q: Array, k: Array
    ) -> tuple[Array, Array]:
        """ValueError for more tokens than float16 q and k hold, NaN at positions beyond."""
        cos, sin, amplitude = tables
        if jnp.float16 in (q.dtype, k.dtype):
            longest, length = self._longest(_LARGEST_EXPONENT_16), max(q.shape[1], k.shape[1])
            if length > longest:
                raise ValueError(
                    f"{self}: {length} tokens in float16, which holds its factors for {longest}; "
                    "accepted: bfloat16, float32, or a larger scale_base"
                )
            fastest = jnp.log(amplitude[..., :1])
            is_held = jnp.abs(fastest) <= np.float32(_LARGEST_EXPONENT_16)
            amplitude = jnp.where(is_held, amplitude, jnp.nan)
        return (
            rotate(q, cos * amplitude, sin * amplitude, interleaved=self.interleaved),
            rotate(k, cos / amplitude, sin / amplitude, interleaved=self.interleaved),
        )
