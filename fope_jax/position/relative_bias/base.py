"""What biases on distance share.

Keys after the query get the value of the distance's size, so attention without a causal mask looks
both ways alike; T5's causal buckets give them that of distance 0 (``Limits.needs_causal_mask``).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fope_jax.position.base import ModelShape, PositionVariables
from fope_jax.position.rotation import token_positions
from fope_jax.typing import Array


def relative_distance(q_positions: Array, k_positions: Array) -> Array:
    """How far before the query each key stands, int32 and so exact, negative for keys after it.

    The two broadcast, as ``block_positions`` makes them; TypeError unless they are integers.

    >>> relative_distance(jnp.array([1_000_002]), jnp.array([1_000_000, 1_000_003])).tolist()
    [2, -1]
    """
    return token_positions(q_positions) - token_positions(k_positions)


def by_head(parameter: Array) -> Array:
    """``[N]`` as float32 ``[1, N, 1, 1]``."""
    return jnp.asarray(parameter, jnp.float32).reshape(1, -1, 1, 1)


def draw_params(
    draw: Callable[[Array], dict[str, Array]], key: Array, shape: ModelShape, share_layers: bool
) -> PositionVariables:
    """Trained parameters, drawn once for the model or once a layer."""
    if share_layers:
        return PositionVariables(model_params=draw(key))
    return PositionVariables(layer_params=jax.vmap(draw)(jax.random.split(key, shape.num_layers)))
