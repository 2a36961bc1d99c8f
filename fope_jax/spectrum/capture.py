"""Attention activations on one window, recorded in the model's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.model.attention import attention_logits, layer_arguments
from fope_jax.model.transformer import Activations, Transformer, merge, split
from fope_jax.typing import Array

LOGITS_IN_MEMORY = 2**28  # logits of one layer, 1 GB of float32


class WindowCapture(NamedTuple):
    """One window in every layer, float32.

    Attributes:
      x: ``[L, T, D]`` input of each layer.
      q, k: ``[L, T, N, E]`` and ``[L, T, K, E]`` before the rotation; of a method that widens them
        (PoPE), as they are at position 0.
      turned_q, turned_k: ``[L, T, N, E]`` and ``[L, T, K or N, E]`` after it.
      profile: ``[L, N, T]`` mean logit, with bias, at each distance 0 .. T - 1 in tokens, also of
        pairs that a window or a chunk hides.
      square: ``[L, N]`` mean squared logit over all causal pairs, hidden ones too.
      entropy: ``[L, N, T]`` of each query's attention to the keys it sees, nats.
      distance: ``[L, N, T]`` mean distance of the same, tokens. Sinks have no part in either.
    """

    x: Array
    q: Array
    k: Array
    turned_q: Array
    turned_k: Array
    profile: Array
    square: Array
    entropy: Array
    distance: Array


def layer_logits(activations: Activations, *, hide: bool = True) -> Array:
    """Causal logits ``[B, N, T, T]`` of windows that are one segment, -inf after the query.

    ``hide=False`` leaves out the layer's window and chunk, which give -inf too.
    """
    arguments = layer_arguments(activations.position)
    if not hide:
        arguments |= {"window": None, "chunk": None}
    positions = jnp.arange(activations.x.shape[1], dtype=jnp.int32)[None]
    return attention_logits(
        activations.rotated_q,
        activations.rotated_k,
        positions=positions,
        segments=jnp.ones_like(positions),
        variables=activations.variables,
        head_dim=activations.v.shape[-1],
        sums=activations.sums,
        **arguments,
    )


def mean_by_distance(logits: Array) -> Array:
    """Means ``[..., T]`` of causal ``logits [..., T, T]`` at each distance from query to key."""
    positions = jnp.arange(logits.shape[-1])
    key = positions[:, None] - positions  # [query, distance]
    indices = jnp.broadcast_to(jnp.maximum(key, 0), logits.shape)
    at_distance = jnp.where(key >= 0, jnp.take_along_axis(logits, indices, axis=-1), 0.0)
    return at_distance.sum(axis=-2) / (len(positions) - positions)


def _unrotated(activations: Activations) -> tuple[Array, Array]:
    """q and k before the rotation, as wide as after it."""
    a, method = activations, activations.position.method
    if a.rotated_q.shape[-1] == a.q.shape[-1]:
        return a.q, a.k
    origin = jnp.zeros((1, a.q.shape[1]), jnp.int32)
    return method.rotate(a.variables, method.tables(a.variables, origin, a.q.shape[-1]), a.q, a.k)


def _capture_layer(activations: Activations) -> WindowCapture:
    a = activations
    seen = layer_logits(a)[0]
    logits = seen
    if a.position.window is not None or a.position.chunk is not None:
        logits = layer_logits(a, hide=False)[0]
    positions = jnp.arange(logits.shape[-1])
    distances = positions[:, None] - positions
    is_visible = distances >= 0
    weights = jax.nn.softmax(seen, axis=-1)
    log_weights = jnp.log(jnp.where(weights > 0, weights, 1.0))
    return WindowCapture(
        *(x[0].astype(jnp.float32) for x in (a.x, *_unrotated(a), a.rotated_q, a.rotated_k)),
        profile=mean_by_distance(logits),
        square=jnp.where(is_visible, logits**2, 0.0).sum(axis=(-1, -2)) / is_visible.sum(),
        entropy=jnp.where(weights > 0, -weights * log_weights, 0.0).sum(axis=-1),
        distance=(weights * jnp.maximum(distances, 0).astype(jnp.float32)).sum(axis=-1),
    )


def observer(model: Transformer) -> Callable[[np.ndarray], WindowCapture]:
    """A function of one window of tokens ``[T]``, compiled once for each T.

    Raises (when called):
      ValueError: the logits of one layer exceed ``LOGITS_IN_MEMORY``.
    """
    graphdef, params, constants = split(model)
    heads = model.config.num_heads

    @jax.jit
    def forward(params, constants, tokens):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
        model = merge(graphdef, params, constants)
        return model.forward(tokens[None], positions, jnp.ones_like(positions), _capture_layer)[1]

    def observe(tokens: np.ndarray) -> WindowCapture:
        length = len(tokens)
        if heads * length**2 > LOGITS_IN_MEMORY:
            most = int((LOGITS_IN_MEMORY / heads) ** 0.5)
            raise ValueError(
                f"a window of {length} tokens: all logits of {heads} heads are looked at together, "
                f"and {most} tokens are the most that fit; give shorter lengths"
            )
        capture = forward(params, constants, jnp.asarray(tokens, jnp.int32))
        return jax.tree.map(np.asarray, capture)

    return observe
