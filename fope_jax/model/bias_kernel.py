"""Attention on TPU with the bias computed inside the kernel.

Splash takes no bias, and a bias stored as ``[N, T, S]`` does not fit for long sequences. Here each
block of scores computes its bias from positions in on-chip memory, forward and backward, with
gradients of learned variables. Masks also come from positions and segments, so queries and keys may
be different tokens, as with context parallelism.

Scores are transposed, ``[s, t]``, so that a number per query lies along lanes, as in memory. Blocks
that no query sees are neither fetched nor computed if tokens are stored by segment and position.

Reference: Dao et al. 2022, "FlashAttention", Algorithms 1 and 4 (appendix B).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fope_jax.model.attention import TokenIndex, visible_block_mask
from fope_jax.model.backends import LANES
from fope_jax.position.base import PositionEmbedding, has_hook
from fope_jax.typing import Array

NAME = "bias_attention"  # prefix of the names of the three kernels
_LOWEST = -1e30  # finite, so that a query without keys gives no NaN
# A bias of many numbers keeps one block of its derivative for each, so its blocks are small.
_BLOCKS, _BLOCKS_OF_MANY, _MANY = (512, 256, 128), (128,), 8


class _Settings(NamedTuple):
    """Static settings of the kernel.

    ``bias_fn`` maps ``num_numbers`` numbers of one head, query positions ``[1, t]`` and key
    positions ``[s, 1]`` to a bias ``[s, t]``; None is no bias.
    """

    bias_fn: Callable[[list[Array], Array, Array], Array] | None
    num_numbers: int
    block: int
    interpret: bool


def pallas_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_index: TokenIndex,
    k_index: TokenIndex,
    method: PositionEmbedding,
    variables: dict[str, Array],
    interpret: bool = False,
) -> Array:
    """``attention.attend`` as a TPU kernel.

    Args:
      q: ``[B, T, N, H]``, T a multiple of 128.
      k: ``[B, S, K, H]``, S a multiple of 128.
      v: ``[B, S, K, H]``.
      q_index: positions and segments of the queries, ``[B, T]`` or ``[1, T]`` int32.
      k_index: of the keys, ``[B, S]`` or ``[1, S]`` int32.
      method: the layer's; its ``bias``, if any, is computed inside the kernel.
      variables: floating, with gradients.
      interpret: emulates the kernel on any platform, slowly.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``q``; zeros for a query without keys.

    Raises:
      ValueError: T or S is not a multiple of 128.
    """
    for name, length in (("T", q.shape[1]), ("S", k.shape[1])):
        if length % LANES:
            raise ValueError(f"{name} = {length} tokens: the kernel takes multiples of {LANES}")
    num_heads, has_bias = q.shape[2], has_hook(method, "bias")
    # The kernel reads scalars: one row of numbers per head.
    shapes, columns = {}, []
    for name in sorted(variables) if has_bias else []:
        x, axes = variables[name].astype(jnp.float32), method.variable_axes(name)
        x = jnp.moveaxis(x, axes.index("heads"), -1) if "heads" in axes else x[..., None]
        shapes[name] = x.shape[:-1]
        columns.append(jnp.broadcast_to(x, (*x.shape[:-1], num_heads)).reshape(-1, num_heads))
    numbers = jnp.concatenate(columns).T if columns else jnp.zeros((num_heads, 1), jnp.float32)

    def bias_fn(numbers: list[Array], q_positions: Array, k_positions: Array) -> Array:
        values, rest = {}, list(numbers)
        for name, shape in shapes.items():
            size = math.prod(shape)
            values[name], rest = (tuple(rest[:size]) if shape else rest[0]), rest[size:]
        shape = jnp.broadcast_shapes(q_positions.shape, k_positions.shape)
        return jnp.broadcast_to(method.bias(values, q_positions, k_positions), shape)

    count = sum(math.prod(shape) for shape in shapes.values())
    sizes = _BLOCKS if count <= _MANY else _BLOCKS_OF_MANY
    block = next(n for n in sizes if q.shape[1] % n == 0 and k.shape[1] % n == 0)
    settings = _Settings(bias_fn if has_bias else None, count, block, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q_index, k_index = (
        TokenIndex(*(jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for x in index))
        for index in (q_index, k_index)
    )
    out: Any = _attention(settings, q, k, v, numbers, q_index, k_index)
    return out.swapaxes(1, 2)


def computed_fraction(grid: tuple[int, ...]) -> float:
    """The fraction of the grid's blocks that are computed in rows of one document.

    >>> computed_fraction((1, 1, 4, 4))
    0.625
    """
    blocks = max(grid[2], grid[-1])
    return (blocks + 1) / (2 * blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, v, numbers, q_index, k_index):
    """``q [B, N, T, H]``, ``k, v [B, K, S, H]``, ``numbers [N, P]`` of the bias."""
    return _forward(settings, q, k, v, numbers, q_index, k_index)[0]


def _forward_rule(settings, *arrays):
    out, lse = _forward(settings, *arrays)
    return out, (*arrays, out, lse)


def _backward_rule(settings, saved, d_out):
    *arrays, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    arguments = [*arrays, d_out, lse, delta]
    dq, d_numbers = _backward_queries(settings, *arguments)
    dk, dv = _backward_keys(settings, *arguments)
    return dq, dk, dv, d_numbers, None, None


_attention.defvjp(_forward_rule, _backward_rule)


# ---------------------------------------------------------------------------- one block


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Contracts one axis of each matrix, in float32."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(
        x, y, dims, precision=jax.lax.Precision(precision), preferred_element_type=jnp.float32
    )


def _head_numbers(settings: _Settings, numbers: Any, head: Array) -> list[Array]:
    return [numbers[head, index] for index in range(settings.num_numbers)]


def _masked_scores(
    q: Array, k: Array, bias: Array | None, tokens: list[Array]
) -> tuple[Array, Array]:
    """Scaled, biased scores ``[s, t]`` float32 and their mask.

    ``tokens``: positions of queries ``[1, t]`` and of keys ``[s, 1]``, then segments likewise.
    """
    q_positions, k_positions, q_segments, k_segments = tokens
    scores = _dot(k, q, 1, 1) * (1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores += bias
    mask = (k_positions <= q_positions) & (k_segments == q_segments) & (q_segments != 0)
    return scores, mask


def _gradient_of_scores(settings, numbers, q, k, v, tokens, d_out, lse, delta):
    """Attention weights and the gradient of the scores, ``[s, t]``; the vjp of the bias."""
    bias, bias_vjp = None, None
    if settings.bias_fn is not None:
        bias, bias_vjp = jax.vjp(lambda numbers: settings.bias_fn(numbers, *tokens[:2]), numbers)
    scores, mask = _masked_scores(q, k, bias, tokens)
    weights = jnp.where(mask, jnp.exp(scores - lse), 0.0)
    return weights, weights * (_dot(v, d_out, 1, 1) - delta), bias_vjp


# ---------------------------------------------------------------------------- kernels
#
# The last axis of each grid runs over the blocks that are summed.


def _forward(settings, q, k, v, numbers, q_index, k_index):
    """The output ``[B, N, T, H]`` and each query's log-sum-exp ``[B, N, 1, T]``."""
    batch, num_heads, length, head_dim = q.shape
    block, group = settings.block, num_heads // k.shape[1]

    def kernel(first, last, numbers, q, k, v, *refs):
        token_refs, (out, lse, highest, total, summed) = refs[:4], refs[4:]
        row, head, q_block, step = (pl.program_id(axis) for axis in range(4))

        @pl.when(step == 0)
        def _():
            highest[...] = jnp.full(highest.shape, _LOWEST, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            summed[...] = jnp.zeros(summed.shape, jnp.float32)

        @pl.when((step >= first[row, q_block]) & (step <= last[row, q_block]))
        def _():
            tokens, bias = [ref[0] for ref in token_refs], None
            if settings.bias_fn is not None:
                bias = settings.bias_fn(_head_numbers(settings, numbers, head), *tokens[:2])
            scores, mask = _masked_scores(q[0, 0], k[0, 0], bias, tokens)
            before = highest[...]
            block_highest = jnp.max(jnp.where(mask, scores, _LOWEST), axis=0, keepdims=True)
            now = jnp.maximum(before, block_highest)
            weights = jnp.where(mask, jnp.exp(scores - now), 0.0)
            shrink = jnp.exp(before - now)
            highest[...] = now
            total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            values = v[0, 0]
            summed[...] = summed[...] * shrink + _dot(values, weights.astype(values.dtype), 0, 0)

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            sums = total[...]
            is_empty = sums == 0
            out[0, 0] = (summed[...] / jnp.where(is_empty, 1.0, sums)).T.astype(out.dtype)
            lse[0, 0] = jnp.where(is_empty, -_LOWEST, highest[...] + jnp.log(sums))

    return pl.pallas_call(
        kernel,
        name=f"{NAME}_forward",
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, length // block, k.shape[2] // block),
            in_specs=_specs_by_query(block, group, head_dim),
            out_specs=[
                pl.BlockSpec((1, 1, block, head_dim), lambda b, n, i, j, *_: (b, n, i, 0)),
                pl.BlockSpec((1, 1, 1, block), lambda b, n, i, j, *_: (b, n, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, block), jnp.float32),
                pltpu.VMEM((1, block), jnp.float32),
                pltpu.VMEM((head_dim, block), jnp.float32),
            ],
        ),
        interpret=settings.interpret,
    )(
        *_ranges(block, q_index, k_index, by_query=True),
        numbers,
        q,
        k,
        v,
        *_token_arrays(q_index, k_index),
    )


def _backward_queries(settings, q, k, v, numbers, q_index, k_index, d_out, lse, delta):
    """Gradients of ``q`` and of the numbers ``[N, P]`` of the bias."""
    batch, num_heads, length, head_dim = q.shape
    block, group = settings.block, num_heads // k.shape[1]
    lanes = math.ceil(numbers.shape[1] / LANES) * LANES

    def kernel(first, last, numbers, q, k, v, *refs):
        token_refs, (d_out, lse, delta, dq, d_numbers, summed) = refs[:4], refs[4:]
        row, head, q_block, step = (pl.program_id(axis) for axis in range(4))

        @pl.when((q_block == 0) & (step == 0))
        def _():
            d_numbers[...] = jnp.zeros(d_numbers.shape, jnp.float32)

        @pl.when(step == 0)
        def _():
            summed[...] = jnp.zeros(summed.shape, jnp.float32)

        @pl.when((step >= first[row, q_block]) & (step <= last[row, q_block]))
        def _():
            keys, head_numbers = k[0, 0], _head_numbers(settings, numbers, head)
            blocks = (q[0, 0], keys, v[0, 0], [ref[0] for ref in token_refs])
            _, d_scores, bias_vjp = _gradient_of_scores(
                settings, head_numbers, *blocks, d_out[0, 0], lse[0, 0], delta[0, 0]
            )
            if bias_vjp is not None:
                (gradient,) = bias_vjp(d_scores)
                lane = jax.lax.broadcasted_iota(jnp.int32, d_numbers.shape[2:], 1)
                for index, number in enumerate(gradient):
                    d_numbers[0, 0] += jnp.where(lane == index, number, 0.0)
            summed[...] += _dot(d_scores.astype(keys.dtype), keys, 0, 0)

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            dq[0, 0] = (summed[...] * (1 / math.sqrt(head_dim))).astype(dq.dtype)

    query_spec = pl.BlockSpec((1, 1, block, head_dim), lambda b, n, i, j, *_: (b, n, i, 0))
    row_spec = pl.BlockSpec((1, 1, 1, block), lambda b, n, i, j, *_: (b, n, 0, i))
    dq, d_numbers = pl.pallas_call(
        kernel,
        name=f"{NAME}_backward_queries",
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, lanes), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, length // block, k.shape[2] // block),
            in_specs=[*_specs_by_query(block, group, head_dim), query_spec, row_spec, row_spec],
            out_specs=[
                query_spec,
                pl.BlockSpec((1, 1, 1, lanes), lambda b, n, i, j, *_: (b, n, 0, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((block, head_dim), jnp.float32)],
        ),
        interpret=settings.interpret,
    )(
        *_ranges(block, q_index, k_index, by_query=True),
        *(numbers, q, k, v),
        *_token_arrays(q_index, k_index),
        *(d_out, lse, delta),
    )
    return dq, jnp.sum(d_numbers[:, :, 0, : numbers.shape[1]], axis=0)


def _backward_keys(settings, q, k, v, numbers, q_index, k_index, d_out, lse, delta):
    """Gradients of ``k`` and ``v``, summed over the query heads of each key-value head."""
    batch, num_kv_heads, num_keys, head_dim = k.shape
    block, group = settings.block, q.shape[1] // num_kv_heads

    def kernel(first, last, numbers, q, k, v, *refs):
        token_refs, (d_out, lse, delta, dk, dv, summed_k, summed_v) = refs[:4], refs[4:]
        row, kv_head, k_block, member, step = (pl.program_id(axis) for axis in range(5))

        @pl.when((member == 0) & (step == 0))
        def _():
            summed_k[...] = jnp.zeros(summed_k.shape, jnp.float32)
            summed_v[...] = jnp.zeros(summed_v.shape, jnp.float32)

        @pl.when((step >= first[row, k_block]) & (step <= last[row, k_block]))
        def _():
            queries, d_outs = q[0, 0], d_out[0, 0]
            head_numbers = _head_numbers(settings, numbers, kv_head * group + member)
            blocks = (queries, k[0, 0], v[0, 0], [ref[0] for ref in token_refs])
            weights, d_scores, _ = _gradient_of_scores(
                settings, head_numbers, *blocks, d_outs, lse[0, 0], delta[0, 0]
            )
            summed_k[...] += _dot(d_scores.astype(queries.dtype), queries, 1, 0)
            summed_v[...] += _dot(weights.astype(d_outs.dtype), d_outs, 1, 0)

        @pl.when((member == group - 1) & (step == pl.num_programs(4) - 1))
        def _():
            dk[0, 0] = (summed_k[...] * (1 / math.sqrt(head_dim))).astype(dk.dtype)
            dv[0, 0] = summed_v[...].astype(dv.dtype)

    # Grid: row, key-value head, block of keys, query head of its group, block of queries.
    query_spec = pl.BlockSpec(
        (1, 1, block, head_dim), lambda b, n, i, g, j, *r: (b, n * group + g, _clip(b, i, j, *r), 0)
    )
    row_spec = pl.BlockSpec(
        (1, 1, 1, block), lambda b, n, i, g, j, *r: (b, n * group + g, 0, _clip(b, i, j, *r))
    )
    key_spec = pl.BlockSpec((1, 1, block, head_dim), lambda b, n, i, g, j, *_: (b, n, i, 0))
    token_specs = [
        pl.BlockSpec((1, 1, block), lambda b, n, i, g, j, *r: (b, 0, _clip(b, i, j, *r))),
        pl.BlockSpec((1, block, 1), lambda b, n, i, g, j, *_: (b, i, 0)),
    ] * 2
    numbers_spec = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        kernel,
        name=f"{NAME}_backward_keys",
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads, num_keys // block, group, q.shape[2] // block),
            in_specs=[numbers_spec, query_spec, key_spec, key_spec]
            + [*token_specs, query_spec, row_spec, row_spec],
            out_specs=[key_spec, key_spec],
            scratch_shapes=[pltpu.VMEM((block, head_dim), jnp.float32)] * 2,
        ),
        interpret=settings.interpret,
    )(
        *_ranges(block, q_index, k_index, by_query=False),
        *(numbers, q, k, v),
        *_token_arrays(q_index, k_index),
        *(d_out, lse, delta),
    )


def _specs_by_query(block: int, group: int, head_dim: int) -> list[pl.BlockSpec]:
    """BlockSpecs of numbers, q, k, v and tokens; grid: row, head, query block, key block."""
    key_spec = pl.BlockSpec(
        (1, 1, block, head_dim), lambda b, n, i, j, *r: (b, n // group, _clip(b, i, j, *r), 0)
    )
    token_specs = [
        pl.BlockSpec((1, 1, block), lambda b, n, i, j, *_: (b, 0, i)),
        pl.BlockSpec((1, block, 1), lambda b, n, i, j, *r: (b, _clip(b, i, j, *r), 0)),
    ] * 2
    return [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, block, head_dim), lambda b, n, i, j, *_: (b, n, i, 0)),
        key_spec,
        key_spec,
        *token_specs,
    ]


def _clip(row, block, step, first, last):
    """Clips ``step`` to the blocks that ``block`` visits, so that skipped steps fetch nothing."""
    return jnp.clip(step, first[row, block], jnp.maximum(last[row, block], 0))


def _token_arrays(q_index: TokenIndex, k_index: TokenIndex) -> list[Array]:
    """Positions of queries ``[B, 1, T]`` and keys ``[B, S, 1]``, then their segments."""
    (q_positions, q_segments), (k_positions, k_segments) = q_index, k_index
    return [
        q_positions[:, None],
        k_positions[..., None],
        q_segments[:, None],
        k_segments[..., None],
    ]


def _ranges(block: int, q_index: TokenIndex, k_index: TokenIndex, *, by_query: bool) -> list[Array]:
    """First and last block that each visits, ``[B, Q]`` or ``[B, P]``; first > last if none."""
    blocks = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, block).swapaxes(0, 1), (q_index, k_index)
    )
    mask = visible_block_mask(*blocks)
    mask = mask if by_query else mask.swapaxes(0, 1)
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)[:, None]
    first = jnp.min(jnp.where(mask, index, mask.shape[1]), axis=1)
    last = jnp.max(jnp.where(mask, index, -1), axis=1)
    return [first.T, last.T]
