"""Attention on TPU with masks and biases computed inside the kernel.

Splash takes no bias, and a bias ``[N, T, S]`` does not fit in memory for long sequences. Here each
block of scores computes its bias from positions on chip, forward and backward. Masks and windows
come from positions and segments, so queries and keys may be different tokens, as in context
parallelism.

Scores are transposed, ``[s, t]``, so that a number per query lies along lanes, as in memory. A
block of queries visits the blocks of keys from the first to the last that it sees; those are few
for a window if tokens are stored by segment and position. The grid is no longer than the longest
such visit.

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

from fope_jax.model.backends import LANES, visited_blocks
from fope_jax.model.masks import TokenIndex, visible_block_mask
from fope_jax.position.base import PositionEmbedding, has_hook
from fope_jax.typing import Array

NAME = "bias_attention"  # prefix of the names of the three kernels
_LOWEST = -1e30  # finite, so that a query without keys gives no NaN
# A bias of many numbers keeps one block of its derivative for each, so its blocks are small.
_BLOCKS, _BLOCKS_OF_MANY, _MANY = (512, 256, 128), (128,), 8


class _Settings(NamedTuple):
    """What is known while tracing.

    ``bias_fn`` maps a head's numbers and positions ``[1, t]``, ``[s, 1]`` to ``[s, t]``. For
    ``window``, ``chunk`` and ``far_from`` see ``attention.attend``.
    """

    block: int
    scale: float
    bias_fn: Callable[[list[Array], Array, Array], Array] | None = None
    num_numbers: int = 0
    window: int | None = None
    chunk: int | None = None
    far_from: int | None = None
    interpret: bool = False


class _Inputs(NamedTuple):
    """What is differentiated; None where the layer has no such thing.

    Attributes:
      q, k: ``[B, N, V, T, E]`` and ``[B, K, V, S, E]``, in V versions (2 with ``far_from``).
      v: ``[B, K, S, H]``.
      numbers: of the bias, ``[N, P]``.
      sinks: ``[N, 1]``.
      q_sums, k_sums: ``[B, N, 2, T]`` and ``[B, N, 2, S]``.
    """

    q: Any
    k: Any
    v: Any
    numbers: Any
    sinks: Any
    q_sums: Any
    k_sums: Any


class _Tokens(NamedTuple):
    """Of queries ``[B, 1, T]`` and keys ``[B, S, 1]``.

    ``q_first`` is the first position that the window and the chunk of a query let it see.
    """

    q_positions: Any
    q_segments: Any
    q_first: Any
    k_positions: Any
    k_segments: Any


class _Gradients(NamedTuple):
    """Of the output ``[B, N, T, H]``, the log-sum-exp and ``sum(out * d_out)`` ``[B, N, 1, T]``."""

    d_out: Any
    lse: Any
    delta: Any


def pallas_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_index: TokenIndex,
    k_index: TokenIndex,
    method: PositionEmbedding,
    variables: dict[str, Array],
    window: int | None = None,
    chunk: int | None = None,
    far_from: int | None = None,
    sinks: Array | None = None,
    q_sums: Array | None = None,
    k_sums: Array | None = None,
    interpret: bool = False,
) -> Array:
    """``attention.attend`` as a TPU kernel; ValueError if T or S is not a multiple of 128.

    Args:
      q: ``[B, T, N, E]``, or ``[B, T, N, 2 E]`` with ``far_from``.
      k: ``[B, S, K, E]``, or ``[B, S, K, 2 E]``.
      v: ``[B, S, K, H]``; the result is ``[B, T, N, H]`` in the dtype of q.
      q_index, k_index: ``[B, T]`` or ``[1, T]``, and ``[B, S]`` or ``[1, S]``.
      method: the layer's; its ``bias``, if any, is computed inside the kernel.
      variables: floating, with gradients.
      window, chunk, far_from, sinks, q_sums, k_sums: as for ``attend``, with gradients.
      interpret: emulates the kernel on any platform, slowly.
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
    numbers = jnp.concatenate(columns).T if columns else None

    def bias_fn(numbers: list[Array], q_positions: Array, k_positions: Array) -> Array:
        values, rest = {}, list(numbers)
        for name, shape in shapes.items():
            size = math.prod(shape)
            values[name], rest = (tuple(rest[:size]) if shape else rest[0]), rest[size:]
        shape = jnp.broadcast_shapes(q_positions.shape, k_positions.shape)
        return jnp.broadcast_to(method.bias(values, q_positions, k_positions), shape)

    count = sum(math.prod(shape) for shape in shapes.values())
    sizes = _BLOCKS if count <= _MANY else _BLOCKS_OF_MANY
    settings = _Settings(
        block=next(n for n in sizes if q.shape[1] % n == 0 and k.shape[1] % n == 0),
        scale=v.shape[-1] ** -0.5,
        bias_fn=bias_fn if has_bias else None,
        num_numbers=count,
        window=window,
        chunk=chunk,
        far_from=far_from,
        interpret=interpret,
    )
    inputs = _Inputs(
        q=_by_version(q, far_from),
        k=_by_version(k, far_from),
        v=v.swapaxes(1, 2),
        numbers=numbers,
        sinks=None if sinks is None else sinks.astype(jnp.float32)[:, None],
        q_sums=None if q_sums is None else q_sums.transpose(0, 2, 3, 1),
        k_sums=None if k_sums is None else k_sums.transpose(0, 2, 3, 1),
    )
    q_index, k_index = (
        TokenIndex(*(jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for x in index))
        for index in (q_index, k_index)
    )
    out: Any = _attention(settings, inputs, q_index, k_index)
    return out.swapaxes(1, 2)


def _by_version(x: Array, far_from: int | None) -> Array:
    """``[B, T, N, V E]`` as ``[B, N, V, T, E]``."""
    versions = 1 if far_from is None else 2
    return x.reshape(*x.shape[:3], versions, -1).transpose(0, 2, 3, 1, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, inputs, q_index, k_index):
    """The output ``[B, N, T, H]`` of ``_Inputs``."""
    return _forward(settings, inputs, q_index, k_index)[0]


def _forward_rule(settings, *arrays):
    out, lse = _forward(settings, *arrays)
    return out, (*arrays, out, lse)


def _backward_rule(settings, saved, d_out):
    inputs, q_index, k_index, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    arguments = (settings, inputs, q_index, k_index, _Gradients(d_out, lse, delta))
    dq, d_numbers, dq_sums = _backward_queries(*arguments)
    dk, dv, dk_sums = _backward_keys(*arguments)
    d_sinks = None
    if inputs.sinks is not None:
        # The sink's value is zero, so its weight's gradient is -delta alone.
        weights = jnp.exp(inputs.sinks[None, :, :, None] - lse)
        d_sinks = -jnp.sum(weights * delta, axis=(0, 2, 3))[:, None]
    gradients = _Inputs(dq, dk, dv, d_numbers, d_sinks, dq_sums, dk_sums)
    return gradients, None, None


_attention.defvjp(_forward_rule, _backward_rule)


# ---------------------------------------------------------------------------- one block


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Contracts one axis of each matrix, in float32."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(
        x, y, dims, precision=jax.lax.Precision(precision), preferred_element_type=jnp.float32
    )


def _bias_of_numbers(settings: _Settings, tokens: _Tokens) -> Callable[[list[Array]], Array] | None:
    """The bias ``[s, t]`` as a function of a head's numbers; None if there is no bias."""
    if (bias_fn := settings.bias_fn) is None:
        return None
    return lambda numbers: bias_fn(numbers, tokens.q_positions[0], tokens.k_positions[0])


def _head_numbers(settings: _Settings, inputs: _Inputs, head: Array) -> list[Array]:
    return [inputs.numbers[head, index] for index in range(settings.num_numbers)]


def _is_far(settings: _Settings, tokens: _Tokens) -> Array:
    return tokens.q_positions[0] - tokens.k_positions[0] >= settings.far_from


def _masked_scores(
    settings: _Settings, inputs: _Inputs, tokens: _Tokens, bias: Array | None
) -> tuple[Array, Array]:
    """Biased scores ``[s, t]`` float32 and their mask."""
    scores = _dot(inputs.k[0, 0, 0], inputs.q[0, 0, 0], 1, 1)
    if settings.far_from is not None:
        far = _dot(inputs.k[0, 0, 1], inputs.q[0, 0, 1], 1, 1)
        scores = jnp.where(_is_far(settings, tokens), far, scores)
    scores *= settings.scale
    if bias is not None:
        scores += bias
    if inputs.q_sums is not None:
        q_high, q_low = inputs.q_sums[0, 0, 0:1], inputs.q_sums[0, 0, 1:2]
        k_sums = inputs.k_sums[0, 0].T
        scores += (q_high - k_sums[:, 0:1]) + (q_low - k_sums[:, 1:2])
    q_segments, k_positions = tokens.q_segments[0], tokens.k_positions[0]
    mask = (k_positions <= tokens.q_positions[0]) & (tokens.k_segments[0] == q_segments)
    mask &= q_segments != 0
    if tokens.q_first is not None:
        mask &= k_positions >= tokens.q_first[0]
    return scores, mask


def _gradient_of_scores(settings, inputs, tokens, gradients, head):
    """Attention weights and the gradient of the scores, ``[s, t]``; the vjp of the bias."""
    bias, bias_vjp = None, None
    if (bias_of_numbers := _bias_of_numbers(settings, tokens)) is not None:
        bias, bias_vjp = jax.vjp(bias_of_numbers, _head_numbers(settings, inputs, head))
    scores, mask = _masked_scores(settings, inputs, tokens, bias)
    weights = jnp.where(mask, jnp.exp(scores - gradients.lse[0, 0]), 0.0)
    d_weights = _dot(inputs.v[0, 0], gradients.d_out[0, 0], 1, 1)
    return weights, weights * (d_weights - gradients.delta[0, 0]), bias_vjp


def _of_versions(settings: _Settings, tokens: _Tokens, d_scores: Array) -> list[Array]:
    """The gradient of each version's scores."""
    if settings.far_from is None:
        return [d_scores]
    is_far = _is_far(settings, tokens)
    return [jnp.where(is_far, 0.0, d_scores), jnp.where(is_far, d_scores, 0.0)]


# ---------------------------------------------------------------------------- kernels
#
# The last axis of each grid runs over the blocks that are summed.


def _forward(settings, inputs, q_index, k_index):
    """The output ``[B, N, T, H]`` and each query's log-sum-exp ``[B, N, 1, T]``."""
    batch, num_heads, _, length, _ = inputs.q.shape
    block, head_dim = settings.block, inputs.v.shape[-1]

    def kernel(first, last, inputs, tokens, out, lse, highest, total, summed):
        row, head, q_block, step = (pl.program_id(axis) for axis in range(4))

        @pl.when(step == 0)
        def _():
            # A sink is a key with value 0 that comes before all others.
            start = _LOWEST if inputs.sinks is None else inputs.sinks[head, 0]
            highest[...] = jnp.full(highest.shape, start, jnp.float32)
            total[...] = jnp.full(total.shape, float(inputs.sinks is not None), jnp.float32)
            summed[...] = jnp.zeros(summed.shape, jnp.float32)

        @pl.when(first[row, q_block] + step <= last[row, q_block])
        def _():
            bias = None
            if (bias_of_numbers := _bias_of_numbers(settings, tokens)) is not None:
                bias = bias_of_numbers(_head_numbers(settings, inputs, head))
            scores, mask = _masked_scores(settings, inputs, tokens, bias)
            before = highest[...]
            block_highest = jnp.max(jnp.where(mask, scores, _LOWEST), axis=0, keepdims=True)
            now = jnp.maximum(before, block_highest)
            weights = jnp.where(mask, jnp.exp(scores - now), 0.0)
            shrink = jnp.exp(before - now)
            highest[...] = now
            total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            values = inputs.v[0, 0]
            summed[...] = summed[...] * shrink + _dot(values, weights.astype(values.dtype), 0, 0)

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            sums = total[...]
            is_empty = sums == 0
            out[0, 0] = (summed[...] / jnp.where(is_empty, 1.0, sums)).T.astype(out.dtype)
            lse[0, 0] = jnp.where(is_empty, -_LOWEST, highest[...] + jnp.log(sums))

    first, last, steps = _ranges(settings, q_index, k_index, by_query=True)
    of_inputs, of_tokens, of_gradients = _specs(settings, inputs, _grid_by_query(inputs))
    return pl.pallas_call(
        kernel,
        name=f"{NAME}_forward",
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_heads, length, head_dim), inputs.q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, length // block, steps),
            in_specs=[of_inputs, of_tokens],
            out_specs=[of_gradients.d_out, of_gradients.lse],
            scratch_shapes=[
                pltpu.VMEM((1, block), jnp.float32),
                pltpu.VMEM((1, block), jnp.float32),
                pltpu.VMEM((head_dim, block), jnp.float32),
            ],
        ),
        cost_estimate=_cost(settings, inputs, of_q=1, of_v=1),
        interpret=settings.interpret,
    )(first, last, inputs, _tokens(settings, q_index, k_index))


def _backward_queries(settings, inputs, q_index, k_index, gradients):
    """Gradients of ``q``, of the numbers ``[N, P]`` of the bias, and of ``q_sums``."""
    batch, num_heads, versions, length, width = inputs.q.shape
    block = settings.block
    has_bias, has_sums = settings.num_numbers > 0, inputs.q_sums is not None
    lanes = math.ceil(settings.num_numbers / LANES) * LANES

    def kernel(first, last, inputs, tokens, gradients, dq, d_numbers, dq_sums, summed):
        row, head, q_block, step = (pl.program_id(axis) for axis in range(4))

        @pl.when(step == 0)
        def _():
            summed[...] = jnp.zeros(summed.shape, jnp.float32)
            if has_sums:
                dq_sums[...] = jnp.zeros(dq_sums.shape, jnp.float32)

        if has_bias:

            @pl.when((q_block == 0) & (step == 0))
            def _():
                d_numbers[...] = jnp.zeros(d_numbers.shape, jnp.float32)

        @pl.when(first[row, q_block] + step <= last[row, q_block])
        def _():
            _, d_scores, bias_vjp = _gradient_of_scores(settings, inputs, tokens, gradients, head)
            if bias_vjp is not None:
                (gradient,) = bias_vjp(d_scores)
                lane = jax.lax.broadcasted_iota(jnp.int32, d_numbers.shape[2:], 1)
                for index, number in enumerate(gradient):
                    d_numbers[0, 0] += jnp.where(lane == index, number, 0.0)
            if has_sums:
                dq_sums[0, 0] += jnp.sum(d_scores, axis=0, keepdims=True)
            for index, part in enumerate(_of_versions(settings, tokens, d_scores)):
                keys = inputs.k[0, 0, index]
                summed[index] += _dot(part.astype(keys.dtype), keys, 0, 0)

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            dq[0, 0] = (summed[...] * settings.scale).astype(dq.dtype)

    first, last, steps = _ranges(settings, q_index, k_index, by_query=True)
    of_inputs, of_tokens, of_gradients = _specs(settings, inputs, _grid_by_query(inputs))
    dq, d_numbers, dq_sums = pl.pallas_call(
        kernel,
        name=f"{NAME}_backward_queries",
        out_shape=(
            jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, lanes), jnp.float32) if has_bias else None,
            jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32) if has_sums else None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, length // block, steps),
            in_specs=[of_inputs, of_tokens, of_gradients],
            out_specs=(
                of_inputs.q,
                pl.BlockSpec((1, 1, 1, lanes), lambda b, n, *_: (b, n, 0, 0)) if has_bias else None,
                of_gradients.delta if has_sums else None,
            ),
            scratch_shapes=[pltpu.VMEM((versions, block, width), jnp.float32)],
        ),
        cost_estimate=_cost(settings, inputs, of_q=2, of_v=1),
        interpret=settings.interpret,
    )(first, last, inputs, _tokens(settings, q_index, k_index), gradients)
    if has_bias:
        d_numbers = jnp.sum(d_numbers[:, :, 0, : settings.num_numbers], axis=0)
    return dq, d_numbers, _of_both_parts(dq_sums)


def _backward_keys(settings, inputs, q_index, k_index, gradients):
    """Gradients of ``k`` and ``v``, summed over a key-value head's queries, and of ``k_sums``."""
    batch, num_kv_heads, versions, num_keys, width = inputs.k.shape
    num_heads, head_dim = inputs.q.shape[1], inputs.v.shape[-1]
    block, group = settings.block, num_heads // num_kv_heads
    has_sums = inputs.k_sums is not None

    def kernel(first, last, inputs, tokens, gradients, dk, dv, dk_sums, summed_k, summed_v):
        row, kv_head, k_block, member, step = (pl.program_id(axis) for axis in range(5))

        @pl.when((member == 0) & (step == 0))
        def _():
            summed_k[...] = jnp.zeros(summed_k.shape, jnp.float32)
            summed_v[...] = jnp.zeros(summed_v.shape, jnp.float32)

        if has_sums:

            @pl.when(step == 0)
            def _():
                dk_sums[...] = jnp.zeros(dk_sums.shape, jnp.float32)

        @pl.when(first[row, k_block] + step <= last[row, k_block])
        def _():
            head, d_outs = kv_head * group + member, gradients.d_out[0, 0]
            weights, d_scores, _ = _gradient_of_scores(settings, inputs, tokens, gradients, head)
            for index, part in enumerate(_of_versions(settings, tokens, d_scores)):
                queries = inputs.q[0, 0, index]
                summed_k[index] += _dot(part.astype(queries.dtype), queries, 1, 0)
            summed_v[...] += _dot(weights.astype(d_outs.dtype), d_outs, 1, 0)
            if has_sums:
                # As a product with ones, so that the sums lie along lanes.
                dk_sums[0, 0] -= _dot(jnp.ones((1, block), jnp.float32), d_scores, 1, 1)

        @pl.when((member == group - 1) & (step == pl.num_programs(4) - 1))
        def _():
            dk[0, 0] = (summed_k[...] * settings.scale).astype(dk.dtype)
            dv[0, 0] = summed_v[...].astype(dv.dtype)

    first, last, steps = _ranges(settings, q_index, k_index, by_query=False)
    row_shape = jax.ShapeDtypeStruct((batch, num_heads, 1, num_keys), jnp.float32)
    row_spec = pl.BlockSpec((1, 1, 1, block), lambda b, m, j, g, *_: (b, m * group + g, 0, j))
    of_inputs, of_tokens, of_gradients = _specs(settings, inputs, _grid_by_key(inputs))
    # Grid: row, key-value head, block of keys, query head of its group, block of queries.
    dk, dv, dk_sums = pl.pallas_call(
        kernel,
        name=f"{NAME}_backward_keys",
        out_shape=(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.k, inputs.v)),
            row_shape if has_sums else None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads, num_keys // block, group, steps),
            in_specs=[of_inputs, of_tokens, of_gradients],
            out_specs=(of_inputs.k, of_inputs.v, row_spec if has_sums else None),
            scratch_shapes=[
                pltpu.VMEM((versions, block, width), jnp.float32),
                pltpu.VMEM((block, head_dim), jnp.float32),
            ],
        ),
        cost_estimate=_cost(settings, inputs, of_q=2, of_v=2),
        interpret=settings.interpret,
    )(first, last, inputs, _tokens(settings, q_index, k_index), gradients)
    return dk, dv, _of_both_parts(dk_sums)


def _of_both_parts(d_sums: Array | None) -> Array | None:
    """``[B, N, 1, T]`` as the gradient of the high and of the low part, ``[B, N, 2, T]``."""
    return None if d_sums is None else jnp.repeat(d_sums, 2, axis=2)


def _grid_by_query(inputs: _Inputs) -> Callable[..., tuple[Any, ...]]:
    """From a step of the grid (row, head, query block, visit) to what ``_specs`` takes."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    return lambda b, n, i, step, first, last: (b, n, n // group, i, _visit(b, i, step, first, last))


def _grid_by_key(inputs: _Inputs) -> Callable[..., tuple[Any, ...]]:
    """The same for row, key-value head, key block, query head of its group, visit."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    return lambda b, m, j, g, step, first, last: (
        *(b, m * group + g, m, _visit(b, j, step, first, last), j),
    )


def _visit(row, block, step, first, last):
    """The block of a visit; a step beyond the last stays there, so that it fetches nothing."""
    return jnp.minimum(first[row, block] + step, jnp.maximum(last[row, block], 0))


def _specs(settings, inputs, places) -> tuple[_Inputs, _Tokens, _Gradients]:
    """BlockSpecs; ``places`` gives row, query head, key-value head, query block and key block."""
    block, head_dim = settings.block, inputs.v.shape[-1]
    versions, width = inputs.q.shape[2], inputs.q.shape[-1]

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *step: index(*places(*step)))

    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    q_row = spec((1, 1, block), lambda b, n, m, i, j: (b, 0, i))
    k_column = spec((1, block, 1), lambda b, n, m, i, j: (b, j, 0))
    row_of_head = spec((1, 1, 1, block), lambda b, n, m, i, j: (b, n, 0, i))
    specs = _Inputs(
        q=spec((1, 1, versions, block, width), lambda b, n, m, i, j: (b, n, 0, i, 0)),
        k=spec((1, 1, versions, block, width), lambda b, n, m, i, j: (b, m, 0, j, 0)),
        v=spec((1, 1, block, head_dim), lambda b, n, m, i, j: (b, m, j, 0)),
        numbers=smem,
        sinks=smem,
        q_sums=spec((1, 1, 2, block), lambda b, n, m, i, j: (b, n, 0, i)),
        k_sums=spec((1, 1, 2, block), lambda b, n, m, i, j: (b, n, 0, j)),
    )
    return (
        _Inputs(*(None if x is None else of_x for x, of_x in zip(inputs, specs, strict=True))),
        _Tokens(q_row, q_row, q_row if _has_range(settings) else None, k_column, k_column),
        _Gradients(
            d_out=spec((1, 1, block, head_dim), lambda b, n, m, i, j: (b, n, i, 0)),
            lse=row_of_head,
            delta=row_of_head,
        ),
    )


def _has_range(settings: _Settings) -> bool:
    return settings.window is not None or settings.chunk is not None


def _tokens(settings: _Settings, q_index: TokenIndex, k_index: TokenIndex) -> _Tokens:
    first, positions = None, q_index.positions
    if settings.window is not None:
        first = positions - min(settings.window, 2**30) + 1
    if settings.chunk is not None:
        start = positions - positions % min(settings.chunk, 2**30)
        first = start if first is None else jnp.maximum(first, start)
    return _Tokens(
        q_positions=positions[:, None],
        q_segments=q_index.segments[:, None],
        q_first=None if first is None else first[:, None],
        k_positions=k_index.positions[..., None],
        k_segments=k_index.segments[..., None],
    )


def _ranges(
    settings: _Settings, q_index: TokenIndex, k_index: TokenIndex, *, by_query: bool
) -> tuple[Array, Array, Array]:
    """First and last block that each visits, ``[B, Q]`` or ``[B, P]``, and the longest such visit.

    The first is greater than the last if there is none.
    """
    blocks = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, settings.block).swapaxes(0, 1), (q_index, k_index)
    )
    mask = visible_block_mask(*blocks, window=settings.window, chunk=settings.chunk)
    mask = mask if by_query else mask.swapaxes(0, 1)
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)[:, None]
    first = jnp.min(jnp.where(mask, index, mask.shape[1]), axis=1)
    last = jnp.max(jnp.where(mask, index, -1), axis=1)
    return first.T, last.T, jnp.maximum(jnp.max(last - first) + 1, 1)


def _cost(settings: _Settings, inputs: _Inputs, *, of_q: int, of_v: int) -> pl.CostEstimate:
    """For rows of one document; products of ``[s, t]`` with E and with H dimensions."""
    batch, num_heads, versions, length, width = inputs.q.shape
    num_keys, head_dim, block = inputs.v.shape[2], inputs.v.shape[3], settings.block
    visits = visited_blocks(num_keys // block, block, settings.window, settings.chunk)
    scores = batch * num_heads * visits * (length / num_keys) * block**2
    arrays = jax.tree.leaves(inputs)
    return pl.CostEstimate(
        flops=round(2 * scores * (of_q * versions * width + of_v * head_dim)),
        transcendentals=round(scores),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
