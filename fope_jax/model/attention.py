"""Causal attention within segments: a reference that holds all scores, and a chunked form.

The chunked form visits one block of scores at a time with a running maximum and sum per query, so
its memory grows with T + S instead of T * S. Its backward pass recomputes each block from the saved
log-sum-exp. A contextual bias needs whole rows of scores, computed for a block of queries at a
time.

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
    """Positions and segments of the queries or of the keys, int32.

    Attributes:
      positions: ``[..., B, T]``, or ``[..., 1, T]`` shared by all rows.
      segments: same shapes, counted from 1; 0 is padding.
    """

    positions: Array
    segments: Array


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
    backend: str = "chunked",
    block: int | None = None,
    derivatives: str = "reverse",
) -> Array:
    """Attention of each query to the keys of its segment at its position or earlier.

    ``softmax(scale q k / sqrt(H) + bias) v`` with the softmax in float32. A query that sees no key,
    such as padding, gives zeros. Tokens may be stored in any order. Stored by segment and position,
    blocks above the diagonal are skipped.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, S, K, H]``, K a divisor of N; query head n reads key-value head ``n // (N / K)``.
      v: ``[B, S, K, H]``.
      q_positions: ``[B, T]`` int32; ``[1, T]``, here and in the next three, is shared by all rows.
      k_positions: ``[B, S]`` int32.
      q_segments: ``[B, T]`` int32, counted from 1; 0 is padding.
      k_segments: ``[B, S]`` int32.
      bias_fn: maps (variables, q_positions ``[B, t]``, k_positions ``[B, s]``) to ``[B, N, t, s]``
        float32; any axis may be 1. It must not close over traced arrays; pass those as variables.
      contextual_fn: maps (variables, q ``[B, t, N, H]``, logits ``[B, N, t, S]``) to a further,
        finite bias ``[B, N, t, S]``; any axis may be 1. The logits are float32 with the bias,
        without ``logit_scale``, -inf where masked, and cover all keys sorted by position.
      logit_scale: maps q_positions ``[B, t]`` to the factor on the logits before any bias.
      bias_variables: floating arrays for ``bias_fn`` and ``contextual_fn``, with gradients.
      bias_constants: further arrays for them, under other names, without gradients.
      backend: "chunked" or "reference" (which holds ``[B, N, T, S]``).
      block: queries and keys in a block of the chunked form; None is ``default_block()``.
      derivatives: "reverse" for ``jax.grad``; "all" adds forward mode and second derivatives, for
        which the chunked form holds a block of queries with all keys.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``q``.

    Raises:
      ValueError: shapes that do not fit, an unknown ``backend`` or ``derivatives``.
    """
    q_index, k_index = TokenIndex(q_positions, q_segments), TokenIndex(k_positions, k_segments)
    trained, constants = bias_variables or {}, jax.lax.stop_gradient(bias_constants or {})
    block = default_block() if block is None else block
    check_derivatives(derivatives)
    _check(q, k, v, q_index, k_index, trained, constants, backend, block)
    batch, length, num_heads, head_dim = q.shape
    if logit_scale is not None and contextual_fn is None:
        q, logit_scale = scale_queries(q, logit_scale(q_positions)), None
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    if backend == "chunked" and derivatives == "reverse" and contextual_fn is None:
        out: Any = _chunked(
            bias_fn,
            _to_blocks(q, block).transpose(0, 1, 3, 4, 2, 5),
            _to_blocks(k, block).transpose(0, 1, 3, 2, 4),
            _to_blocks(v, block).transpose(0, 1, 3, 2, 4),
            trained if bias_fn else {},
            constants if bias_fn else {},
            TokenIndex(*(_to_blocks(x, block) for x in q_index)),
            TokenIndex(*(_to_blocks(x, block) for x in k_index)),
        )
    else:
        if contextual_fn is not None:
            k, v, k_index = _sort_by_position(k, v, k_index)
        rows = length
        if backend == "chunked":
            rows = max(1, min(block, _SCORES_IN_ROWS // k.shape[1]))
        out = _attend_rows(
            functools.partial(_attend_whole, bias_fn, contextual_fn, logit_scale),
            _to_blocks(q, rows).transpose(0, 1, 3, 4, 2, 5),
            k.transpose(0, 2, 1, 3),
            v.transpose(0, 2, 1, 3),
            {**trained, **constants},
            TokenIndex(*(_to_blocks(x, rows) for x in q_index)),
            k_index,
            recompute=backend == "chunked" or contextual_fn is not None,
        )
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads, head_dim)
    return out[:, :length]


def default_block() -> int:
    """Block size of the chunked form on the default platform.

    On CPU, blocks of a power of two compete for cache lines (benchmarks/README.md).
    """
    return 280 if jax.default_backend() == "cpu" else 512


def bias_functions(position: Layer) -> dict[str, Any]:
    """The arguments of ``attend`` that depend on the layer's position embedding."""
    method = position.method
    is_contextual = has_hook(method, "contextual_bias")
    return {
        "bias_fn": functools.partial(bias_of_heads, method) if has_hook(method, "bias") else None,
        "contextual_fn": method.contextual_bias if is_contextual else None,
        "logit_scale": position.logit_scale,
    }


def scale_queries(q: Array, scale: Array) -> Array:
    """``q [B, T, N, H]`` times ``scale [1 or B, 1 or T]``, in the dtype of q."""
    return (q.astype(jnp.float32) * scale[:, :, None, None]).astype(q.dtype)


def _check(q, k, v, q_index, k_index, trained, constants, backend, block) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if block < 1:
        raise ValueError(f"block={block}: expected 1 or more tokens")
    if k.shape != v.shape or q.shape[2] % k.shape[2] != 0 or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, N, H] and twice [B, S, K, H] "
            "with N a multiple of K"
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


def _to_blocks(x: Array, block: int) -> Array:
    """Pads with zeros and splits axis 1: ``[B, T, ...]`` to ``[Q, B, t, ...]``, in equal blocks."""
    length = x.shape[1]
    count = max(1, math.ceil(length / block))
    size = max(1, math.ceil(length / count))
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


# ---------------------------------------------------------------------------- one block of scores


def _logits(bias_fn, q, k, variables, q_index, k_index) -> Array:
    """Scaled, biased, masked scores ``[B, K, G, t, s]`` of ``q [B, K, G, t, H]``, G = N / K."""
    logits = _dot("bkgth,bksh->bkgts", q, k) * q.shape[-1] ** -0.5
    if bias_fn is not None:
        logits = _add_bias(logits, bias_fn(variables, q_index.positions, k_index.positions))
    mask = attention_mask(q_index, k_index)
    return jnp.where(mask[:, None, None], logits, -jnp.inf)


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


def attention_mask(q_index: TokenIndex, k_index: TokenIndex) -> Array:
    """Whether each query ``[B, t]`` sees each key ``[B, s]``: ``[B, t, s]`` bool; B may be 1."""
    is_earlier = k_index.positions[:, None, :] <= q_index.positions[:, :, None]
    is_same = k_index.segments[:, None, :] == q_index.segments[:, :, None]
    return is_earlier & is_same & (q_index.segments != 0)[:, :, None]


# ---------------------------------------------------------------------------- whole rows of scores


def attention_logits(
    q: Array,
    k: Array,
    *,
    positions: Array,
    segments: Array,
    variables: dict[str, Array],
    bias_fn: BiasFn | None = None,
    contextual_fn: ContextualFn | None = None,
    logit_scale: LogitScale | None = None,
) -> Array:
    """The logits that ``attend`` takes the softmax of, all at once; for analysis, not training.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, T, K, H]``.
      positions: ``[B, T]`` or ``[1, T]`` int32.
      segments: ``[B, T]`` or ``[1, T]`` int32; 0 is padding.
      variables: for ``bias_fn`` and ``contextual_fn``.
      bias_fn, contextual_fn, logit_scale: see ``attend``.

    Returns:
      ``[B, N, T, T]`` float32, -inf where masked.
    """
    batch, length, num_heads, head_dim = q.shape
    if logit_scale is not None and contextual_fn is None:
        q, logit_scale = scale_queries(q, logit_scale(positions)), None
    if contextual_fn is not None:
        contextual_fn = functools.partial(contextual_bias_by_position, contextual_fn, positions)
    q = q.reshape(batch, length, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    index = TokenIndex(positions, segments)
    functions = (bias_fn, contextual_fn, logit_scale)
    logits = _whole_logits(*functions, q, k.transpose(0, 2, 1, 3), variables, index, index)
    return logits.reshape(batch, num_heads, length, length)


def _whole_logits(bias_fn, contextual_fn, logit_scale, q, k, variables, q_index, k_index):
    """``_logits`` plus the contextual bias, which is a function of unscaled logits of all keys."""
    logits = _logits(bias_fn, q, k, variables, q_index, k_index)
    if contextual_fn is not None:
        batch, kv_heads, group, length, head_dim = q.shape
        queries = q.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)
        bias = contextual_fn(variables, queries, logits.reshape(batch, -1, *logits.shape[3:]))
        if logit_scale is not None:
            scale = logit_scale(q_index.positions)[:, None, None, :, None]
            is_visible = logits > -jnp.inf  # -inf times a scale of 0 would be NaN
            logits = jnp.where(is_visible, jnp.where(is_visible, logits, 0.0) * scale, -jnp.inf)
        logits = _add_bias(logits, bias)
    return logits


def _attend_whole(bias_fn, contextual_fn, logit_scale, q, k, v, variables, q_index, k_index):
    """Attention with all scores at once; shapes as in ``_logits``, returns ``[B, K, G, t, H]``."""
    functions = (bias_fn, contextual_fn, logit_scale)
    logits = _whole_logits(*functions, q, k, variables, q_index, k_index)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=_LOWEST)
    weights = jnp.exp(logits - jax.lax.stop_gradient(highest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v).astype(q.dtype)


def _attend_rows(attend_whole, q, k, v, variables, q_index, k_index, *, recompute):
    """``attend_whole`` on one block of queries ``[Q, B, ...]`` at a time, with all keys.

    ``recompute`` keeps the scores of one block at a time in the gradient; without it Q is 1.
    """

    def attend_block(block):
        q_i, q_index_i = block
        return attend_whole(q_i, k, v, variables, q_index_i, k_index)

    if not recompute:
        return attend_block(jax.tree.map(lambda x: x[0], (q, q_index)))[None]
    return jax.lax.map(jax.checkpoint(attend_block, prevent_cse=False), (q, q_index))


def _sort_by_position(k: Array, v: Array, index: TokenIndex) -> tuple[Array, Array, TokenIndex]:
    """Sorts keys and values by position within each row; ties keep their order."""
    positions, segments = jnp.broadcast_arrays(*index)
    order = jnp.argsort(positions, axis=1, stable=True)

    def sort(x: Array) -> Array:
        rows = jnp.broadcast_to(order, x.shape[:2])
        return jax.vmap(lambda x, order: x.at[order].get(unique_indices=True))(x, rows)

    return sort(k), sort(v), TokenIndex(sort(positions), sort(segments))


def contextual_bias_by_position(
    contextual_fn: ContextualFn, k_positions: Array, variables: Any, q: Array, logits: Array
) -> Array:
    """Applies ``contextual_fn`` to logits ``[B, N, T, S]`` whose keys are stored in any order.

    ``contextual_fn`` gets the logits sorted by ``k_positions``; its bias returns in stored order.
    """

    def reorder(x: Array, order: Array) -> Array:
        order = jnp.broadcast_to(order[:, None, None], logits.shape)
        x = jnp.broadcast_to(x, logits.shape)
        return jnp.take_along_axis(x, order, axis=-1, mode="clip")

    order = jnp.argsort(k_positions, axis=-1, stable=True)
    bias = contextual_fn(variables, q, reorder(logits, order))
    return reorder(bias, jnp.argsort(order, axis=-1))


# ---------------------------------------------------------------------------- chunked


def visible_key_blocks(q_index: TokenIndex, k_index: TokenIndex) -> tuple[Array, Array]:
    """For each block of queries, the blocks of keys that it has to visit.

    Args:
      q_index: ``[Q, B, t]``, Q blocks of queries.
      k_index: ``[P, B, s]``, P blocks of keys.

    Returns:
      ``order [Q, P]`` int32, all key blocks with those to visit first, and ``count [Q]`` int32, the
      number to visit.
    """
    mask = jnp.any(visible_block_mask(q_index, k_index), axis=-1)
    order = jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(mask, axis=-1, dtype=jnp.int32)


def visible_block_mask(q_index: TokenIndex, k_index: TokenIndex) -> Array:
    """Whether a block of queries has to visit a block of keys: ``[Q, P, B]`` bool.

    A block of keys is skipped if its first (segment, position) comes after the last query, or if
    its last segment precedes the first query's. No visible pair is skipped, whatever the stored
    order.
    """
    q_first, _, q_last, q_last_position = (x[:, None] for x in _first_and_last(q_index))
    k_first, k_first_position, k_last, _ = (x[None] for x in _first_and_last(k_index))
    is_after = (k_first > q_last) | ((k_first == q_last) & (k_first_position > q_last_position))
    return ~is_after & (k_last >= q_first)


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
def _chunked(bias_fn, q, k, v, trained, constants, q_index, k_index):
    """Attention block by block: ``q [Q, B, K, G, t, H]``, ``k, v [P, B, K, s, H]``; like q."""
    return _chunked_forward(bias_fn, q, k, v, trained, constants, q_index, k_index)[0]


def _chunked_forward(bias_fn, q, k, v, trained, constants, q_index, k_index):
    variables = {**trained, **constants}

    def attend_query_block(block):
        q_i, q_index_i, order, count = block

        def visit_key_block(step, carry):
            highest, total, out = carry
            k_j, v_j, k_index_j = _take((k, v, k_index), order[step])
            logits = _logits(bias_fn, q_i, k_j, variables, q_index_i, k_index_j)
            new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            new_out = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v_j)
            return new_highest, total, out * shrink[..., None] + new_out

        rows = q_i.shape[:-1]
        start = (
            jnp.full(rows, _LOWEST, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(q_i.shape, jnp.float32),
        )
        highest, total, out = jax.lax.fori_loop(0, count, visit_key_block, start)
        # A query without keys: lse = +inf makes exp(logits - lse) zero in the backward pass.
        lse = jnp.where(total == 0, jnp.inf, highest + jnp.log(total))
        out = out / jnp.where(total == 0, 1.0, total)[..., None]
        return out.astype(q.dtype), lse

    blocks = (q, q_index, *visible_key_blocks(q_index, k_index))
    out, lse = jax.lax.map(attend_query_block, blocks)
    return out, (q, k, v, trained, constants, q_index, k_index, out, lse)


def _chunked_backward(bias_fn, saved, d_out):
    """Gradients of q, k, v and the trained variables of the bias.

    With ``p = exp(logits - lse)`` and ``delta = sum(out * d_out)``, the gradient of the logits is
    ``p * (d_out v - delta)``, for each block by itself.
    """
    q, k, v, trained, constants, q_index, k_index, out, lse = saved
    variables = {**trained, **constants}
    scale = q.shape[-1] ** -0.5
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def visit_query_block(carry, block):
        q_i, d_out_i, lse_i, delta_i, q_index_i, order, count = block

        def visit_key_block(step, carry):
            dq_i, dk, dv, d_trained = carry
            j = order[step]
            k_j, v_j, k_index_j = _take((k, v, k_index), j)
            logits = _logits(bias_fn, q_i, k_j, variables, q_index_i, k_index_j)
            weights = jnp.exp(logits - lse_i[..., None])
            d_weights = _dot("bkgth,bksh->bkgts", d_out_i, v_j)
            d_logits = weights * (d_weights - delta_i[..., None])
            if trained:
                gradient = _bias_gradient(
                    bias_fn, trained, constants, q_index_i, k_index_j, d_logits
                )
                d_trained = jax.tree.map(jnp.add, d_trained, gradient)
            d_logits = d_logits.astype(q.dtype)
            dv_j = _dot("bkgts,bkgth->bksh", weights.astype(q.dtype), d_out_i)
            dk_j = _dot("bkgts,bkgth->bksh", d_logits, q_i)
            dq_i += _dot("bkgts,bksh->bkgth", d_logits, k_j)
            return dq_i, dk.at[j].add(dk_j), dv.at[j].add(dv_j), d_trained

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        dq_i, *carry = jax.lax.fori_loop(0, count, visit_key_block, start)
        return tuple(carry), (dq_i * scale).astype(q.dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (k, v, trained))
    blocks = (q, d_out, lse, delta, q_index, *visible_key_blocks(q_index, k_index))
    (dk, dv, d_trained), dq = jax.lax.scan(visit_query_block, zeros, blocks)
    d_trained = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), d_trained, trained)
    dk, dv = (dk * scale).astype(k.dtype), dv.astype(v.dtype)
    return dq, dk, dv, d_trained, None, None, None


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
