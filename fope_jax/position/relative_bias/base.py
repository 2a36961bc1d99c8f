"""What learned biases on distance share.

All are functions of two blocks of positions, so attention evaluates them block by block. Keys after
the query get the value of the distance's size, so that attention without a causal mask looks both
ways alike; those of T5's causal buckets that of distance 0, which a causal mask must remove
(``Limits``). Logits stay scaled by 1 / sqrt(H) whatever the bias.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fope_jax.position.base import ModelShape, PositionVariables
from fope_jax.position.rotation import token_positions
from fope_jax.typing import Array


def relative_distance(q_positions: Array, k_positions: Array) -> Array:
    """How far before the query each key stands, int32, negative for keys after the query.

    Integers, so that equal distances are equal wherever they stand. The two broadcast against each
    other, as ``block_positions`` makes them.

    Raises:
      TypeError: positions are not integers.

    >>> relative_distance(jnp.array([1_000_002]), jnp.array([1_000_000, 1_000_003])).tolist()
    [2, -1]
    """
    return token_positions(q_positions) - token_positions(k_positions)


def by_head(parameter: Array) -> Array:
    """``[N]`` as float32 ``[1, N, 1, 1]``."""
    return jnp.asarray(parameter, jnp.float32).reshape(1, -1, 1, 1)


def by_layer(
    draw: Callable, key: Array, shape: ModelShape, name: str | None, share_layers: bool
) -> PositionVariables:
    """Trained parameters drawn once for the model or once a layer; ``name`` where it is one."""
    drawn = draw(key) if share_layers else jax.vmap(draw)(jax.random.split(key, shape.num_layers))
    params = drawn if name is None else {name: drawn}
    if share_layers:
        return PositionVariables(model_params=params)
    return PositionVariables(layer_params=params)
