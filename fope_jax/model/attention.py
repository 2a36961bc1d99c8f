"""Causal attention within segments: a reference that holds all scores, and a chunked form.

The chunked form (``chunked.py``) needs memory that grows with T + S instead of T * S. A contextual
bias needs whole rows of scores, computed for a block of queries at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fope_jax.model.chunked import chunked_attention
from fope_jax.model.layers import check_derivatives
from fope_jax.model.masks import TokenIndex
from fope_jax.model.scores import LOWEST, BiasFn, ScoreRules, add_bias, block_logits, dot
from fope_jax.position.base import Layer, bias_of_heads, has_hook
from fope_jax.position.checks import check_tokens
from fope_jax.typing import Array

ContextualFn = Callable[[Any, Array, Array], Array]
LogitScale = Callable[[Array], Array]

BACKENDS = ("chunked", "reference")

# Most scores of one head in a block of whole rows: 16 MB of float32.
_SCORES_IN_ROWS = 2**22


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
      q_sums, k_sums: ``[B, T, N, 2]`` and ``[B, S, N, 2]`` float32 from ``running_sums.py``; their
        difference, query minus key, is a further bias.
      backend: "chunked" or "reference" (which holds ``[B, N, T, S]``).
      block: queries and keys in a block of the chunked form; None is ``default_block()``.
      derivatives: "reverse" for ``jax.grad``; "all" adds forward mode and second derivatives, for
        which the chunked form holds a block of queries with all keys.

    Raises ValueError for shapes that do not fit, numbers of tokens below 1, an unknown ``backend``
    or ``derivatives``.

    Reference: for sinks Xiao et al. 2023, "Efficient Streaming Language Models with Attention
    Sinks", Section 3, learned as in OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card".
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
        out: Any = chunked_attention(
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
        rows = max(1, length)
        if backend == "chunked":
            rows = max(1, min(block, _SCORES_IN_ROWS // max(1, k.shape[1])))
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
    padded = out.shape[0] * out.shape[-2]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, padded, num_heads, v.shape[-1])
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


def _rules(v, bias_fn, window, chunk, far_from) -> ScoreRules:
    for name, value in (("window", window), ("chunk", chunk), ("far_from", far_from)):
        if value is not None:
            check_tokens(name, value, "tokens that a query looks back")
    return ScoreRules(v.shape[-1] ** -0.5, bias_fn, window, chunk, far_from)


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
    start: Array | int = 0,
) -> Array:
    """The logits ``[B, N, t, T]`` of ``attend``, float32, -inf where masked; for analysis.

    ``q [B, t, N, E]`` are t of the tokens of ``k [B, T, K, E]``, from the one of index ``start``
    on, with ``positions`` and ``segments`` ``[B, T]`` or ``[1, T]`` and ``sums [B, T, N, 2]``;
    ``head_dim`` is H of the values, E if None. For the rest see ``attend``. Sinks are not among
    the logits.
    """
    batch, length, num_heads, width = q.shape
    kv_heads = k.shape[2]
    index = TokenIndex(positions, segments)
    q_index = TokenIndex(*(jax.lax.dynamic_slice_in_dim(x, start, length, 1) for x in index))
    if logit_scale is not None and contextual_fn is None:
        q, logit_scale = scale_queries(q, logit_scale(q_index.positions)), None
    if contextual_fn is not None:
        contextual_fn = functools.partial(contextual_bias_by_position, contextual_fn, positions)
    q = q.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    q_sums = k_sums = None
    if sums is not None:
        k_sums = sums.reshape(*k.shape[:2], kv_heads, -1, 2).transpose(0, 2, 3, 1, 4)
        q_sums = jax.lax.dynamic_slice_in_dim(k_sums, start, length, 3)
    rules = ScoreRules((head_dim or width) ** -0.5, bias_fn, window, chunk, far_from)
    keys = (k.transpose(0, 2, 1, 3), k_sums, variables, index)
    logits = _whole_logits(rules, contextual_fn, logit_scale, q, q_sums, q_index, *keys)
    return logits.reshape(batch, num_heads, length, k.shape[1])


def _whole_logits(
    rules, contextual_fn, logit_scale, q, q_sums, q_index, k, k_sums, variables, k_index
):
    """``block_logits`` plus the contextual bias, a function of the unscaled logits of all keys."""
    logits = block_logits(rules, q, k, q_sums, k_sums, variables, q_index, k_index)
    if contextual_fn is not None:
        batch, kv_heads, group, length, width = q.shape
        queries = q.transpose(0, 3, 1, 2, 4)
        queries = queries.reshape(batch, length, kv_heads * group, width)
        scores = logits.reshape(batch, kv_heads * group, *logits.shape[3:])
        bias = contextual_fn(variables, queries, scores)
        if logit_scale is not None:
            scale = logit_scale(q_index.positions)[:, None, None, :, None]
            is_visible = logits > -jnp.inf  # -inf times a scale of 0 would be NaN
            logits = jnp.where(is_visible, jnp.where(is_visible, logits, 0.0) * scale, -jnp.inf)
        logits = add_bias(logits, bias)
    return logits


def _attend_whole(rules, contextual_fn, logit_scale, q, q_sums, q_index, keys):
    """Attention with all scores at once, as of ``block_logits``; returns ``[B, K, G, t, H]``."""
    k, v, k_sums, sinks, variables, k_index = keys
    logits = _whole_logits(
        *(rules, contextual_fn, logit_scale, q, q_sums, q_index), *(k, k_sums, variables, k_index)
    )
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST)
    if sinks is not None:
        sinks = sinks[..., None, None]
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - highest)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v).astype(q.dtype)


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
