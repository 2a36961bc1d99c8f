"""Shared by the Flax drop-ins: one layer's position hooks around any attention function."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fope_jax.model.attention import contextual_bias_by_position, scale_queries
from fope_jax.model.masks import TokenIndex, attention_mask
from fope_jax.model.running_sums import bias_of_sums, running_sums
from fope_jax.position import PositionEmbedding
from fope_jax.position.base import Layer, Variables, bias_of_heads, embed_tokens, has_hook
from fope_jax.position.rotation import as_array, token_positions
from fope_jax.typing import Array

# ---------------------------------------------------------------------------- positions


def int32_positions(positions: Array, name: str) -> Array:
    """Positions as int32; ValueError unless integers of 32 bits (the range only if not traced)."""
    positions = np.asarray(positions) if _is_concrete(positions) else positions
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {positions.dtype}: they count tokens, pass integers")
    if _is_concrete(positions):
        token_positions(positions)  # raises for a position that does not fit 32 bits
    return positions.astype(np.int32)


def position_rows(
    method: PositionEmbedding, positions: Array | None, x: Array, name: str = "positions"
) -> Array:
    """Positions ``[T]``, ``[1, T]`` or ``[B, T]`` of ``x [B, T, ...]`` as ``[1 or B, T]`` int32.

    None counts from 0. ValueError for other shapes, or if the method is not defined for T tokens.
    """
    num_rows, length = x.shape[:2]
    if positions is None:
        longest = method.limits.max_length
        if longest is not None and length > longest:
            raise ValueError(
                f"a sequence of {length} tokens: {method} is defined for {longest} at most"
            )
        return np.arange(length, dtype=np.int32)[None]  # NumPy, so that it is known under ``jit``
    rows = int32_positions(positions, name)
    if rows.shape not in ((length,), (1, length), (num_rows, length)):
        raise ValueError(
            f"{name} has shape {rows.shape}: expected {(length,)}, {(1, length)} or "
            f"{(num_rows, length)}"
        )
    return rows[None] if rows.ndim == 1 else rows


def query_and_key_positions(
    method: PositionEmbedding,
    q: Array,
    k: Array,
    positions: Array | None,
    key_positions: Array | None,
) -> tuple[Array, Array]:
    """Positions ``[1 or B, T]`` and ``[1 or B, S]``, one object if equal; ValueError if unknown."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if positions is None and key_positions is not None:
        raise ValueError("key_positions are given, positions are not: pass both")
    if positions is None and num_queries != num_keys:
        hint = "; for the key cache of Flax set decode=True" if num_queries == 1 else ""
        raise ValueError(
            f"{num_queries} queries and {num_keys} keys: where the queries stand is not known, "
            f"pass positions{hint}"
        )
    q_positions = position_rows(method, positions, q)
    if key_positions is None and num_queries == num_keys:
        return q_positions, q_positions
    return q_positions, position_rows(method, key_positions, k, "key_positions")


def _is_concrete(x: Array) -> bool:
    return not isinstance(x, Tracer)


# ---------------------------------------------------------------------------- what modules do


def embed(
    method: PositionEmbedding, variables: Variables, x: Array, positions: Array | None
) -> Array:
    """Applies ``method`` to ``x [B, T, D]`` at ``positions``; None counts from 0."""
    return embed_tokens(method, variables, x, jnp.asarray(position_rows(method, positions, x)))


def rotate(
    method: PositionEmbedding,
    variables: Variables,
    q: Array,
    k: Array,
    positions: Array | None,
    key_positions: Array | None,
) -> tuple[Array, Array]:
    """Rotates ``q [B, T, N, H]``, times its logit scale, and ``k [B, S, K, H]``.

    ValueError if positions are unknown, or differ while the frequencies follow the length.
    """
    (layer,) = method.layers()
    q_positions, k_positions = query_and_key_positions(method, q, k, positions, key_positions)
    q, k = _rotate(layer.method, layer.select(variables), q, k, q_positions, k_positions)
    if layer.logit_scale is not None:
        q = scale_queries(q, layer.logit_scale(jnp.asarray(q_positions)))
    return q, k


def _rotate(
    method: PositionEmbedding,
    variables: Variables,
    q: Array,
    k: Array,
    q_positions: Array,
    k_positions: Array,
) -> tuple[Array, Array]:
    head_dim = q.shape[-1]
    tables = method.tables(variables, jnp.asarray(q_positions), head_dim)
    if q_positions is k_positions:
        return method.rotate(variables, tables, q, k)
    if method.limits.follows_length:
        raise ValueError(
            f"{method}: its frequencies follow the length of the sequence, which queries and keys "
            "at different positions do not share; give the scaling a length"
        )
    # Two rotations, each with zeros for the other side, which are compiled away.
    k_tables = method.tables(variables, jnp.asarray(k_positions), head_dim)
    no_k = jnp.zeros((*q.shape[:2], k.shape[2], head_dim), k.dtype)
    no_q = jnp.zeros((*k.shape[:2], q.shape[2], head_dim), q.dtype)
    rotated_q, _ = method.rotate(variables, tables, q, no_k)
    _, rotated_k = method.rotate(variables, k_tables, no_q, k)
    return rotated_q, rotated_k


def attend(
    method: PositionEmbedding,
    variables: Variables,
    attention_fn: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None,
    is_causal: bool = False,
    positions: Array | None = None,
    key_positions: Array | None = None,
    inputs: Array | None = None,
    decode: bool = False,
    bias: Array | None = None,
    **options: Any,
) -> Array:
    """``attention_fn`` with all that the method does in a layer, ``[batch..., T, N, H]``.

    A window or chunk becomes a mask, other logits of far keys a bias. A ``bias`` of the caller is
    added to that of the method, and is in the logits that a contextual bias is made of. If the
    method widens q and k, ``attention_fn`` gets values padded to that width, and q scaled for its
    1 / sqrt(width).

    If the method needs a causal mask, a query that sees a later key raises ValueError, or gives NaN
    under tracing. Positions that are unknown, do not fit or exceed the method's range raise
    ValueError, as do a mask that does not fit, and missing ``inputs``.

    Args:
      method: serves one layer.
      variables: of the layer and the model.
      attention_fn: called with query, key, value, mask, any ``bias`` and the options; batch axes
        are flattened to one.
      query: ``[batch..., T, N, H]``.
      key, value: ``[batch..., S, K, H]``; keys not rotated, as in Flax's key cache, in any order.
      mask, bias: broadcast to ``[batch..., N, T, S]``; the mask is False where a key is hidden.
      is_causal: hides keys at later positions. Packed documents need a ``mask`` too.
      positions: of the queries, ``[T]``, ``[1, T]`` or ``[batch..., T]``; None counts from 0 and
        needs T = S.
      key_positions: of the keys; None takes those of the queries, or counts from 0.
      inputs: ``[batch..., T, D]`` what queries and keys are projected from, for a method with a
        running bias (FoX). Documents in a row are stored in order of their positions.
      decode: the single query is the newest visible key; keys count from 0.
      **options: passed to ``attention_fn``.
    """
    batch = query.shape[:-3]
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    scores_shape = (*batch, q.shape[2], q.shape[1], k.shape[1])
    mask, bias = _flat_mask(mask, scores_shape), _flat_mask(bias, scores_shape, "bias")
    if len(batch) > 1:
        positions, key_positions = (
            x if x is None or np.shape(x)[:-1] != batch else as_array(x).reshape(len(q), -1)
            for x in (positions, key_positions)
        )
    if decode and positions is None and q.shape[1] == 1 and mask is not None:
        positions = jnp.broadcast_to(_newest_key(mask, (1, 2, 3))[:, None], (len(q), 1))
        key_positions = np.arange(k.shape[1])
    q_positions, k_positions = query_and_key_positions(method, q, k, positions, key_positions)

    sees_later = None
    if is_causal and positions is not None:  # Flax's causal mask goes by stored order
        if mask is None and q_positions is k_positions and _repeats(q_positions):
            raise ValueError(
                "positions repeat within a row and mask is None: documents that are packed into "
                "one row need a mask that keeps them apart"
            )
        earlier = ~_is_later(q_positions, k_positions)
        mask = earlier if mask is None else mask.astype(bool) & earlier
        is_causal = False
    elif method.limits.needs_causal_mask and not is_causal:
        sees_later = _sees_later(method, mask, _is_later(q_positions, k_positions))

    (layer,) = method.layers()
    variables = layer.select(variables)
    q, k = _rotate(layer.method, variables, q, k, q_positions, k_positions)
    if k.shape[2] != v.shape[2]:  # the method has a matrix per query head
        v = jnp.repeat(v, k.shape[2] // v.shape[2], axis=2)
    q_rows, k_rows = jnp.asarray(q_positions), jnp.asarray(k_positions)
    if layer.hides_keys:
        q_index, k_index = (TokenIndex(rows, jnp.ones_like(rows)) for rows in (q_rows, k_rows))
        near = attention_mask(q_index, k_index, layer.window, layer.chunk)[:, None]
        mask = near if mask is None else mask.astype(bool) & near
    is_far = None
    if layer.far_from is not None:
        is_far = (q_rows[:, :, None] - k_rows[:, None, :] >= layer.far_from)[:, None]
    if has_hook(layer.method, "bias"):
        bias = _sum(bias, bias_of_heads(layer.method, variables, q_rows, k_rows))
    if has_hook(layer.method, "running_bias"):
        is_self = q_positions is k_positions and not decode
        added = _running_bias(layer, variables, _flat_inputs(method, inputs, query, is_self))
        bias = _sum(bias, added)
    if has_hook(layer.method, "contextual_bias"):
        contextual_bias = layer.method.contextual_bias
        if not _is_concrete(k_positions) or not np.all(np.diff(k_positions, axis=1) > 0):
            contextual_bias = functools.partial(
                contextual_bias_by_position, contextual_bias, k_rows
            )
        scores = _scores(q, k, v.shape[-1], is_far)
        added = contextual_bias(variables, q, _logits(scores, bias, mask, is_causal))
        bias = _sum(bias, added)
    if layer.logit_scale is not None:
        q = scale_queries(q, layer.logit_scale(q_rows))
    if is_far is not None:  # the logits of far keys, as a bias to those of the near version
        near_q, near_k = (jnp.split(x, 2, axis=-1)[0] for x in (q, k))
        added = _scores(q, k, v.shape[-1], is_far) - _scores(near_q, near_k, v.shape[-1])
        q, k, bias = near_q, near_k, _sum(bias, added)
    options["mask"] = mask
    if bias is not None:
        options["bias"] = bias
    if is_causal:  # Linen's attention has no such argument
        options["is_causal"] = True
    out = _call_padded(attention_fn, q, k, v, options)
    if sees_later is not None:
        out = jnp.where(sees_later[:, :, None, None], jnp.nan, out)
    return out.reshape(*batch, *out.shape[1:])


def decoding_step(mask: Array, num_keys: int, last: Array) -> tuple[Array, Array]:
    """The newest key, int32, in the mask ``[..., S]`` of one query, and whether it overflowed.

    Flax's key cache clamps its index, so a token too many overwrites the last. The only sign of it
    is the same newest key as in the previous step, ``last`` (-1 before the first). ValueError on a
    known overflow.
    """
    newest = _newest_key(mask)
    # With one key, the first step of a new sequence would look the same.
    is_full = (newest == num_keys - 1) & (last == newest) & (num_keys > 1)
    if _is_concrete(is_full) and is_full:
        raise ValueError(
            f"the key cache holds {num_keys} tokens and all are used: one more would overwrite the "
            "last; make a larger cache"
        )
    return newest, is_full


def _newest_key(mask: Array, axis: tuple[int, ...] | None = None) -> Array:
    """The index of the last visible key; -1 if none."""
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return jnp.max(jnp.where(mask.astype(bool), index, -1), axis=axis)


def _sum(bias: Array | None, added: Array) -> Array:
    """float32, as biases of methods are."""
    return added if bias is None else jnp.asarray(bias, jnp.float32) + added


def _flat_mask(mask: Array | None, scores: tuple[int, ...], name: str = "mask") -> Array | None:
    """``mask`` as ``[1 or B, 1 or N, 1 or T, 1 or S]`` for scores ``[batch..., N, T, S]``."""
    if mask is None:
        return None
    shape = (1,) * (len(scores) - mask.ndim) + mask.shape
    if len(shape) != len(scores) or any(
        n not in (1, m) for n, m in zip(shape, scores, strict=True)
    ):
        hint = f"; a key cache takes the {name} of its one query" if scores[-2] == 1 else ""
        raise ValueError(
            f"{name} has shape {mask.shape}: expected what broadcasts to {scores}, [batch..., "
            f"heads, queries, keys]{hint}"
        )
    if set(shape[:-3]) <= {1}:
        return mask.reshape(1, *shape[-3:])
    rows = jnp.broadcast_to(mask.reshape(shape), (*scores[:-3], *shape[-3:]))
    return rows.reshape(-1, *shape[-3:])


def _repeats(positions: Array) -> bool:
    """Whether two tokens of a row are known to have the same position."""
    return _is_concrete(positions) and bool(np.any(np.diff(np.sort(positions, axis=1)) == 0))


def _is_later(q_positions: Array, k_positions: Array) -> Array:
    return k_positions[:, None, None, :] > q_positions[:, None, :, None]


def _sees_later(method: PositionEmbedding, mask: Array | None, is_later: Array) -> Array | None:
    """Queries ``[1 or B, T]`` that see a later key; None if none do; ValueError if not traced."""
    problem = "mask is None and is_causal is not set"
    if mask is not None:
        if not _is_concrete(mask) or not _is_concrete(is_later):
            return jnp.any(mask.astype(bool) & is_later, axis=(1, 3))
        if not np.any(np.asarray(mask).astype(bool) & np.asarray(is_later)):
            return None
        problem = "the mask shows a query a key after it"
    raise ValueError(
        f"{method}: it is defined for keys at the query's position or before it, and {problem}: "
        "pass a causal mask"
    )


def _flat_inputs(
    method: PositionEmbedding, inputs: Array | None, query: Array, is_self: bool
) -> Array:
    """``inputs`` as ``[B, T, D]``; ValueError if they are missing or are not those of the keys."""
    if not is_self:
        raise ValueError(
            f"{method}: its bias sums over the tokens between key and query, so both must be of "
            "the same tokens, at the same positions, and a key cache is not supported"
        )
    if inputs is None:
        raise ValueError(
            f"{method}: its bias is made from what queries and keys are projected from; pass it: "
            "PositionAttention(.., inputs=x) in Linen, set_inputs(x) before the call in NNX"
        )
    if inputs.ndim != query.ndim - 1 or inputs.shape[:-1] != query.shape[:-2]:
        raise ValueError(
            f"inputs have shape {inputs.shape}: expected {(*query.shape[:-2], 'D')}, [batch..., T, "
            "D], one row for each query"
        )
    return inputs.reshape(-1, *inputs.shape[-2:])


def _running_bias(layer: Layer, variables: Variables, inputs: Array) -> Array:
    """``[B, N, T, T]``: the sum of increments up to the query less that up to the key."""
    sums = running_sums(layer.method.running_bias(variables, inputs)).transpose(0, 2, 1, 3)
    return bias_of_sums(sums, sums)


def _scores(q: Array, k: Array, head_dim: int, is_far: Array | None = None) -> Array:
    """q.k / sqrt(H) ``[B, N, T, S]`` float32, of the far versions where ``is_far``."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)

    def products(q: Array, k: Array) -> Array:
        return jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)

    if is_far is None:
        scores = products(q, k)
    else:
        (near_q, far_q), (near_k, far_k) = (jnp.split(x, 2, axis=-1) for x in (q, k))
        scores = jnp.where(is_far, products(far_q, far_k), products(near_q, near_k))
    return scores * np.float32(head_dim**-0.5)


def _logits(scores: Array, bias: Array | None, mask: Array | None, is_causal: bool) -> Array:
    """Scores with the bias, -inf where masked."""
    if bias is not None:
        scores = scores + jnp.asarray(bias, jnp.float32)
    if is_causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool)[None, None], scores, -jnp.inf)
    return scores if mask is None else jnp.where(mask.astype(bool), scores, -jnp.inf)


def _call_padded(
    attention_fn: Callable[..., Array], q: Array, k: Array, v: Array, options: dict[str, Any]
) -> Array:
    """``attention_fn`` of values padded to the width of q and k, and q scaled for that width."""
    head_dim, width = v.shape[-1], q.shape[-1]
    if width != head_dim:
        q = scale_queries(q, jnp.full((1, 1), (width / head_dim) ** 0.5, jnp.float32))
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
    # Flax adds a float32 bias to 16-bit scores, and jax scales 16-bit scores by float32. Strict
    # dtype promotion would refuse both.
    with jax.numpy_dtype_promotion("standard"):
        return attention_fn(q, k, v, **_accepted(attention_fn, options))[..., :head_dim]


def _accepted(attention_fn: Callable[..., Array], options: dict[str, Any]) -> dict[str, Any]:
    """The options that ``attention_fn`` takes; ValueError if it lacks one that matters."""
    known = inspect.signature(attention_fn).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return options
    for name in ("mask", "bias", "is_causal"):
        if name not in known and options.get(name) is not None:
            raise ValueError(f"attention_fn={attention_fn}: it takes no {name!r}, one is needed")
    return {name: value for name, value in options.items() if name in known}
