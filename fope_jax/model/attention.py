"""Causal attention within segments: a reference that holds all scores, and a chunked form.

The chunked form keeps a running maximum and sum per query over blocks of scores, so its memory
grows with T + S instead of T * S. Its backward pass recomputes each block from the log-sum-exp. A
window w leaves T * w of the work, because blocks that it does not touch are not visited. A
contextual bias needs whole rows of scores, computed for a block of queries at a time.

Reference: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness"; Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fope_jax.model.layers import check_derivatives
from fope_jax.position.base import Layer, bias_of_heads, has_hook
from fope_jax.typing import Array

BACKENDS = ("chunked", "reference")

BiasFn = Callable[[Any, Array, Array], Array]
ContextualFn = Callable[[Any, Array, Array], Array]
LogitScale = Callable[[Array], Array]

# Most scores of one head in a block of whole rows: 16 MB of float32.
_SCORES_IN_ROWS = 2**22

# Finite, because -inf - (-inf) would be NaN for a query that sees no key.
_LOWEST = -1e30


class TokenIndex(NamedTuple):
    """Positions and segments (0 is padding), int32 ``[..., B, T]``; B may be 1 for all rows."""

    positions: Array
    segments: Array


class _Rules(NamedTuple):
    """What is known while tracing; see the arguments of ``attend`` of the same names."""

    scale: float
    bias_fn: BiasFn | None = None
    window: int | None = None
    chunk: int | None = None
    far_from: int | None = None


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    q_segments: Array,
    k_segments: Array,
    bias_fn: BiasFn | None = None,
    contextual_fn: ContextualFn | None = None,
    logit_scale: LogitScale | None = None,
    bias_variables: dict[str, Array] | None = None,
    bias_constants: dict[str, Array] | None = None,
    window: int | None = None,
    chunk: int | None = None,
    far_from: int | None = None,
    sinks: Array | None = None,
    q_sums: Array | None = None,
    k_sums: Array | None = None,
    backend: str = "chunked",
    block: int | None = None,
    derivatives: str = "reverse",
) -> Array:
    """Attention of each query to the keys of its segment at its position or earlier.

    ``softmax(scale q k / sqrt(H) + bias) v`` with the softmax in float32; zeros for a query that
    sees no key, such as padding. Tokens may be stored in any order; by segment and position, blocks
    above the diagonal and beyond the window are skipped.

    Args:
      q: ``[B, T, N, E]``; the result is ``[B, T, N, H]`` in its dtype.
      k: ``[B, S, K, E]``, K a divisor of N; query head n reads key-value head ``n // (N / K)``.
      v: ``[B, S, K, H]``. E differs from H where a method widens q and k.
      q_positions, q_segments: ``[B, T]`` or ``[1, T]`` int32; segment 0 is padding.
      k_positions, k_segments: ``[B, S]`` or ``[1, S]`` int32.
      bias_fn: maps (variables, q_positions ``[B, t]``, k_positions ``[B, s]``) to ``[B, N, t, s]``
        float32; any axis may be 1. It must not close over traced arrays; pass those as variables.
      contextual_fn: maps (variables, q ``[B, t, N, H]``, logits ``[B, N, t, S]``) to a further,
        finite bias ``[B, N, t, S]``; any axis may be 1. The logits are float32, biased, without
        ``logit_scale``, -inf where masked, and cover all keys sorted by position.
      logit_scale: maps q_positions ``[B, t]`` to the factor on the logits before any bias.
      bias_variables: floating arrays for ``bias_fn`` and ``contextual_fn``, with gradients.
      bias_constants: further arrays for them, under other names, without gradients.
      window: w tokens: keys at w or more tokens before the query are not seen.
      chunk: c tokens: only keys of the query's chunk, floor(position / c), are seen.
      far_from: tokens: q and k hold two versions, ``[.., 2 E]``; keys this far back or further take
        their logits from the second.
      sinks: ``[N]``, a logit a head of a further key, with value 0, that every query sees.
      q_sums, k_sums: ``[B, T, N, 2]`` and ``[B, S, N, 2]`` float32 from ``running_sums``; their
        difference, query minus key, is a further bias.
      backend: "chunked" or "reference" (which holds ``[B, N, T, S]``).
      block: queries and keys in a block of the chunked form; None is ``default_block()``.
      derivatives: "reverse" for ``jax.grad``; "all" adds forward mode and second derivatives, for
        which the chunked form holds a block of queries with all keys.

    Raises ValueError for shapes that do not fit, numbers of tokens below 1, an unknown ``backend``
    or ``derivatives``.

    Reference: for sinks Xiao et al. 2023, "Efficient Streaming Language Models with Attention
    Sinks", Section 3, learned as in OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card",
    Section 2.
    """
    q_index, k_index = TokenIndex(q_positions, q_segments), TokenIndex(k_positions, k_segments)
    trained, constants = bias_variables or {}, jax.lax.stop_gradient(bias_constants or {})
    block = default_block() if block is None else block
    check_derivatives(derivatives)
    _check(q, k, v, q_index, k_index, trained, constants, backend, block)
    rules = _rules(v, bias_fn, window, chunk, far_from)
    batch, length, num_heads, width = q.shape
    kv_heads, group = k.shape[2], num_heads // k.shape[2]
    sums = _check_sums(q_sums, k_sums, q, k)
    if logit_scale is not None and contextual_fn is None:
        q, logit_scale = scale_queries(q, logit_scale(q_positions)), None
    q = q.reshape(batch, length, kv_heads, group, width)
    q_sums, k_sums = (
        None if x is None else x.reshape(*x.shape[:2], kv_heads, group, 2) for x in sums
    )
    sinks = None if sinks is None else _check_sinks(sinks, num_heads).reshape(1, kv_heads, group)
    if backend == "chunked" and derivatives == "reverse" and contextual_fn is None:
        out: Any = _chunked(
            rules,
            _to_blocks(q, block).transpose(0, 1, 3, 4, 2, 5),
            _to_blocks(k, block).transpose(0, 1, 3, 2, 4),
            _to_blocks(v, block).transpose(0, 1, 3, 2, 4),
            _sum_blocks(q_sums, block),
            _sum_blocks(k_sums, block),
            sinks,
            trained if bias_fn else {},
            constants if bias_fn else {},
            TokenIndex(*(_to_blocks(x, block) for x in q_index)),
            TokenIndex(*(_to_blocks(x, block) for x in k_index)),
        )
    else:
        if contextual_fn is not None:
            k, v, k_sums, k_index = _sort_by_position(k, v, k_sums, k_index)
        rows = length
        if backend == "chunked":
            rows = max(1, min(block, _SCORES_IN_ROWS // k.shape[1]))
        out = _attend_rows(
            functools.partial(_attend_whole, rules, contextual_fn, logit_scale),
            _to_blocks(q, rows).transpose(0, 1, 3, 4, 2, 5),
            _sum_blocks(q_sums, rows),
            TokenIndex(*(_to_blocks(x, rows) for x in q_index)),
            (
                k.transpose(0, 2, 1, 3),
                v.transpose(0, 2, 1, 3),
                None if k_sums is None else k_sums.transpose(0, 2, 3, 1, 4),
                sinks,
                {**trained, **constants},
                k_index,
            ),
            recompute=backend == "chunked" or contextual_fn is not None,
        )
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads, v.shape[-1])
    return out[:, :length]


def default_block() -> int:
    """Block size; on CPU powers of two compete for cache lines (benchmarks/README.md)."""
    return 280 if jax.default_backend() == "cpu" else 512


def layer_arguments(position: Layer) -> dict[str, Any]:
    """The arguments of ``attend`` that depend on the layer's position embedding."""
    method = position.method
    is_contextual = has_hook(method, "contextual_bias")
    return {
        "bias_fn": functools.partial(bias_of_heads, method) if has_hook(method, "bias") else None,
        "contextual_fn": method.contextual_bias if is_contextual else None,
        "logit_scale": position.logit_scale,
        "window": position.window,
        "chunk": position.chunk,
        "far_from": position.far_from,
    }


def scale_queries(q: Array, scale: Array) -> Array:
    """``q [B, T, N, H]`` times ``scale [1 or B, 1 or T]``, in the dtype of q."""
    return (q.astype(jnp.float32) * scale[:, :, None, None]).astype(q.dtype)


def _rules(v, bias_fn, window, chunk, far_from) -> _Rules:
    for name, value in (("window", window), ("chunk", chunk), ("far_from", far_from)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected 1 token or more, or None")
    return _Rules(v.shape[-1] ** -0.5, bias_fn, window, chunk, far_from)


def _check(q, k, v, q_index, k_index, trained, constants, backend, block) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if block < 1:
        raise ValueError(f"block={block}: expected 1 or more tokens")
    if k.shape[:3] != v.shape[:3] or q.shape[2] % k.shape[2] != 0 or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, N, E], [B, S, K, E] and "
            "[B, S, K, H] with N a multiple of K"
        )
    for side, index, x in (("q", q_index, q), ("k", k_index, k)):
        rows, length = x.shape[:2]
        for name, array in index._asdict().items():
            if array.shape not in ((rows, length), (1, length)):
                raise ValueError(
                    f"{side}_{name} {array.shape}: expected {(rows, length)}, or {(1, length)} "
                    "where all rows share them"
                )
    for name, x in trained.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"bias_variables[{name!r}] is {x.dtype}: what is trained is floating; pass others "
                "as bias_constants"
            )
    if clash := sorted(trained.keys() & constants.keys()):
        raise ValueError(f"bias_variables and bias_constants both hold {clash}: names must differ")


def _check_sums(q_sums, k_sums, q, k) -> tuple[Array | None, Array | None]:
    if q_sums is None and k_sums is None:
        return None, None
    for name, sums, x in (("q_sums", q_sums, q), ("k_sums", k_sums, k)):
        expected = (*x.shape[:2], q.shape[2], 2)
        if sums is None or sums.shape != expected:
            given = "None" if sums is None else str(sums.shape)
            raise ValueError(f"{name} {given}: expected {expected}, as from running_sums")
    return q_sums, k_sums


def _check_sinks(sinks: Array, num_heads: int) -> Array:
    if sinks.shape != (num_heads,):
        raise ValueError(f"sinks {sinks.shape}: expected {(num_heads,)}, a logit a query head")
    return sinks.astype(jnp.float32)


def _sum_blocks(sums: Array | None, block: int) -> Array | None:
    """``[B, T, K, G, 2]`` in blocks: ``[Q, B, K, G, t, 2]``."""
    return None if sums is None else _to_blocks(sums, block).transpose(0, 1, 3, 4, 2, 5)


def _to_blocks(x: Array, block: int) -> Array:
    """Pads with zeros and splits axis 1: ``[B, T, ...]`` to ``[Q, B, t, ...]``, in equal blocks."""
    length = x.shape[1]
    count = max(1, math.ceil(length / block))
    size = max(1, math.ceil(length / count))
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


# ---------------------------------------------------------------------------- one block of scores


def _logits(rules, q, k, q_sums, k_sums, variables, q_index, k_index) -> Array:
    """Scaled, biased, masked scores ``[B, K, G, t, s]`` of ``q [B, K, G, t, E]``, G = N / K."""
    logits = _products(rules, q, k, q_index, k_index) * rules.scale
    if rules.bias_fn is not None:
        logits = _add_bias(logits, rules.bias_fn(variables, q_index.positions, k_index.positions))
    if q_sums is not None:
        high, low = (q_sums[..., i][..., None] - k_sums[..., None, :, i] for i in range(2))
        logits += high + low
    mask = attention_mask(q_index, k_index, rules.window, rules.chunk)
    return jnp.where(mask[:, None, None], logits, -jnp.inf)


def _products(rules, q, k, q_index, k_index) -> Array:
    """``q.k``, of the second half of both for keys ``far_from`` tokens back or further."""
    if rules.far_from is None:
        return _dot("bkgth,bksh->bkgts", q, k)
    near, far = (
        _dot("bkgth,bksh->bkgts", *halves)
        for halves in zip(jnp.split(q, 2, axis=-1), jnp.split(k, 2, axis=-1), strict=True)
    )
    distance = q_index.positions[:, :, None] - k_index.positions[:, None, :]
    return jnp.where((distance >= rules.far_from)[:, None, None], far, near)


def _dot(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _add_bias(logits: Array, bias: Array) -> Array:
    batch, kv_heads, group, *block = logits.shape
    check_bias_shape(bias, (batch, kv_heads * group, *block))
    heads = (1, 1) if bias.shape[1] == 1 else (kv_heads, group)
    return logits + bias.reshape(bias.shape[0], *heads, *bias.shape[2:]).astype(jnp.float32)


def check_bias_shape(bias: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``bias`` broadcasts to ``shape``, ``[B, N, T, S]``, from 4 axes."""
    if bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, shape, strict=True)):
        raise ValueError(
            f"a bias {bias.shape} for logits [B, N, T, S] = {shape}: expected that shape, or 1 on "
            "axes along which it is the same"
        )


def attention_mask(
    q_index: TokenIndex, k_index: TokenIndex, window: int | None = None, chunk: int | None = None
) -> Array:
    """Whether each query ``[B, t]`` sees each key ``[B, s]``: ``[B, t, s]`` bool; B may be 1."""
    q_positions, k_positions = q_index.positions[:, :, None], k_index.positions[:, None, :]
    mask = k_positions <= q_positions
    mask &= k_index.segments[:, None, :] == q_index.segments[:, :, None]
    mask &= (q_index.segments != 0)[:, :, None]
    if window is not None:
        mask &= q_positions - k_positions < window
    if chunk is not None:
        mask &= q_positions // chunk == k_positions // chunk
    return mask


def running_sums(increments: Array) -> Array:
    """Sums of ``increments [B, T, N]`` up to each token, ``[B, T, N, 2]``: a high and a low part.

        high + low = a[0] + .. + a[t];   bias[i, j] = (high_i - high_j) + (low_i - low_j)

    In float32. A single sum of 65,536 numbers would be rounded by more than the bias between
    neighbours. Here blocks of 128 tokens sum apart, and the sums of blocks carry their rounding
    along, so the bias is rounded by no more than a sum of 128 numbers. The gradient goes to the
    high part.
    """
    return _running_sums(increments.astype(jnp.float32))


_SUMMED_TOKENS = 128


@jax.custom_jvp
def _running_sums(increments: Array) -> Array:
    batch, length, heads = increments.shape
    count = max(1, math.ceil(length / _SUMMED_TOKENS))
    padded = jnp.pad(increments, ((0, 0), (0, count * _SUMMED_TOKENS - length), (0, 0)))
    inside = jnp.cumsum(padded.reshape(batch, count, _SUMMED_TOKENS, heads), axis=2)
    totals = inside[:, :-1, -1]
    high, low = jax.lax.associative_scan(_add_pairs, (totals, jnp.zeros_like(totals)), axis=1)
    high, low = (jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :, None] for x in (high, low))
    parts = jnp.stack([jnp.broadcast_to(high, inside.shape), inside + low], axis=-1)
    return parts.reshape(batch, -1, heads, 2)[:, :length]


@_running_sums.defjvp
def _running_sums_jvp(primals, tangents):
    (increments,), (tangent,) = primals, tangents
    summed = jnp.cumsum(tangent, axis=1)
    return _running_sums(increments), jnp.stack([summed, jnp.zeros_like(summed)], axis=-1)


def add_sums(x: Array, y: Array) -> Array:
    """Adds numbers ``[..., 2]`` that are a high and a low part each, as from ``running_sums``."""
    return jnp.stack(_add_pairs((x[..., 0], x[..., 1]), (y[..., 0], y[..., 1])), axis=-1)


def _add_pairs(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Knuth's two-sum of the high parts; its rounding goes to the low part."""
    high = x[0] + y[0]
    part = high - x[0]
    rounding = (x[0] - (high - part)) + (y[0] - part)
    low = x[1] + y[1] + rounding
    total = high + low
    return total, low - (total - high)


# ---------------------------------------------------------------------------- whole rows of scores


def attention_logits(
    q: Array,
    k: Array,
    *,
    positions: Array,
    segments: Array,
    variables: dict[str, Array],
    head_dim: int | None = None,
    bias_fn: BiasFn | None = None,
    contextual_fn: ContextualFn | None = None,
    logit_scale: LogitScale | None = None,
    window: int | None = None,
    chunk: int | None = None,
    far_from: int | None = None,
    sums: Array | None = None,
) -> Array:
    """The logits ``[B, N, T, T]`` of ``attend``, float32, -inf where masked; for analysis.

    ``q [B, T, N, E]`` and ``k [B, T, K, E]`` are of the same tokens, with ``positions`` and
    ``segments`` ``[B, T]`` or ``[1, T]`` and ``sums [B, T, N, 2]``; ``head_dim`` is H of the
    values, E if None. For the rest see ``attend``. Sinks are not among the logits.
    """
    batch, length, num_heads, width = q.shape
    kv_heads = k.shape[2]
    if logit_scale is not None and contextual_fn is None:
        q, logit_scale = scale_queries(q, logit_scale(positions)), None
    if contextual_fn is not None:
        contextual_fn = functools.partial(contextual_bias_by_position, contextual_fn, positions)
    q = q.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    if sums is not None:
        sums = sums.reshape(batch, length, kv_heads, -1, 2).transpose(0, 2, 3, 1, 4)
    index = TokenIndex(positions, segments)
    rules = _Rules((head_dim or width) ** -0.5, bias_fn, window, chunk, far_from)
    keys = (k.transpose(0, 2, 1, 3), sums, variables, index)
    logits = _whole_logits(rules, contextual_fn, logit_scale, q, sums, index, *keys)
    return logits.reshape(batch, num_heads, length, length)


def _whole_logits(
    rules, contextual_fn, logit_scale, q, q_sums, q_index, k, k_sums, variables, k_index
):
    """``_logits`` plus the contextual bias, which is a function of unscaled logits of all keys."""
    logits = _logits(rules, q, k, q_sums, k_sums, variables, q_index, k_index)
    if contextual_fn is not None:
        batch, kv_heads, group, length, width = q.shape
        queries = q.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, width)
        bias = contextual_fn(variables, queries, logits.reshape(batch, -1, *logits.shape[3:]))
        if logit_scale is not None:
            scale = logit_scale(q_index.positions)[:, None, None, :, None]
            is_visible = logits > -jnp.inf  # -inf times a scale of 0 would be NaN
            logits = jnp.where(is_visible, jnp.where(is_visible, logits, 0.0) * scale, -jnp.inf)
        logits = _add_bias(logits, bias)
    return logits


def _attend_whole(rules, contextual_fn, logit_scale, q, q_sums, q_index, keys):
    """Attention with all scores at once; shapes as in ``_logits``, returns ``[B, K, G, t, H]``."""
    k, v, k_sums, sinks, variables, k_index = keys
    logits = _whole_logits(
        *(rules, contextual_fn, logit_scale, q, q_sums, q_index), *(k, k_sums, variables, k_index)
    )
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=_LOWEST)
    if sinks is not None:
        sinks = sinks[..., None, None]
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - highest)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v).astype(q.dtype)


def _attend_rows(attend_whole, q, q_sums, q_index, keys, *, recompute):
    """``attend_whole`` on each block of queries in turn; ``recompute`` also in the gradient."""

    def attend_block(block):
        return attend_whole(*block, keys)

    blocks = (q, q_sums, q_index)
    if not recompute:
        return attend_block(jax.tree.map(lambda x: x[0], blocks))[None]
    return jax.lax.map(jax.checkpoint(attend_block, prevent_cse=False), blocks)


def _sort_by_position(
    k: Array, v: Array, sums: Array | None, index: TokenIndex
) -> tuple[Array, Array, Array | None, TokenIndex]:
    """Sorts keys, values and sums by position within each row; ties keep their order."""
    positions, segments = jnp.broadcast_arrays(*index)
    order = jnp.argsort(positions, axis=1, stable=True)

    def sort(x: Array) -> Array:
        rows = jnp.broadcast_to(order, x.shape[:2])
        return jax.vmap(lambda x, order: x.at[order].get(unique_indices=True))(x, rows)

    sums = None if sums is None else sort(sums)
    return sort(k), sort(v), sums, TokenIndex(sort(positions), sort(segments))


def contextual_bias_by_position(
    contextual_fn: ContextualFn, k_positions: Array, variables: Any, q: Array, logits: Array
) -> Array:
    """Sorts the keys of ``logits [B, N, T, S]`` for ``contextual_fn``, and its bias back."""

    def reorder(x: Array, order: Array) -> Array:
        order = jnp.broadcast_to(order[:, None, None], logits.shape)
        x = jnp.broadcast_to(x, logits.shape)
        return jnp.take_along_axis(x, order, axis=-1, mode="clip")

    order = jnp.argsort(k_positions, axis=-1, stable=True)
    bias = contextual_fn(variables, q, reorder(logits, order))
    return reorder(bias, jnp.argsort(order, axis=-1))


# ---------------------------------------------------------------------------- chunked


def visible_key_blocks(
    q_index: TokenIndex, k_index: TokenIndex, window: int | None = None, chunk: int | None = None
) -> tuple[Array, Array]:
    """For Q blocks of queries ``[Q, B, t]`` and P of keys ``[P, B, s]``, the key blocks to visit.

    Returns int32 ``order [Q, P]``, key blocks with those to visit first, and their ``count [Q]``.
    """
    mask = jnp.any(visible_block_mask(q_index, k_index, window, chunk), axis=-1)
    order = jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(mask, axis=-1, dtype=jnp.int32)


def visible_block_mask(
    q_index: TokenIndex, k_index: TokenIndex, window: int | None = None, chunk: int | None = None
) -> Array:
    """Whether a block of queries has to visit a block of keys: ``[Q, P, B]`` bool.

    A block of keys is skipped if its first (segment, position) comes after the last query, or its
    last segment before the first query's; with a window or chunk also if its last position in the
    first query's segment is too far before. No visible pair is skipped, whatever the stored order.
    """
    q_first, q_first_position, q_last, q_last_position = (
        x[:, None] for x in _first_and_last(q_index)
    )
    k_first, k_first_position, k_last, k_last_position = (x[None] for x in _first_and_last(k_index))
    is_after = (k_first > q_last) | ((k_first == q_last) & (k_first_position > q_last_position))
    is_visited = ~is_after & (k_last >= q_first)
    is_before = k_last == q_first  # then no key is in a later segment
    if window is not None:
        is_visited &= ~(is_before & (q_first_position - k_last_position >= window))
    if chunk is not None:
        is_visited &= ~(is_before & (q_first_position // chunk > k_last_position // chunk))
    return is_visited


def _first_and_last(index: TokenIndex) -> tuple[Array, Array, Array, Array]:
    """First and last (segment, position) of each block and row, ignoring padding: 4 * [Q, B]."""
    positions, segments = index
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(segments == 0, none, segments), axis=-1)
    last = jnp.max(segments, axis=-1)
    at_first = jnp.where(segments == first[..., None], positions, none)
    at_last = jnp.where(segments == last[..., None], positions, -none)
    return first, jnp.min(at_first, axis=-1), last, jnp.max(at_last, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(rules, q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index):
    """Attention block by block: ``q [Q, B, K, G, t, E]``, ``k [P, B, K, s, E]``, ``v [.., H]``.

    ``q_sums`` and ``k_sums`` are ``[Q or P, B, K, G, t or s, 2]`` or None, ``sinks [1, K, G]``
    or None. Returns ``[Q, B, K, G, t, H]``.
    """
    arrays = (q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index)
    return _chunked_forward(rules, *arrays)[0]


def _chunked_forward(rules, q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index):
    variables = {**trained, **constants}

    def attend_query_block(block):
        q_i, q_sums_i, q_index_i, order, count = block

        def visit_key_block(step, carry):
            highest, total, out = carry
            k_j, v_j, k_sums_j, k_index_j = _take((k, v, k_sums, k_index), order[step])
            logits = _logits(rules, q_i, k_j, q_sums_i, k_sums_j, variables, q_index_i, k_index_j)
            new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            new_out = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v_j)
            return new_highest, total, out * shrink[..., None] + new_out

        rows = q_i.shape[:-1]
        first = _LOWEST if sinks is None else sinks[..., None]
        start = (
            jnp.full(rows, first, jnp.float32),
            jnp.full(rows, 0.0 if sinks is None else 1.0, jnp.float32),
            jnp.zeros((*rows, v.shape[-1]), jnp.float32),
        )
        highest, total, out = jax.lax.fori_loop(0, count, visit_key_block, start)
        # A query without keys: lse = +inf makes exp(logits - lse) zero in the backward pass.
        lse = jnp.where(total == 0, jnp.inf, highest + jnp.log(total))
        out = out / jnp.where(total == 0, 1.0, total)[..., None]
        return out.astype(q.dtype), lse

    visited = visible_key_blocks(q_index, k_index, rules.window, rules.chunk)
    out, lse = jax.lax.map(attend_query_block, (q, q_sums, q_index, *visited))
    arrays = (q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index)
    return out, (*arrays, out, lse)


def _chunked_backward(rules, saved, d_out):
    """Gradients with ``p = exp(logits - lse)`` and ``delta = sum(out * d_out)``.

    The gradient of a block's logits is ``p * (d_out v - delta)``, independent of other blocks. Over
    a row it sums to minus the sink's, ``-exp(sink - lse) * delta``, and to 0 without a sink.
    """
    q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index, out, lse = saved
    variables = {**trained, **constants}
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def visit_query_block(carry, block):
        q_i, q_sums_i, d_out_i, lse_i, delta_i, q_index_i, order, count = block

        def visit_key_block(step, carry):
            dq_i, dk, dv, d_k_sums, d_trained = carry
            j = order[step]
            k_j, v_j, k_sums_j, k_index_j = _take((k, v, k_sums, k_index), j)
            logits = _logits(rules, q_i, k_j, q_sums_i, k_sums_j, variables, q_index_i, k_index_j)
            weights = jnp.exp(logits - lse_i[..., None])
            d_weights = _dot("bkgth,bksh->bkgts", d_out_i, v_j)
            d_logits = weights * (d_weights - delta_i[..., None])
            if trained:
                gradient = _bias_gradient(
                    rules.bias_fn, trained, constants, q_index_i, k_index_j, d_logits
                )
                d_trained = jax.tree.map(jnp.add, d_trained, gradient)
            if k_sums is not None:
                d_k_sums = d_k_sums.at[j].add(-jnp.sum(d_logits, axis=-2))
            d_logits = d_logits.astype(q.dtype)
            dv_j = _dot("bkgts,bkgth->bksh", weights.astype(q.dtype), d_out_i)
            dq_ij, dk_j = _product_gradients(rules, d_logits, q_i, k_j, q_index_i, k_index_j)
            return dq_i + dq_ij, dk.at[j].add(dk_j), dv.at[j].add(dv_j), d_k_sums, d_trained

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        dq_i, *carry = jax.lax.fori_loop(0, count, visit_key_block, start)
        return tuple(carry), (dq_i * rules.scale).astype(q.dtype)

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        (k, v, None if k_sums is None else k_sums[..., 0], trained),
    )
    visited = visible_key_blocks(q_index, k_index, rules.window, rules.chunk)
    blocks = (q, q_sums, d_out, lse, delta, q_index, *visited)
    (dk, dv, d_k_sums, d_trained), dq = jax.lax.scan(visit_query_block, zeros, blocks)
    d_trained = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), d_trained, trained)
    dk, dv = (dk * rules.scale).astype(k.dtype), dv.astype(v.dtype)
    d_q_sums, d_sinks = jnp.zeros_like(lse), None
    if sinks is not None:
        d_q_sums = jnp.exp(sinks[None, ..., None] - lse) * delta
        d_sinks = -jnp.sum(d_q_sums, axis=(0, 1, 4))[None]
    of_sums = (None, None)
    if k_sums is not None:
        of_sums = tuple(jnp.stack([x, x], axis=-1) for x in (d_q_sums, d_k_sums))
    return dq, dk, dv, *of_sums, d_sinks, d_trained, None, None, None


def _product_gradients(rules, d_logits, q, k, q_index, k_index) -> tuple[Array, Array]:
    """Gradients of q ``[B, K, G, t, E]`` and k ``[B, K, s, E]`` in ``_products``, float32."""
    if rules.far_from is None:
        dq = _dot("bkgts,bksh->bkgth", d_logits, k)
        return dq, _dot("bkgts,bkgth->bksh", d_logits, q)
    distance = q_index.positions[:, :, None] - k_index.positions[:, None, :]
    is_far = (distance >= rules.far_from)[:, None, None]
    gradients = [
        (_dot("bkgts,bksh->bkgth", d, k_half), _dot("bkgts,bkgth->bksh", d, q_half))
        for d, q_half, k_half in zip(
            (jnp.where(is_far, 0, d_logits), jnp.where(is_far, d_logits, 0)),
            jnp.split(q, 2, axis=-1),
            jnp.split(k, 2, axis=-1),
            strict=True,
        )
    ]
    dq, dk = (jnp.concatenate(parts, axis=-1) for parts in zip(*gradients, strict=True))
    return dq, dk


def _bias_gradient(bias_fn, trained, constants, q_index, k_index, d_logits):
    """Gradient of the trained variables, float32, given the gradient of one block's logits."""

    def bias_of(trained):
        bias = bias_fn({**trained, **constants}, q_index.positions, k_index.positions)
        return bias.astype(jnp.float32)

    bias, bias_vjp = jax.vjp(bias_of, trained)
    batch, kv_heads, group, *block = d_logits.shape
    d_bias = d_logits.reshape(batch, kv_heads * group, *block)
    shared = [axis for axis in range(4) if bias.shape[axis] < d_bias.shape[axis]]
    (gradient,) = bias_vjp(jnp.sum(d_bias, axis=shared, keepdims=True))
    return jax.tree.map(lambda x: x.astype(jnp.float32), gradient)


def _take(tree: Any, index: Array) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), tree
    )


_chunked.defvjp(_chunked_forward, _chunked_backward)
