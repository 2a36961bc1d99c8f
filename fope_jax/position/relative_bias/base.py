"""Helpers of biases on distance."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fope_jax.position.base import ModelShape, PositionVariables
from fope_jax.position.rotation import real_positions
from fope_jax.typing import Array


def relative_distance(q_positions: Array, k_positions: Array) -> Array:
    """Query minus key position: exact in int32, or in float32 if either has fractions of a token.

    Raises as ``rotation.real_positions``.

    >>> relative_distance(jnp.array([1_000_002]), jnp.array([1_000_000, 1_000_003])).tolist()
    [2, -1]
    >>> relative_distance(jnp.array([2.5]), jnp.array([0, 2])).tolist()
    [2.5, 0.5]
    """
    q_positions, k_positions = real_positions(q_positions), real_positions(k_positions)
    if q_positions.dtype != k_positions.dtype:
        q_positions, k_positions = (x.astype(jnp.float32) for x in (q_positions, k_positions))
    return q_positions - k_positions


def by_head(parameter: Array) -> Array:
    """``[N]`` as float32 ``[1, N, 1, 1]``."""
    return jnp.asarray(parameter, jnp.float32).reshape(1, -1, 1, 1)


def draw_params(
    draw: Callable[[Array], dict[str, Array]], key: Array, shape: ModelShape, share_layers: bool
) -> PositionVariables:
    """Draws trained parameters once for the model, or once per layer."""
    if share_layers:
        return PositionVariables(model_params=draw(key))
    return PositionVariables(layer_params=jax.vmap(draw)(jax.random.split(key, shape.num_layers)))
