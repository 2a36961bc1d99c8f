"""Attention activations on one window, recorded in the model's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.model.attention import attention_logits, layer_arguments
from fope_jax.model.transformer import Activations, Transformer, merge, split
from fope_jax.spectrum.series import before_rotation
from fope_jax.typing import Array

LOGITS_IN_MEMORY = 2**26  # logits of one layer, 256 MB of float32; more are made in blocks


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


def layer_logits(
    activations: Activations, *, hide: bool = True, start: Array | int = 0, size: int | None = None
) -> Array:
    """Causal logits ``[B, N, size, T]`` of windows that are one segment, -inf after the query.

    ``hide=False`` leaves out the layer's window and chunk, which give -inf too. Queries are the
    ``size`` from index ``start`` on, all of them where it is None.
    """
    arguments = layer_arguments(activations.position)
    if not hide:
        arguments |= {"window": None, "chunk": None}
    positions = jnp.arange(activations.x.shape[1], dtype=jnp.int32)[None]
    queries = activations.rotated_q
    if size is not None:
        queries = jax.lax.dynamic_slice_in_dim(queries, start, size, axis=1)
    return attention_logits(
        queries,
        activations.rotated_k,
        positions=positions,
        segments=jnp.ones_like(positions),
        variables=activations.variables,
        head_dim=activations.v.shape[-1],
        sums=activations.sums,
        start=start,
        **arguments,
    )


def sum_by_distance(logits: Array, start: Array | int = 0) -> Array:
    """Sums ``[..., T]`` of causal ``logits [..., t, T]`` at each distance from query to key.

    Queries are those from index ``start`` on.
    """
    queries = start + jnp.arange(logits.shape[-2])
    key = queries[:, None] - jnp.arange(logits.shape[-1])  # [query, distance]
    indices = jnp.broadcast_to(jnp.maximum(key, 0), logits.shape)
    at_distance = jnp.where(key >= 0, jnp.take_along_axis(logits, indices, axis=-1), 0.0)
    return at_distance.sum(axis=-2)


def mean_by_distance(logits: Array) -> Array:
    """Means ``[..., T]`` of causal ``logits [..., T, T]`` at each distance from query to key."""
    return sum_by_distance(logits) / np.arange(logits.shape[-1], 0, -1)


def _unrotated(activations: Activations) -> tuple[Array, Array]:
    """q and k before the rotation, as wide as after it."""
    a, method = activations, activations.position.method
    q, k = before_rotation(method, a.variables, a.q, a.k)
    if q.shape[-1] == a.rotated_q.shape[-1]:
        return q, k
    # Two versions side by side, or a user's method; neither has a series.
    origin = jnp.zeros((1, a.q.shape[1]), jnp.int32)
    return method.rotate(a.variables, method.tables(a.variables, origin, a.q.shape[-1]), a.q, a.k)


def _capture_layer(activations: Activations) -> WindowCapture:
    a = activations
    hides = a.position.hides_keys
    length, heads = a.x.shape[1], a.rotated_q.shape[2]
    size = _block_size(length, heads)
    positions = jnp.arange(length)

    def capture_block(start: Array | int, size: int) -> tuple[Array, Array, Array, Array]:
        """Sums over queries, ``[N, T]`` and ``[N]``, then values of each, ``[N, size]``."""
        seen = layer_logits(a, start=start, size=size)[0]
        logits = layer_logits(a, hide=False, start=start, size=size)[0] if hides else seen
        distances = start + positions[:size, None] - positions
        weights = jax.nn.softmax(seen, axis=-1)
        log_weights = jnp.log(jnp.where(weights > 0, weights, 1.0))
        return (
            sum_by_distance(logits, start),
            jnp.where(distances >= 0, logits**2, 0.0).sum(axis=(-1, -2)),
            jnp.where(weights > 0, -weights * log_weights, 0.0).sum(axis=-1),
            (weights * jnp.maximum(distances, 0).astype(jnp.float32)).sum(axis=-1),
        )

    whole, rest = divmod(length, size)
    blocks = jax.lax.map(lambda start: capture_block(start, size), size * jnp.arange(whole))
    profile, square = (x.sum(axis=0) for x in blocks[:2])
    entropy, distance = (jnp.moveaxis(x, 0, 1).reshape(heads, -1) for x in blocks[2:])
    if rest:
        last = capture_block(length - rest, rest)
        profile, square = profile + last[0], square + last[1]
        entropy = jnp.concatenate([entropy, last[2]], axis=1)
        distance = jnp.concatenate([distance, last[3]], axis=1)
    return WindowCapture(
        *(x[0].astype(jnp.float32) for x in (a.x, *_unrotated(a), a.rotated_q, a.rotated_k)),
        profile=profile / np.arange(length, 0, -1),
        square=square / (length * (length + 1) / 2),
        entropy=entropy,
        distance=distance,
    )


def _block_size(length: int, heads: int) -> int:
    """Queries of a block: their logits fit into memory, and the last block is about as large.

    >>> _block_size(128, 4), _block_size(8192, 8), _block_size(8191, 9)
    (128, 1024, 820)
    """
    most = max(1, LOGITS_IN_MEMORY // (heads * length))
    num_blocks = -(-length // most)
    return -(-length // num_blocks)


def observer(model: Transformer) -> Callable[[np.ndarray], WindowCapture]:
    """A function of one window of tokens ``[T]``, compiled once for each T.

    Memory is that of the captures, ``[L, T, D]`` and such; logits are made in blocks of queries.
    """
    graphdef, params, constants = split(model)

    @jax.jit
    def forward(params, constants, tokens):
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
        model = merge(graphdef, params, constants)
        return model.forward(tokens[None], positions, jnp.ones_like(positions), _capture_layer)[1]

    def observe(tokens: np.ndarray) -> WindowCapture:
        capture = forward(params, constants, jnp.asarray(tokens, jnp.int32))
        return jax.tree.map(np.asarray, capture)

    return observe
