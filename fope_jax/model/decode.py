"""Decoding with a cache of keys and values.

Tokens are read in order, in pieces of any length, such as the prompt and then single tokens. The
cache stores the positions of its keys, for masks, biases and rotations. A layer with a window of w
tokens keeps the keys of w tokens, in slots that it fills over and over.

Keys are stored after the rotation. If frequencies depend on the sequence length
(``Limits.follows_length``), keys are stored before it and rotated again for every piece, with its
queries, for the length that the row has reached. Keys of deeper layers still come from activations
at a shorter length. So decoding then equals the uncached forward pass only within the original
length, and for a prompt that is read as one piece.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fope_jax.model.attention import attend, layer_arguments
from fope_jax.model.layers import rms_norm
from fope_jax.model.masks import TokenIndex
from fope_jax.model.running_sums import add_sums, running_sums
from fope_jax.model.transformer import (
    Transformer,
    attention_input,
    attention_to_output,
    bias_increments,
    project_qkv,
    repeat_heads,
    split_period,
)
from fope_jax.position.base import Layer, has_hook
from fope_jax.typing import Array

# From so many tokens on, a second copy of the weights saves more time than it takes to make.
UNSTACKED_FROM = 64


class LayerCache(NamedTuple):
    """What one layer of a period keeps; the token of index t is in slot ``t mod W``.

    Heads come before slots, as attention multiplies them: otherwise all keys and values would be
    copied into that order for every token.

    Attributes:
      keys: ``[L / P, B, K, W, E]``, or N heads if the method makes so many; see ``_to_stored``.
      values: ``[L / P, B, K, W, H]``.
      sums: ``[L / P, B, N, W, 2]`` running sums of the method's bias; None if it has none.
    """

    keys: Array
    values: Array
    sums: Array | None


class KVCache(NamedTuple):
    """Keys and values of at most S tokens; of the last W in a layer with a window.

    Attributes:
      layers: a ``LayerCache`` for each of the P layers of a period.
      positions: ``[B, S]`` int32, or float32 where they have fractions of a token.
      segments: ``[B, S]`` int32; segment 0 is padding or a token not yet read.
      filled: int32, tokens read; a NumPy number if known, so overflow raises under tracing too.
    """

    layers: tuple[LayerCache, ...]
    positions: Array
    segments: Array
    filled: Array


def init_cache(model: Transformer, batch: int, size: int) -> KVCache:
    """An empty cache of ``size`` tokens a row; ValueError if the method is defined for fewer."""
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

    layers = []
    for layer, key in zip(model.pattern, jax.eval_shape(rotated_keys), strict=True):
        sizes, slots = (config.num_layers // len(model.pattern), batch), _slots(layer, size)
        (heads, width), (kv_heads, head_dim) = key.shape[2:], (shape.num_kv_heads, shape.head_dim)
        has_sums = has_hook(layer.method, "running_bias")
        layers.append(
            LayerCache(
                _to_stored(jnp.zeros((*sizes, heads, slots, width), config.dtype)),
                _to_stored(jnp.zeros((*sizes, kv_heads, slots, head_dim), config.dtype)),
                jnp.zeros((*sizes, shape.num_heads, slots, 2), jnp.float32) if has_sums else None,
            )
        )
    zeros = jnp.zeros((batch, size), jnp.int32)
    return KVCache(tuple(layers), zeros, zeros, np.int32(0))


def _slots(layer: Layer, size: int) -> int:
    """The most tokens that a query of the layer sees, of ``size``."""
    return min([size, *(limit for limit in (layer.window, layer.chunk) if limit is not None)])


def forward_cached(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    positions: Array,
    segments: Array,
    *,
    keep: bool = True,
    periods: list[Any] | None = None,
) -> tuple[Array, KVCache]:
    """Reads the next T tokens of each row; ``tokens``, ``positions``, ``segments`` ``[B, T]``.

    Shorter rows begin with padding, segment 0. Returns the activations ``[B, T, D]`` after the
    final norm and the cache with these tokens; without ``keep`` the cache as it was, which ``vmap``
    over several continuations then does not copy for each. ``periods`` are the model's arrays from
    ``unstack_periods``, None is a scan over stacked ones. ValueError if the cache is full or was
    made for other windows; if ``filled`` is traced, as inside ``jit``, tokens that do not fit and
    all later ones give NaN instead.
    """
    config, pattern = model.config, model.pattern
    _check_slots(cache, pattern)
    start, length = jnp.asarray(cache.filled), tokens.shape[1]
    filled = _filled_after(cache, length)
    before = cache
    if keep:
        cache = cache._replace(
            positions=jax.lax.dynamic_update_slice_in_dim(before.positions, positions, start, 1),
            segments=jax.lax.dynamic_update_slice_in_dim(before.segments, segments, start, 1),
        )
    tables = model.tables(positions)
    keys_index = []
    for layer in cache.layers:
        slots = layer.keys.shape[3]
        if keep and _is_in_turn(cache, slots, length):
            keys_index.append(_slot_index(cache, slots, start + length))
        else:
            kept = _slot_index(before, slots, start)
            new = TokenIndex(positions, segments)
            keys_index.append(jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), kept, new))
    # Where frequencies follow the length, keys are rotated again, and queries with them: for the
    # length that the row has reached, whatever of it this piece or a window holds.
    k_tables: list[Any] = [None] * len(pattern)
    reached = [jnp.max(x, axis=1, keepdims=True) for x in (cache.positions, positions)]
    for i, layer in enumerate(pattern):
        if layer.method.limits.follows_length:
            tables_at = partial(_tables_of_row, model, i, jnp.maximum(*reached))
            tables[i], k_tables[i] = tables_at(positions), tables_at(keys_index[i].positions)

    def run_layer(index, number, weights, trained, constants, stack, x):
        layer, trained, constants = model.layer_position(index, trained, constants)
        stored = jax.tree.map(lambda x: _layer(x, number), stack)
        variables = {**trained, **constants}
        y = attention_input(config, weights, x)
        q, k, v = project_qkv(config, weights, y)
        rotated_q, rotated_k = layer.method.rotate(variables, tables[index], q, k)
        sums = None
        if stored.sums is not None:
            sums = running_sums(bias_increments(layer, variables, y))
            last = jnp.where(start > 0, _slot(stored.sums, start - 1), 0.0).swapaxes(1, 2)
            sums = add_sums(jnp.broadcast_to(last, sums.shape), sums)
        follows_length = layer.method.limits.follows_length
        new = LayerCache(k if follows_length else rotated_k, v, sums)
        new = jax.tree.map(lambda x: _to_stored(x.swapaxes(1, 2)), new)
        in_turn = keep and _is_in_turn(cache, stored.keys.shape[2], length)
        if keep:
            stack = jax.tree.map(lambda x, y: _write(x, y, number, start, in_turn), stack, new)
        if in_turn:
            seen = jax.tree.map(lambda x: _layer(x, number), stack)
        else:
            seen = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), stored, new)
        seen = jax.tree.map(lambda x: _from_stored(x).swapaxes(1, 2), seen)
        keys = seen.keys
        if follows_length:
            queries = jnp.zeros((*keys.shape[:2], *q.shape[2:]), q.dtype)
            _, keys = layer.method.rotate(variables, k_tables[index], queries, keys)
        # For few queries, all scores take no more memory than the keys.
        is_small = length * q.shape[2] <= keys.shape[2] * keys.shape[3]
        is_whole = length == 1 or is_small or config.attention == "reference"
        attended = attend(
            rotated_q,
            keys,
            repeat_heads(seen.values, keys),
            q_positions=positions,
            k_positions=keys_index[index].positions,
            q_segments=segments,
            k_segments=keys_index[index].segments,
            **layer_arguments(layer),
            bias_variables=trained,
            bias_constants=constants,
            sinks=weights.get("sinks"),
            q_sums=sums,
            k_sums=seen.sums,
            backend="reference" if is_whole else "chunked",
            block=config.attention_block,
        )
        return attention_to_output(config, weights, x, attended), stack

    def run_period(carry: tuple[Array, tuple[LayerCache, ...]], group: Any) -> tuple[Any, None]:
        x, layers = carry
        number, (weights, trained, constants) = group
        written = []
        for index, layer_weights in enumerate(split_period(weights, len(layers))):
            arrays = (layer_weights, trained, constants, layers[index])
            x, stack = run_layer(index, number, *arrays, x)
            written.append(stack)
        return (x, tuple(written)), None

    # The cache is carried, not scanned: a scan would copy all of it for each new token.
    carry = model.embed(tokens, positions), cache.layers
    if periods is None:
        numbers = jnp.arange(config.num_layers // len(pattern), dtype=jnp.int32)
        carry, _ = jax.lax.scan(run_period, carry, (numbers, model.period_arrays()))
    else:
        for number, arrays in enumerate(periods):
            carry, _ = run_period(carry, (jnp.int32(number), arrays))
    x, layers = carry
    hidden = rms_norm(x, model.final_norm[...], config.norm_eps)
    # An append beyond the end has overwritten the last keys.
    hidden = jnp.where(filled > cache.positions.shape[1], jnp.nan, hidden)
    return hidden, cache._replace(layers=layers, filled=filled) if keep else before


def unstack_periods(model: Transformer) -> list[Any]:
    """What ``period_arrays`` stacks, in arrays of each period.

    Out of a stack XLA on CPU copies the weights of a layer before it multiplies by them, for every
    token. Here all are copied once, into as much memory again; the program holds every layer and
    takes longer to compile.
    """
    arrays = model.period_arrays()
    count = model.config.num_layers // len(model.pattern)
    periods = [jax.tree.map(lambda x, i=index: x[i], arrays) for index in range(count)]
    return jax.lax.optimization_barrier(periods)  # XLA would move the slices into a loop


def _periods_for(model: Transformer, count: int) -> list[Any] | None:
    """``unstack_periods`` where it makes a loop over ``count`` tokens faster, else None."""
    is_worth_it = count >= UNSTACKED_FROM and jax.default_backend() == "cpu"
    return unstack_periods(model) if is_worth_it else None


def _tables_of_row(model: Transformer, index: int, farthest: Array, positions: Array) -> Any:
    """Tables of layer ``index`` at ``positions [B, T]`` of rows that reach ``farthest [B, 1]``."""
    tables = model.layer_tables(index, jnp.concatenate([farthest, positions], axis=1))
    return jax.tree.map(lambda x: x[:, 1:], tables)


def _check_slots(cache: KVCache, pattern: tuple[Layer, ...]) -> None:
    size = cache.positions.shape[1]
    for index, (layer, stored) in enumerate(zip(pattern, cache.layers, strict=True)):
        slots, needed = stored.keys.shape[3], _slots(layer, size)
        if slots != needed:
            raise ValueError(
                f"layer {index} has {slots} slots in a cache of {size} tokens: with window="
                f"{layer.window}, chunk={layer.chunk} it needs {needed}; make the cache with "
                "init_cache for this model"
            )


def _is_in_turn(cache: KVCache, slots: int, length: int) -> bool:
    """Whether new tokens overwrite no token that they see: all slots are kept, or one is new."""
    return slots == cache.positions.shape[1] or length == 1


def _slot_index(cache: KVCache, slots: int, filled: Array) -> TokenIndex:
    """Positions and segments ``[B, W]`` of a layer's slots after ``filled`` tokens."""
    if slots == cache.positions.shape[1]:
        return TokenIndex(cache.positions, cache.segments)
    last = filled - 1
    token = last - (last - jnp.arange(slots)) % slots
    is_used, token = token >= 0, jnp.maximum(token, 0)
    positions, segments = (
        jnp.take(x, token, axis=1, mode="clip") for x in (cache.positions, cache.segments)
    )
    return TokenIndex(positions, jnp.where(is_used, segments, 0))


def _to_stored(x: Array) -> Array:
    """Bfloat16 is stored as its bits: XLA on CPU makes float32 of all of an array, and bfloat16
    again, to write a few bfloat16 numbers into it."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_stored(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _slot(stored: Array, token: Array) -> Array:
    """What ``stored [B, N, W, ...]`` holds for one token, ``[B, N, 1, ...]``."""
    return jax.lax.dynamic_slice_in_dim(stored, token % stored.shape[2], 1, axis=2)


def _layer(stack: Array, number: Array) -> Array:
    """One layer ``[B, K, W, ...]`` of ``stack [L / P, B, K, W, ...]``."""
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


def _write(stack: Array, new: Array, number: Array, start: Array, in_turn: bool) -> Array:
    """Writes ``new [B, K, T, E]``, from token ``start`` on, into layer ``number`` of ``stack``.

    ``in_turn``: no slot is used twice, as in a layer that keeps all tokens.
    """
    slots, length = stack.shape[3], new.shape[2]
    if in_turn:
        zero = jnp.zeros_like(number)
        first = (number, zero, zero, start % slots, zero)
        return jax.lax.dynamic_update_slice(stack, new[None], first)
    count = min(slots, length)
    slot = (start + length - count + jnp.arange(count)) % slots
    newest = jnp.moveaxis(new[:, :, length - count :], 2, 0)  # indices apart put W first
    return stack.at[number, :, :, slot].set(newest, unique_indices=True)


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
    model: Transformer, tokens: Array, segments: Array, room: int, positions: Array | None = None
) -> tuple[Array, KVCache, Array]:
    """Reads prompts that end together, ``tokens [B, T]`` padded on the left.

    ``segments [B, T]`` is 1 for the prompt and 0 for padding; ``room`` is the number of free slots
    for tokens to come; ``positions [B, T]`` are 0, 1, 2, .. from the prompt's first token on if
    None. Returns hidden ``[B, T, D]``, the cache, and the next position ``[B, 1]``.
    """
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = init_cache(model, tokens.shape[0], tokens.shape[1] + room)
    cache = cache._replace(positions=cache.positions.astype(positions.dtype))
    hidden, cache = forward_cached(model, cache, tokens, positions, segments)
    return hidden, cache, positions[:, -1:] + 1


def greedy_decode(
    model: Transformer,
    hidden: Array,
    cache: KVCache,
    position: Array,
    count: int,
    not_first: tuple[int, ...] = (),
) -> Array:
    """The next ``count`` tokens, each the most likely one, ``[B, count]`` int32.

    ``hidden``, ``cache`` and ``position`` are from ``prefill``, with room for ``count - 1`` tokens;
    a ``position [B, count - 1]`` is that of each token that is read.
    The first one is the most likely token that is not in ``not_first``.
    Tokens are -1 from the first non-finite logits on, from the model or a full cache (see
    ``forward_cached``). ValueError if ``count`` is below 1 or the cache is known to be too small.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected 1 token or more")
    _filled_after(cache, count - 1)

    def choose(hidden: Array, excluded: tuple[int, ...] = ()) -> Array:
        def largest(logits: Array) -> Array:
            allowed = logits.at[:, list(excluded)].set(-jnp.inf) if excluded else logits
            return jnp.argmax(allowed, axis=-1)

        return _choose_token(model, hidden, largest)

    def step(carry: tuple[Array, KVCache], position: Array):
        token, cache = carry
        segments = jnp.ones_like(token)
        hidden, cache = forward_cached(
            model, cache, token, position[:, None], segments, periods=periods
        )
        token = choose(hidden)
        return (token, cache), token[:, 0]

    first, periods = choose(hidden, not_first), _periods_for(model, count)
    _, others = jax.lax.scan(step, (first, cache), _positions_from(position, count - 1).T)
    return jnp.concatenate([first, others.T], axis=1)


def _positions_from(position: Array, count: int) -> Array:
    """Positions ``[B, count]`` of the tokens after ``position [B, 1]``; ``[B, count]`` stay."""
    if position.shape[1] == count:
        return position
    return position + jnp.arange(count, dtype=position.dtype)[None]


def sample_decode(
    model: Transformer,
    hidden: Array,
    cache: KVCache,
    position: Array,
    size: int,
    *,
    count: Array | int,
    temperature: Array | float,
    key: Array,
    stop: int | None,
) -> Array:
    """At most ``count`` next tokens, drawn from ``softmax(logits / temperature)``.

    Ends before ``count`` when every row has drawn ``stop``. Only ``size`` and ``stop`` are static:
    one compiled program serves any count up to ``size`` and any temperature.

    Args:
      hidden, cache, position: from ``prefill``, with room for ``size - 1`` tokens.
      size: tokens of the result.
      count: 1 to ``size``.
      temperature: 0 takes the most likely token, as ``greedy_decode``.
      key: token ``i`` is drawn with ``fold_in(key, i)``.
      stop: a token such as the end of a document; None never ends early.

    Returns:
      ``[B, size]`` int32. Tokens after ``count`` or a row's ``stop`` mean nothing; -1 is drawn from
      logits that are not finite.
    """
    _filled_after(cache, size - 1)
    stop = -2 if stop is None else stop  # no token

    def choose(hidden: Array, index: Array | int) -> Array:
        def draw(logits: Array) -> Array:
            scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
            drawn = jax.random.categorical(jax.random.fold_in(key, index), scaled)
            return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))

        return _choose_token(model, hidden, draw)

    def goes_on(carry: Any) -> Array:
        index, token, is_done, *_ = carry
        return (index < count) & ~jnp.all(is_done | (token[:, 0] == stop))

    def step(carry: Any) -> Any:
        index, token, is_done, cache, position, written = carry
        is_done |= token[:, 0] == stop
        segments = jnp.ones_like(token)
        hidden, cache = forward_cached(model, cache, token, position, segments, periods=periods)
        token = choose(hidden, index)
        written = jax.lax.dynamic_update_slice_in_dim(written, token, index, axis=1)
        return index + 1, token, is_done, cache, position + 1, written

    first, periods = choose(hidden, 0), _periods_for(model, size)
    written = jnp.zeros((len(first), size), jnp.int32).at[:, :1].set(first)
    is_done = jnp.zeros(len(first), bool)
    cache = cache._replace(filled=jnp.asarray(cache.filled))
    start = (jnp.int32(1), first, is_done, cache, position, written)
    return jax.lax.while_loop(goes_on, step, start)[-1]


def _choose_token(model: Transformer, hidden: Array, choose: Any) -> Array:
    """The token ``[B, 1]`` that ``choose(logits [B, V])`` gives after the last of ``hidden``."""
    logits = model.unembed(hidden[:, -1:])[:, 0]
    # argmax takes NaN for the largest value and would return a valid token id.
    is_finite = jnp.isfinite(logits).all(axis=-1)
    return jnp.where(is_finite, choose(logits), -1).astype(jnp.int32)[:, None]
