"""Attention block by block, with a gradient that recomputes the blocks.

A running maximum and sum per query over blocks of keys, so memory grows with T + S instead of
T * S. The backward pass recomputes each block from the log-sum-exp. A window w leaves T * w of the
work, because blocks that it does not touch are not visited.

Reference: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness"; Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory".
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fope_jax.model.masks import visible_key_blocks
from fope_jax.model.scores import LOWEST, block_logits, dot
from fope_jax.typing import Array


def chunked_attention(rules, q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index):
    """Attention block by block: ``q [Q, B, K, G, t, E]``, ``k [P, B, K, s, E]``, ``v [.., H]``.

    ``q_sums`` and ``k_sums`` are ``[Q or P, B, K, G, t or s, 2]`` or None, ``sinks [1, K, G]``
    or None. Returns ``[Q, B, K, G, t, H]``.
    """
    # In a caller's ``jax.shard_map`` the start and the results of a loop must differ along the same
    # axes, and so must an array and its gradient. Adding this 0, which compiles to nothing, gives
    # all of them the axes of any, and its transpose sums gradients over the others.
    arrays = (q, k, v, q_sums, k_sums, sinks, trained)
    leaves = jax.tree.leaves((*arrays, constants, q_index, k_index))
    zero = functools.reduce(jnp.add, (jnp.zeros_like(x, jnp.float32, shape=()) for x in leaves))
    arrays = jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)
    return _chunked_attention(rules, *arrays, constants, q_index, k_index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_attention(rules, *arrays):
    return _forward(rules, *arrays)[0]


def _forward(rules, q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index):
    variables = {**trained, **constants}
    zero = jnp.zeros_like(q, jnp.float32, shape=())

    def attend_query_block(block):
        q_i, q_sums_i, q_index_i, order, count = block

        def visit_key_block(step, carry):
            highest, total, out = carry
            k_j, v_j, k_sums_j, k_index_j = _take((k, v, k_sums, k_index), order[step])
            logits = block_logits(
                rules, q_i, k_j, q_sums_i, k_sums_j, variables, q_index_i, k_index_j
            )
            new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            new_out = dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v_j)
            return new_highest, total, out * shrink[..., None] + new_out

        rows = q_i.shape[:-1]
        first = LOWEST if sinks is None else sinks[..., None]
        start = (
            jnp.full(rows, first, jnp.float32) + zero,
            jnp.full(rows, 0.0 if sinks is None else 1.0, jnp.float32) + zero,
            jnp.zeros((*rows, v.shape[-1]), jnp.float32) + zero,
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


def _backward(rules, saved, d_out):
    """Gradients with ``p = exp(logits - lse)`` and ``delta = sum(out * d_out)``.

    The gradient of a block's logits is ``p * (d_out v - delta)``, independent of other blocks. Over
    a row it sums to minus the sink's, ``-exp(sink - lse) * delta``, and to 0 without a sink.
    """
    q, k, v, q_sums, k_sums, sinks, trained, constants, q_index, k_index, out, lse = saved
    variables = {**trained, **constants}
    zero = jnp.zeros_like(q, jnp.float32, shape=())
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def visit_query_block(carry, block):
        q_i, q_sums_i, d_out_i, lse_i, delta_i, q_index_i, order, count = block

        def visit_key_block(step, carry):
            dq_i, dk, dv, d_k_sums, d_trained = carry
            j = order[step]
            k_j, v_j, k_sums_j, k_index_j = _take((k, v, k_sums, k_index), j)
            logits = block_logits(
                rules, q_i, k_j, q_sums_i, k_sums_j, variables, q_index_i, k_index_j
            )
            weights = jnp.exp(logits - lse_i[..., None])
            d_weights = dot("bkgth,bksh->bkgts", d_out_i, v_j)
            d_logits = weights * (d_weights - delta_i[..., None])
            if trained:
                gradient = _bias_gradient(
                    rules.bias_fn, trained, constants, q_index_i, k_index_j, d_logits
                )
                d_trained = jax.tree.map(jnp.add, d_trained, gradient)
            if k_sums is not None:
                d_k_sums = d_k_sums.at[j].add(-jnp.sum(d_logits, axis=-2))
            d_logits = d_logits.astype(q.dtype)
            dv_j = dot("bkgts,bkgth->bksh", weights.astype(q.dtype), d_out_i)
            dq_ij, dk_j = _product_gradients(rules, d_logits, q_i, k_j, q_index_i, k_index_j)
            return dq_i + dq_ij, dk.at[j].add(dk_j), dv.at[j].add(dv_j), d_k_sums, d_trained

        start = (jnp.zeros(q_i.shape, jnp.float32) + zero, *carry)
        dq_i, *carry = jax.lax.fori_loop(0, count, visit_key_block, start)
        return tuple(carry), (dq_i * rules.scale).astype(q.dtype)

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32) + zero,
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
    """Gradients of q ``[B, K, G, t, E]`` and k ``[B, K, s, E]`` in ``products``, float32."""
    if rules.far_from is None:
        dq = dot("bkgts,bksh->bkgth", d_logits, k)
        return dq, dot("bkgts,bkgth->bksh", d_logits, q)
    distance = q_index.positions[:, :, None] - k_index.positions[:, None, :]
    is_far = (distance >= rules.far_from)[:, None, None]
    gradients = [
        (dot("bkgts,bksh->bkgth", d, k_half), dot("bkgts,bkgth->bksh", d, q_half))
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


_chunked_attention.defvjp(_forward, _backward)
