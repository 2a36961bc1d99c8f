"""Decoding with a key cache: the keys and values of what was read are kept, never computed again.

A cache is read into in pieces of any number of tokens: the prompt as one piece, then one token at a
time. Positions are an input, as in training, and the cache holds those of its keys beside them, so
that masks, biases and rotations are functions of positions here as everywhere.

Keys are kept as the rotation leaves them. Of methods whose frequencies follow the length of the
sequence (``PositionEmbedding.follows_length``) they are kept as they were before it, and all of
them are rotated anew for every piece. This makes a first layer exact; later layers keep keys that
were computed from what their layer below gave at a shorter length, as in every decoder, so with
such a method decoding equals the uncached forward pass only within its original length, and for a
prompt that is read as one piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fope_jax.model.attention import attend, bias_functions
from fope_jax.model.layers import rms_norm
from fope_jax.model.transformer import (
    Transformer,
    from_attention,
    repeat_heads,
    to_attention,
    unstacked,
)
from fope_jax.position.base import Variables
from fope_jax.typing import Array


class LayerCache(NamedTuple):
    """Keys and values of one layer of each period.

    Attributes:
      keys: ``[L / P, B, S, K, H]``, or N heads where the method makes one a query head.
      values: ``[L / P, B, S, K, H]``.
    """

    keys: Array
    values: Array


class KVCache(NamedTuple):
    """What a model remembers of the tokens that it has read.

    Attributes:
      layers: a ``LayerCache`` for each of the P layers of a period.
      positions: ``[B, S]`` int32, of each key.
      segments: ``[B, S]`` int32; 0 where nothing is stored yet, and for padding.
      filled: int32, how many of the S places are used; the same for all rows. A NumPy number for as
        long as it is known, also where a program is traced.
    """

    layers: tuple[LayerCache, ...]
    positions: Array
    segments: Array
    filled: Array


def init_cache(model: Transformer, batch: int, size: int) -> KVCache:
    """A cache for ``batch`` rows of at most ``size`` tokens.

    Raises:
      ValueError: the position embedding is not defined for as many.
    """
    limit = model.position.limits.max_length
    if limit is not None and size > limit:
        raise ValueError(
            f"a cache of {size} tokens: {type(model.position).__name__} is defined for at most "
            f"{limit}"
        )
    config, shape = model.config, model.config.shape
    period = len(model.position.layers())
    layers = []
    for index in range(period):
        heads = _key_heads(model, index)
        sizes = (config.num_layers // period, batch, size)
        layers.append(
            LayerCache(
                jnp.zeros((*sizes, heads, shape.head_dim), config.dtype),
                jnp.zeros((*sizes, shape.num_kv_heads, shape.head_dim), config.dtype),
            )
        )
    nothing = jnp.zeros((batch, size), jnp.int32)
    return KVCache(tuple(layers), nothing, nothing, np.int32(0))


def _key_heads(model: Transformer, index: int) -> int:
    """Heads of the keys that a layer attends to; more than K where each query head has its own."""
    shape = model.config.shape
    if model.position.layers()[index].method.limits.follows_length:
        return shape.num_kv_heads

    def rotated() -> Array:
        _, trained, constants = _first(model.groups())
        tables = model.tables(jnp.zeros((1, 1), jnp.int32))[index]
        layer, trained, constants = model.of_layer(index, trained, constants)
        q, k = (
            jnp.zeros((1, 1, heads, shape.head_dim), model.config.dtype)
            for heads in (shape.num_heads, shape.num_kv_heads)
        )
        return layer.method.rotate({**trained, **constants}, tables, q, k)[1]

    return jax.eval_shape(rotated).shape[2]


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def forward_cached(
    model: Transformer, cache: KVCache, tokens: Array, positions: Array, segments: Array
) -> tuple[Array, KVCache]:
    """Reads the next T tokens of each row.

    Args:
      model: the model that filled the cache.
      cache: with room for T more. Where it has none that raises, as far as ``filled`` is known;
        inside ``jit``, where it is not, these tokens and all later ones get NaN.
      tokens: ``[B, T]`` int32.
      positions: ``[B, T]`` int32, tokens since the start of the segment.
      segments: ``[B, T]`` int32; rows whose text is shorter begin with padding, segment 0.

    Returns:
      hidden: ``[B, T, D]`` after the final norm, as ``Transformer.hidden`` gives them for the whole
        sequence.
      cache: with these tokens in it.

    Raises:
      ValueError: the cache is known to have too little room.
    """
    filled = _check_room(cache, tokens.shape[1])
    write = (jnp.int32(0), jnp.asarray(cache.filled))
    cache = cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, write),
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, write),
    )
    x = model.embed(tokens, positions)
    tables = model.tables(positions)
    # Of all keys, at the length reached: what they are rotated by anew.
    again = model.position.limits.follows_length
    k_tables = model.tables(cache.positions) if again else [None] * len(tables)

    def body(x: Array, group: Any) -> tuple[Array, tuple[LayerCache, ...]]:
        (weights, trained, constants), memories = group
        kept = []
        for index, own in enumerate(unstacked(weights, len(memories))):
            x, memory = _layer(
                model,
                index,
                own,
                (trained, constants),
                (tables[index], k_tables[index]),
                memories[index],
                cache,
                x,
                positions,
                segments,
            )
            kept.append(memory)
        return x, tuple(kept)

    x, layers = jax.lax.scan(body, x, (model.groups(), cache.layers))
    hidden = rms_norm(x, model.final_norm[...], model.config.norm_eps)
    # Beyond the end the write above has replaced the last keys.
    hidden = jnp.where(filled > cache.positions.shape[1], jnp.nan, hidden)
    return hidden, cache._replace(layers=layers, filled=filled)


def _check_room(cache: KVCache, count: int) -> Any:
    """How many places are used with ``count`` tokens more.

    Raises:
      ValueError: it is known that there are not as many.
    """
    size = cache.positions.shape[1]
    known = not isinstance(cache.filled, Tracer)
    used = int(cache.filled) if known else 0
    if used + count > size:
        raise ValueError(
            f"{count} tokens more: the key cache has {size} places, {used} of them are used"
            + ("" if known else " or more")
        )
    return np.int32(used + count) if known else cache.filled + count


def _layer(
    model: Transformer,
    index: int,
    weights: dict[str, Array],
    variables: tuple[Variables, Variables],
    tables: tuple[Any, Any],
    memory: LayerCache,
    cache: KVCache,
    x: Array,
    positions: Array,
    segments: Array,
) -> tuple[Array, LayerCache]:
    """One layer of ``forward_cached``: its output ``[B, T, D]``, and the cache with T more keys."""
    config = model.config
    layer, trained, constants = model.of_layer(index, *variables)
    both = {**trained, **constants}
    q, k, v = to_attention(config, weights, x)
    rotated, turned = layer.method.rotate(both, tables[0], q, k)
    again = layer.method.limits.follows_length
    memory = LayerCache(
        _append(memory.keys, k if again else turned, jnp.asarray(cache.filled)),
        _append(memory.values, v, jnp.asarray(cache.filled)),
    )
    keys = _turn_all(model, index, variables, tables[1], memory.keys) if again else memory.keys
    attended = attend(
        rotated,
        keys,
        repeat_heads(memory.values, keys),
        q_positions=positions,
        k_positions=cache.positions,
        q_segments=segments,
        k_segments=cache.segments,
        **bias_functions(layer),
        bias_variables=trained,
        bias_constants=constants,
        # The scores of a single query are no more than the keys themselves.
        backend="reference" if x.shape[1] == 1 or config.attention == "reference" else "chunked",
        block=config.attention_block,
    )
    return from_attention(config, weights, x, attended), memory


def _append(kept: Array, new: Array, filled: Array) -> Array:
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(kept, new, (zero, filled, zero, zero))


def _turn_all(
    model: Transformer,
    index: int,
    variables: tuple[Variables, Variables],
    k_tables: Any,
    keys: Array,
) -> Array:
    """All keys of a layer rotated for the length that the sequences have now."""
    layer, trained, constants = model.of_layer(index, *variables)
    queries = jnp.zeros((*keys.shape[:2], model.config.num_heads, keys.shape[-1]), keys.dtype)
    return layer.method.rotate({**trained, **constants}, k_tables, queries, keys)[1]


# ---------------------------------------------------------------------------- greedy


def last_logits(model: Transformer, hidden: Array) -> Array:
    """Logits ``[B, V]`` of what follows the last of ``hidden [B, T, D]``."""
    return model.unembed(hidden[:, -1:])[:, 0]


def prefill(
    model: Transformer, tokens: Array, segments: Array, room: int
) -> tuple[Array, KVCache, Array]:
    """Reads prompts that end together.

    Args:
      model: the model.
      tokens: ``[B, T]`` int32; a shorter prompt stands at the end of its row.
      segments: ``[B, T]`` int32: 1 where the prompt is, 0 before it.
      room: places for tokens to come.

    Returns:
      hidden ``[B, T, D]``, the cache, and the position ``[B, 1]`` of the next token.
    """
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = init_cache(model, tokens.shape[0], tokens.shape[1] + room)
    hidden, cache = forward_cached(model, cache, tokens, positions, segments)
    return hidden, cache, positions[:, -1:] + 1


def greedy_decode(
    model: Transformer, hidden: Array, cache: KVCache, position: Array, count: int
) -> Array:
    """The ``count`` tokens that follow, each the most likely one, ``[B, count]`` int32.

    Where logits are not finite, because the model is or because the cache has no room left (see
    ``forward_cached``), no token is the most likely: -1 there and in all that follows.

    Args:
      model: the model.
      hidden, cache, position: as ``prefill`` gives them, with room for ``count - 1`` tokens.
      count: tokens to write, 1 or more.

    Raises:
      ValueError: fewer than 1 token, or the cache is known to have too little room.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected 1 token or more")
    _check_room(cache, count - 1)

    def choose(hidden: Array) -> Array:
        logits = last_logits(model, hidden)
        # argmax alone takes a NaN for the largest, and so writes some token or other.
        finite = jnp.isfinite(logits).all(axis=-1)
        return jnp.where(finite, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)[:, None]

    def step(carry: tuple[Array, KVCache, Array], _: None):
        token, cache, position = carry
        hidden, cache = forward_cached(model, cache, token, position, jnp.ones_like(position))
        token = choose(hidden)
        return (token, cache, position + 1), token[:, 0]

    first = choose(hidden)
    _, others = jax.lax.scan(step, (first, cache, position), length=count - 1)
    return jnp.concatenate([first, others.T], axis=1)
