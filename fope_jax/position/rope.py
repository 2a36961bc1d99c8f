"""RoPE: rotary position embedding, with optional scalings of its frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    Limits,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
)
from fope_jax.position.checks import check_share, check_switches
from fope_jax.position.rotation import angles, check_head_dim, check_theta, position_values, rotate
from fope_jax.position.scaling import Scaling, check_chain, scaled_frequencies
from fope_jax.typing import Array


@dataclass(frozen=True)
class RoPE(PositionEmbedding):
    """Rotary position embedding: q and k turn by an angle proportional to their position.

        q.k at positions p, s depends on p - s only:  (R_p q).(R_s k) = q.(R_{s-p} k)

    Knobs:
      theta: base of the frequencies ``theta ** (-2 m / H)``; the paper and its code use 10,000.
      interleaved: pair dimensions ``2 m, 2 m + 1`` instead of ``m, m + H/2``.
      partial_rotary_factor: share of the head's dimensions that rotate, the first ones, with their
        own frequency grid; the others carry no position.
      scaling: a tuple of scalings of the frequencies, applied in order, such as
        ``(ClipFloor(512), YaRN(4.0, 512))``. At most one may stretch to a longer length.
      learnable: train the frequencies, shared by all layers, as ``w_m exp(s_m)`` from s_m = 0.
        Weight decay then pulls to the given frequencies, and signs cannot change.

    Reference: Su et al. 2021, "RoFormer", Eq. 13-15 and 34.
    """

    kind: ClassVar[str] = "rotation"
    extends: ClassVar[str] = "poorly alone; with a scaling"

    theta: float = 10_000.0
    interleaved: bool = False
    partial_rotary_factor: float = 1.0
    scaling: tuple[Scaling, ...] = ()
    learnable: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", check_chain(self.scaling))
        check_theta(self.theta)
        check_switches(self)
        factor, share = self.partial_rotary_factor, "the share of dimensions that rotate"
        check_share("partial_rotary_factor", factor, share)
        following = [type(step).__name__ for step in self.scaling if step.follows_length]
        if self.learnable and following:
            raise ValueError(
                f"learnable=True, scaling={following[0]} with length=None: frequencies that follow "
                "each sequence cannot be trained; give the scaling a length"
            )

    @property
    def limits(self) -> Limits:
        return Limits(follows_length=any(step.follows_length for step in self.scaling))

    def rotary_dim(self, head_dim: int) -> int:
        """The number of rotated dimensions of a head; ValueError if it or ``head_dim`` is odd."""
        check_head_dim(head_dim)
        dims = self.partial_rotary_factor * head_dim
        if abs(dims - round(dims)) > 1e-6 or round(dims) % 2 or round(dims) < 2:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor}: {dims:.10g} of "
                f"head_dim={head_dim} dimensions would rotate; expected an even number"
            )
        return round(dims)

    def check(self, shape: ModelShape) -> None:
        scaled_frequencies(self.rotary_dim(shape.head_dim), self.theta, self.scaling)
        if self.limits.follows_length and type(self).frequencies is not RoPE.frequencies:
            names = ", ".join(type(step).__name__ for step in self.scaling if step.follows_length)
            raise ValueError(
                f"scaling={names} with length=None: it makes frequencies of its own for each "
                f"sequence, in place of those of {type(self).__name__}.frequencies; give the "
                "scaling a length"
            )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Scaled radians per token of the rotated pairs, for sequences as short as in training."""
        return scaled_frequencies(self.rotary_dim(head_dim), self.theta, self.scaling).inv_freq

    def attention_factor(self, head_dim: int) -> float:
        """The scalings' factor on cosine and sine."""
        rotary_dim = self.rotary_dim(head_dim)
        return scaled_frequencies(rotary_dim, self.theta, self.scaling).attention_factor

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        if not self.learnable:
            return PositionVariables()
        pairs = self.rotary_dim(shape.head_dim) // 2
        return PositionVariables(model_params={"log_ratio": jnp.zeros(pairs, jnp.float32)})

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> tuple[Array, Array]:
        rotary_dim = self.rotary_dim(head_dim)

        def phase_of_row(positions: Array, length: Array) -> Array:
            scaled = scaled_frequencies(rotary_dim, self.theta, self.scaling, length)
            return angles(positions, scaled.inv_freq)

        if self.limits.follows_length:  # a row's frequencies follow its length
            # float32, because last position + 1 may overflow a small integer dtype.
            lengths = jnp.max(position_values(positions), axis=-1) + 1
            phase = jax.vmap(phase_of_row)(positions, lengths)
        else:
            inv_freq = self.frequencies(head_dim)  # which a subclass may override
            if self.learnable:
                log_ratio = jnp.asarray(variables["log_ratio"], jnp.float32)
                inv_freq = jnp.asarray(inv_freq, jnp.float32) * jnp.exp(log_ratio)
            phase = angles(positions, inv_freq)
        factor = np.float32(self.attention_factor(head_dim))
        return jnp.cos(phase) * factor, jnp.sin(phase) * factor

    def rotate(
        self, variables: Variables, tables: tuple[Array, Array], q: Array, k: Array
    ) -> tuple[Array, Array]:
        cos, sin = tables
        dims = 2 * cos.shape[-1]

        def rotate_first(x: Array) -> Array:
            rotated = rotate(x[..., :dims], cos, sin, interleaved=self.interleaved)
            if dims == x.shape[-1]:
                return rotated
            return jnp.concatenate([rotated, x[..., dims:]], axis=-1)

        return rotate_first(q), rotate_first(k)
