"""Absolute position embeddings: vectors added to the token embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
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
from fope_jax.position.checks import check_finite, check_spread, check_tokens
from fope_jax.position.rotation import (
    angles,
    check_theta,
    inverse_frequencies,
    position_values,
    token_positions,
)
from fope_jax.typing import Array


def sinusoidal_table(positions: Array, d_model: int, theta: float = 10_000.0) -> Array:
    """Sines and cosines of the position, interleaved.

        table[..., 2 m] = sin(p w_m),  table[..., 2 m + 1] = cos(p w_m),  w_m = theta ** (-2 m / D)

    Takes positions ``[B, T]``, tokens, see ``angles``, and an even ``d_model``, else raises
    ValueError. Returns ``[B, T, D]`` float32 in [-1, 1].

    >>> sinusoidal_table(jnp.array([[0]]), 4).tolist()
    [[[0.0, 1.0, 0.0, 1.0]]]

    Reference: Vaswani et al. 2017, "Attention Is All You Need", Section 3.5.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model={d_model}: sines and cosines come in pairs, it must be even")
    phase = angles(positions, inverse_frequencies(d_model, theta))
    return jnp.stack([jnp.sin(phase), jnp.cos(phase)], axis=-1).reshape(*phase.shape[:-1], d_model)


@dataclass(frozen=True)
class Sinusoidal(PositionEmbedding):
    """Fixed sinusoids added to the token embeddings, defined at every position.

        x[p, 2 m] += a sin(p w_m),  x[p, 2 m + 1] += a cos(p w_m),  w_m = theta ** (-2 m / D)

    Knobs:
      theta: base of the frequencies.
      amplitude: factor on the sinusoids. The paper's embeddings have standard deviation 1, ours
        ``init_std``; an equal amplitude keeps the paper's ratio. Configs default to
        ``model.init_std``.

    Reference: Vaswani et al. 2017, "Attention Is All You Need", Section 3.5.
    """

    kind: ClassVar[str] = "absolute"
    extends: ClassVar[str] = "defined at any length; poorly"

    theta: float = 10_000.0
    amplitude: float = field(default=0.02, metadata={"config": "model.init_std"})

    def __post_init__(self) -> None:
        check_theta(self.theta)
        check_finite("amplitude", self.amplitude, "the factor on the sinusoids")

    def check(self, shape: ModelShape) -> None:
        if shape.d_model % 2:
            raise ValueError(f"d_model={shape.d_model}: sinusoids come in pairs, it must be even")

    def embed(self, variables: Variables, x: Array, positions: Array) -> Array:
        table = self.amplitude * sinusoidal_table(positions, x.shape[-1], self.theta)
        return (x.astype(jnp.float32) + table).astype(x.dtype)


@dataclass(frozen=True)
class Learned(PositionEmbedding):
    """A trained vector for each position, added to the token embeddings; none beyond the table.

        x[p] += table[p]

    Knobs:
      table_length: positions in the table, tokens. Longer sequences raise.
      init_std: standard deviation of the normal draw.

    Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training".
    """

    kind: ClassVar[str] = "absolute"
    extends: ClassVar[str] = "no; refuses longer sequences"

    table_length: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_tokens("table_length", self.table_length, "positions in the table")
        check_spread("init_std", self.init_std)

    @property
    def limits(self) -> Limits:
        return Limits(max_length=self.table_length)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        draw = jax.random.normal(key, (self.table_length, shape.d_model), jnp.float32)
        return PositionVariables(model_params={"table": draw * np.float32(self.init_std)})

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return (None, "embed")

    def embed(self, variables: Variables, x: Array, positions: Array) -> Array:
        """Adds rows of the table, NaN beyond it; ValueError if the sequence is longer than it."""
        if positions.shape[1] > self.table_length:
            raise ValueError(
                f"sequence of {positions.shape[1]} tokens: the learned table has "
                f"table_length={self.table_length} positions"
            )
        # Cut to 32 bits, a wider position could read a valid row: test it before the cut.
        inside = position_values(positions) < self.table_length
        rows = (
            jnp.asarray(variables["table"])
            .at[jnp.where(inside, token_positions(positions), -1)]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return (x.astype(jnp.float32) + rows.astype(jnp.float32)).astype(x.dtype)
