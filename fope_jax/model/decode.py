"""Decoding with a cache of keys and values.

The model reads tokens in pieces of any length: usually the prompt, then one token at a time. The
cache stores the positions of its keys, so masks, biases and rotations are functions of positions as
in training.

Keys are stored after the rotation. If frequencies depend on the sequence length
(``Limits.follows_length``), keys are stored before it and rotated again for every piece. The first
layer is then exact. Deeper layers keep keys that were computed from activations at a shorter
length, so decoding equals the uncached forward pass only within the original length, and for a
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
    attention_to_output,
    project_qkv,
    repeat_heads,
    split_period,
)
from fope_jax.typing import Array


class LayerCache(NamedTuple):
    """Keys and values of one layer of each period.

    Attributes:
      keys: ``[L / P, B, S, K, H]``, or N heads if the method makes one for each query head.
      values: ``[L / P, B, S, K, H]``.
    """

    keys: Array
    values: Array


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      layers: a ``LayerCache`` for each of the P layers of a period.
      positions: ``[B, S]`` int32.
      segments: ``[B, S]`` int32; 0 for padding and unused slots.
      filled: int32, used slots of the S, the same for all rows. A NumPy number while it is known,
        so that overflow can raise even under tracing.
    """

    layers: tuple[LayerCache, ...]
    positions: Array
    segments: Array
    filled: Array


def init_cache(model: Transformer, batch: int, size: int) -> KVCache:
    """An empty cache for ``batch`` rows of at most ``size`` tokens.

    Raises:
      ValueError: the position embedding is not defined for ``size`` tokens.
    """
    limit = model.position.limits.max_length
    if limit is not None and size > limit:
        raise ValueError(
            f"a cache of {size} tokens: {type(model.position).__name__} is defined for at most "
            f"{limit}"
        )
    config, shape = model.config, model.config.shape

    def rotated_keys() -> list[Array]:
        """One key of each layer of a period; its number of heads may be K or N."""
        tables = model.tables(jnp.zeros((1, 1), jnp.int32))
        _, trained, constants = jax.tree.map(lambda x: x[0], model.period_arrays())
        keys = []
        for index in range(len(tables)):
            layer, trained_here, constants_here = model.layer_position(index, trained, constants)
            q = jnp.zeros((1, 1, shape.num_heads, shape.head_dim), config.dtype)
            k = jnp.zeros((1, 1, shape.num_kv_heads, shape.head_dim), config.dtype)
            if not layer.method.limits.follows_length:
                _, k = layer.method.rotate(trained_here | constants_here, tables[index], q, k)
            keys.append(k)
        return keys

    keys = jax.eval_shape(rotated_keys)
    sizes = (config.num_layers // len(keys), batch, size)
    layers = [
        LayerCache(
            jnp.zeros((*sizes, key.shape[2], shape.head_dim), config.dtype),
            jnp.zeros((*sizes, shape.num_kv_heads, shape.head_dim), config.dtype),
        )
        for key in keys
    ]
    zeros = jnp.zeros((batch, size), jnp.int32)
    return KVCache(tuple(layers), zeros, zeros, np.int32(0))


def forward_cached(
    model: Transformer, cache: KVCache, tokens: Array, positions: Array, segments: Array
) -> tuple[Array, KVCache]:
    """Reads the next T tokens of each row.

    Args:
      model: the model that filled the cache.
      cache: with room for T more tokens. If ``filled`` is traced, as inside ``jit``, overflow
        cannot raise: these tokens and all later ones give NaN.
      tokens: ``[B, T]`` int32.
      positions: ``[B, T]`` int32, tokens since the start of the segment.
      segments: ``[B, T]`` int32; shorter rows begin with padding, segment 0.

    Returns:
      hidden: ``[B, T, D]`` after the final norm, like ``Transformer.hidden`` of the whole sequence.
      cache: with these tokens added.

    Raises:
      ValueError: the cache is known to have too little room.
    """
    config = model.config
    filled = _filled_after(cache, tokens.shape[1])
    start = jnp.asarray(cache.filled)

    def append(stored: Array, new: Array) -> Array:
        """Writes ``new [B, T, ...]`` into ``stored [B, S, ...]`` after its used slots."""
        return jax.lax.dynamic_update_slice_in_dim(stored, new, start, axis=1)

    cache = cache._replace(
        positions=append(cache.positions, positions), segments=append(cache.segments, segments)
    )
    tables = model.tables(positions)
    # All keys are rotated again, for the length reached so far.
    follows_length = model.position.limits.follows_length
    k_tables = model.tables(cache.positions) if follows_length else [None] * len(tables)

    def run_layer(index, weights, trained, constants, stored, x):
        layer, trained, constants = model.layer_position(index, trained, constants)
        variables = {**trained, **constants}
        q, k, v = project_qkv(config, weights, x)
        rotated_q, rotated_k = layer.method.rotate(variables, tables[index], q, k)
        values = append(stored.values, v)
        if layer.method.limits.follows_length:
            stored = LayerCache(append(stored.keys, k), values)
            queries = jnp.zeros((*stored.keys.shape[:2], *q.shape[2:]), q.dtype)
            _, keys = layer.method.rotate(variables, k_tables[index], queries, stored.keys)
        else:
            stored = LayerCache(append(stored.keys, rotated_k), values)
            keys = stored.keys
        # For a single query, all scores take no more memory than the keys.
        is_whole = x.shape[1] == 1 or config.attention == "reference"
        attended = attend(
            rotated_q,
            keys,
            repeat_heads(values, keys),
            q_positions=positions,
            k_positions=cache.positions,
            q_segments=segments,
            k_segments=cache.segments,
            **bias_functions(layer),
            bias_variables=trained,
            bias_constants=constants,
            backend="reference" if is_whole else "chunked",
            block=config.attention_block,
        )
        return attention_to_output(config, weights, x, attended), stored

    def run_period(x: Array, group: Any) -> tuple[Array, tuple[LayerCache, ...]]:
        (weights, trained, constants), layers = group
        new_layers = []
        for index, layer_weights in enumerate(split_period(weights, len(layers))):
            x, layer = run_layer(index, layer_weights, trained, constants, layers[index], x)
            new_layers.append(layer)
        return x, tuple(new_layers)

    x = model.embed(tokens, positions)
    x, layers = jax.lax.scan(run_period, x, (model.period_arrays(), cache.layers))
    hidden = rms_norm(x, model.final_norm[...], config.norm_eps)
    # An append beyond the end has overwritten the last keys.
    hidden = jnp.where(filled > cache.positions.shape[1], jnp.nan, hidden)
    return hidden, cache._replace(layers=layers, filled=filled)


def _filled_after(cache: KVCache, count: int) -> Any:
    """Used slots after ``count`` more tokens; raises ValueError on a known overflow."""
    size = cache.positions.shape[1]
    is_known = not isinstance(cache.filled, Tracer)
    used = int(cache.filled) if is_known else 0
    if used + count > size:
        raise ValueError(
            f"{count} tokens more: the key cache has {size} slots, {used} of them are used"
            + ("" if is_known else " or more")
        )
    return np.int32(used + count) if is_known else cache.filled + count


def prefill(
    model: Transformer, tokens: Array, segments: Array, room: int
) -> tuple[Array, KVCache, Array]:
    """Reads prompts that end together.

    Args:
      model: the model.
      tokens: ``[B, T]`` int32, padded on the left.
      segments: ``[B, T]`` int32: 1 for the prompt, 0 for padding.
      room: free slots for tokens to come.

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
    """The next ``count`` tokens, each the most likely one, ``[B, count]`` int32.

    From the first step with non-finite logits on, tokens are -1: the model is not finite or the
    cache is full (see ``forward_cached``).

    Args:
      model: the model.
      hidden, cache, position: from ``prefill``, with room for ``count - 1`` tokens.
      count: tokens to write, 1 or more.

    Raises:
      ValueError: ``count`` is below 1, or the cache is known to have too little room.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected 1 token or more")
    _filled_after(cache, count - 1)

    def choose(hidden: Array) -> Array:
        logits = model.unembed(hidden[:, -1:])[:, 0]
        # argmax takes NaN for the largest value and would return a valid token id.
        is_finite = jnp.isfinite(logits).all(axis=-1)
        return jnp.where(is_finite, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)[:, None]

    def step(carry: tuple[Array, KVCache, Array], _: None):
        token, cache, position = carry
        hidden, cache = forward_cached(model, cache, token, position, jnp.ones_like(position))
        token = choose(hidden)
        return (token, cache, position + 1), token[:, 0]

    first = choose(hidden)
    _, others = jax.lax.scan(step, (first, cache, position), length=count - 1)
    return jnp.concatenate([first, others.T], axis=1)
