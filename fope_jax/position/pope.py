"""PoPE: content sets the size of each dimension's phase vector, position its angle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import ModelShape, PositionEmbedding, PositionVariables, Variables
from fope_jax.position.checks import check_choice, check_share
from fope_jax.position.rotation import angles, check_theta, inverse_frequencies
from fope_jax.typing import Array

PHASES = ("zeros", "uniform", "none")


def polar(x: Array, cos: Array, sin: Array) -> Array:
    """Each of the first dimensions of ``x`` as a vector of two, its size positive.

        x_c -> softplus(x_c) (cos_c, sin_c),  c = 0 .. F-1

    Args:
      x: ``[B, T, N, H]``, any float dtype, which is kept; computed in float32.
      cos, sin: ``[B, T, N or 1, F]``, F up to H; else ValueError.

    Returns ``[B, T, N, F + H]``: all cosines, all sines, then the H - F other dimensions unchanged.

    >>> x = jnp.full((1, 1, 1, 2), jnp.log(jnp.e - 1))  # softplus gives 1
    >>> polar(x, jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))).round(3).tolist()
    [[[[0.0, 1.0, 0.5410000085830688]]]]

    Reference: Gopalakrishnan et al. 2025, "Decoupling the 'What' and 'Where' With Polar Coordinate
    Positional Embeddings".
    """
    fits = cos.shape == sin.shape and cos.ndim == x.ndim == 4 and cos.shape[-1] <= x.shape[-1]
    if not fits or any(a not in (1, b) for a, b in zip(cos.shape[:3], x.shape[:3], strict=True)):
        raise ValueError(
            f"cos {cos.shape} and sin {sin.shape} do not fit x {x.shape}: expected "
            "[B, T, N or 1, F] twice, with F up to H of x [B, T, N, H]"
        )
    rotary_dim = cos.shape[-1]
    size = jax.nn.softplus(x[..., :rotary_dim].astype(jnp.float32))
    parts = [(size * table.astype(jnp.float32)).astype(x.dtype) for table in (cos, sin)]
    return jnp.concatenate([*parts, x[..., rotary_dim:]], axis=-1)


@dataclass(frozen=True)
class PoPE(PositionEmbedding):
    """Polar position embedding: content sets how large each term is, position its phase.

        logits[t, s] = sum_c softplus(q_c) softplus(k_c) cos((s - t) w_c + delta_c) / sqrt(H)
        w_c = theta ** (-c / H),  c = 0 .. H-1

    Every dimension has a frequency of its own, twice as many as in RoPE, so q and k become twice as
    wide, and so do a cache's keys. No sign of q or k can turn a phase. delta, a phase of each
    key-value head and dimension, is trained; it acts within [-2 pi, 0], and has no gradient outside
    of it.

    Knobs:
      theta: base of the frequencies.
      partial_rotary_factor: share of the head's dimensions that are polar, the first ones, with
        their own frequency grid; the others enter the product as they are.
      phase: how delta starts: ``zeros``, or ``uniform`` over [-2 pi, 0]; ``none`` has no delta.

    >>> PoPE(theta=10_000.0).frequencies(4).round(3).tolist()
    [1.0, 0.1, 0.01, 0.001]

    Reference: Gopalakrishnan et al. 2025, "Decoupling the 'What' and 'Where' With Polar Coordinate
    Positional Embeddings".
    """

    kind: ClassVar[str] = "rotation"
    extends: ClassVar[str] = "claimed, without any scaling"

    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    phase: str = "zeros"

    def __post_init__(self) -> None:
        check_theta(self.theta)
        check_choice("phase", self.phase, PHASES)
        factor, share = self.partial_rotary_factor, "the share of dimensions that are polar"
        check_share("partial_rotary_factor", factor, share)

    def rotary_dim(self, head_dim: int) -> int:
        """The number of polar dimensions; ValueError if it is no whole number, or none."""
        dims = self.partial_rotary_factor * head_dim
        if abs(dims - round(dims)) > 1e-6 or round(dims) < 1:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor}: {dims:.10g} of "
                f"head_dim={head_dim} dimensions would be polar; expected a whole number"
            )
        return round(dims)

    def check(self, shape: ModelShape) -> None:
        self.rotary_dim(shape.head_dim)

    def frequencies(self, head_dim: int) -> np.ndarray:
        return inverse_frequencies(2 * self.rotary_dim(head_dim), self.theta)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        if self.phase == "none":
            return PositionVariables()
        size = (shape.num_layers, shape.num_kv_heads, self.rotary_dim(shape.head_dim))
        delta = jnp.zeros(size, jnp.float32)
        if self.phase == "uniform":
            delta = jax.random.uniform(key, size, jnp.float32, minval=-2 * np.pi, maxval=0.0)
        return PositionVariables(layer_params={"delta": delta})

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return ("heads",)

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> tuple[Array, Array]:
        phase = angles(positions, self.frequencies(head_dim))
        return jnp.cos(phase)[:, :, None], jnp.sin(phase)[:, :, None]

    def rotate(
        self, variables: Variables, tables: tuple[Array, Array], q: Array, k: Array
    ) -> tuple[Array, Array]:
        cos, sin = tables
        rotated_q = polar(q, cos, sin)
        if self.phase == "none":
            return rotated_q, polar(k, cos, sin)
        delta = jnp.asarray(variables["delta"], jnp.float32)[None, None]
        # jnp.clip halves the gradient at its bounds, where delta starts.
        within = (delta >= np.float32(-2 * np.pi)) & (delta <= 0)
        delta = jnp.where(within, delta, jax.lax.stop_gradient(jnp.clip(delta, -2 * np.pi, 0.0)))
        cos_delta, sin_delta = jnp.cos(delta), jnp.sin(delta)
        return rotated_q, polar(
            k, cos * cos_delta - sin * sin_delta, sin * cos_delta + cos * sin_delta
        )
