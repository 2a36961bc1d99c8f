"""What learned biases on distance share.

All are functions of two blocks of positions, so attention evaluates them block by block. Keys after
the query get the value of the distance's size, so that attention without a causal mask looks both
ways alike; those of T5's causal buckets that of distance 0, which a causal mask must remove
(``needs_causal_mask``). Logits stay scaled by 1 / sqrt(H) whatever the bias.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fope_jax.position.base import ModelShape, PositionVariables
from fope_jax.position.rotation import token_positions
from fope_jax.typing import Array


def relative_distance(q_positions: Array, k_positions: Array) -> Array:
    """How far before the query each key stands, for one block of scores.

        distance[b, t, s] = q_positions[b, t] - k_positions[b, s]

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, tokens.
      k_positions: integers ``[B, S]`` or ``[1, S]``, tokens.

    Returns:
      ``[B, T, S]`` int32 (batch axis 1 where both positions have it), negative for keys after the
      query. Integers, so that equal distances are equal wherever they stand.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> relative_distance(jnp.array([[1_000_002]]), jnp.array([[1_000_000, 1_000_003]])).tolist()
    [[[2, -1]]]
    """
    q_positions, k_positions = token_positions(q_positions), token_positions(k_positions)
    shapes = q_positions.shape, k_positions.shape
    fits = all(len(shape) == 2 for shape in shapes)
    if not fits or len({shape[0] for shape in shapes} - {1}) > 1:
        raise ValueError(
            f"q_positions {shapes[0]}, k_positions {shapes[1]}: expected [B, T] and [B, S], with "
            "the same B or 1"
        )
    return q_positions[:, :, None] - k_positions[:, None, :]


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
