"""Attention on TPU with the bias computed inside the kernel, a block of scores at a time.

Splash takes no bias, and a bias that lies in memory as ``[N, T, S]`` is what long sequences cannot
have. Here each block of the score matrix computes the bias of its positions
(``PositionEmbedding.head_bias``) in on-chip memory, forward and backward, gradients of what is
learned included. Masks come from positions and segments too, so queries and keys need not be the
same tokens: the kernel serves devices that share the tokens of a row as well.

Scores are kept transposed, ``[s, t]``: what belongs to a query is then a row, which lies in lanes
as it does in memory. Blocks that no query sees are neither fetched nor computed, where tokens are
stored in the order of segment and position.

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
from fope_jax.typing import Array

LANES = 128
NAME = "bias_attention"  # what the names of the three kernels begin with
_LOWEST = -1e30  # finite, so that a query without keys gives no NaN
# A bias of many numbers keeps one block of its derivative for each.
_BLOCKS, _BLOCKS_OF_MANY, _MANY = (512, 256, 128), (128,), 8

HeadBias = Callable[[dict[str, Any], Array, Array], Array]


class _Kernel(NamedTuple):
    """What is known when the kernel is built.

    Attributes:
      head_bias: of the method, or None.
      shapes: name and shape of each variable, without its axis of heads.
      block: queries and keys in a block.
      interpret: whether the kernel's program runs on any platform, slowly.
    """

    head_bias: HeadBias | None
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    block: int
    interpret: bool

    def bias(self, numbers: list[Array], q_positions: Array, k_positions: Array) -> Array:
        """The bias ``[s, t]`` from the numbers of one head, spread over axes it is the same on."""
        values, start = {}, 0
        for name, shape in self.shapes:
            size = math.prod(shape)
            own = numbers[start : start + size]
            values[name], start = (tuple(own) if shape else own[0]), start + size
        assert self.head_bias
        shape = jnp.broadcast_shapes(q_positions.shape, k_positions.shape)
        return jnp.broadcast_to(self.head_bias(values, q_positions, k_positions), shape)

    @property
    def count(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)


def pallas_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_index: TokenIndex,
    k_index: TokenIndex,
    head_bias: HeadBias | None,
    variables: dict[str, Array],
    heads_axes: dict[str, int | None],
    interpret: bool = False,
) -> Array:
    """``attention.attend`` as a TPU kernel.

    Args:
      q: ``[B, T, N, H]``, T a multiple of 128.
      k: ``[B, S, K, H]``, S a multiple of 128.
      v: ``[B, S, K, H]``.
      q_index: ``[B, T]`` or ``[1, T]`` int32 each.
      k_index: ``[B, S]`` or ``[1, S]`` int32 each.
      head_bias: see ``PositionEmbedding.head_bias``; None adds nothing.
      variables: of the bias, floating, with gradients.
      heads_axes: for each, its axis of query heads; None where it has none.
      interpret: runs the kernel's program on any platform, slowly.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``q``; zeros for a query without keys.

    Raises:
      ValueError: T or S is no multiple of 128.
    """
    for name, length in (("T", q.shape[1]), ("S", k.shape[1])):
        if length % LANES:
            raise ValueError(f"{name} = {length} tokens: the kernel takes multiples of {LANES}")
    num_heads = q.shape[2]
    names = sorted(variables) if head_bias else []
    columns, shapes = [], []
    for name in names:
        x, axis = variables[name].astype(jnp.float32), heads_axes[name]
        if axis is not None:
            x = jnp.moveaxis(x, axis, -1)
            shapes.append((name, x.shape[:-1]))
        else:
            shapes.append((name, x.shape))
            x = x[..., None]
        columns.append(jnp.broadcast_to(x, (*x.shape[:-1], num_heads)).reshape(-1, num_heads))
    numbers = jnp.concatenate(columns).T if columns else jnp.zeros((num_heads, 1), jnp.float32)
    count = sum(column.shape[0] for column in columns)
    sizes = _BLOCKS if count <= _MANY else _BLOCKS_OF_MANY
    block = next(n for n in sizes if q.shape[1] % n == 0 and k.shape[1] % n == 0)
    kernel = _Kernel(head_bias, tuple(shapes), block, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out: Any = _attention(kernel, q, k, v, numbers, q_index, k_index)
    return out.swapaxes(1, 2)


def computed_fraction(grid: tuple[int, ...]) -> float:
    """How many of the blocks in a kernel's grid are computed where a row is one document.

    >>> computed_fraction((1, 1, 4, 4))
    0.625
    """
    blocks = max(grid[2], grid[-1])
    return (blocks + 1) / (2 * blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel, q, k, v, numbers, q_index, k_index):
    """Attention of ``q [B, N, T, H]`` to ``k, v [B, K, S, H]``; ``numbers [N, P]`` of the bias."""
    return _forward(kernel, q, k, v, numbers, q_index, k_index)[0]


def _forward_rule(kernel, q, k, v, numbers, q_index, k_index):
    out, lse = _forward(kernel, q, k, v, numbers, q_index, k_index)
    return out, (q, k, v, numbers, q_index, k_index, out, lse)


def _backward_rule(kernel, saved, d_out):
    q, k, v, numbers, q_index, k_index, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    arguments = (kernel, q, k, v, numbers, q_index, k_index, d_out, lse, delta)
    dq, d_numbers = _backward_of_queries(*arguments)
    dk, dv = _backward_of_keys(*arguments)
    d_numbers = jnp.sum(d_numbers[:, :, 0, : numbers.shape[1]], axis=0)
    return dq, dk, dv, d_numbers, None, None


_attention.defvjp(_forward_rule, _backward_rule)


# ---------------------------------------------------------------------------- one block


def _precision(dtype: Any) -> Any:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dims, precision=_precision(x.dtype), preferred_element_type=jnp.float32
    )


def _scores(q: Array, k: Array, bias: Array | None, places: Any):
    """Scaled and biased scores ``[s, t]`` float32 of a block, and which of them are seen.

    ``places``: positions of queries ``[1, t]`` and keys ``[s, 1]``, then their segments.
    """
    q_positions, k_positions, q_segments, k_segments = places
    scores = _dot(k, q, (1, 1)) * (1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores += bias
    seen = (k_positions <= q_positions) & (k_segments == q_segments) & (q_segments != 0)
    return scores, seen


def _numbers_of(kernel: _Kernel, numbers: Any, head: Array) -> list[Array]:
    return [numbers[head, index] for index in range(kernel.count)]


def _bias(kernel: _Kernel, numbers: Any, head: Array, places: Any) -> Array | None:
    if kernel.head_bias is None:
        return None
    return kernel.bias(_numbers_of(kernel, numbers, head), places[0], places[1])


# ---------------------------------------------------------------------------- forward


def _forward_program(kernel, first, last, numbers, q, k, v, *refs):
    places_refs, (out, lse, highest, total, summed) = refs[:4], refs[4:]
    row, head, block, step = (pl.program_id(axis) for axis in range(4))

    @pl.when(step == 0)
    def _():
        highest[...] = jnp.full(highest.shape, _LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    @pl.when((step >= first[row, block]) & (step <= last[row, block]))
    def _():
        places = [ref[0] for ref in places_refs]
        bias = _bias(kernel, numbers, head, places)
        scores, seen = _scores(q[0, 0], k[0, 0], bias, places)
        before = highest[...]
        largest = jnp.max(jnp.where(seen, scores, _LOWEST), axis=0, keepdims=True)
        now = jnp.maximum(before, largest)
        weights = jnp.where(seen, jnp.exp(scores - now), 0.0)
        shrink = jnp.exp(before - now)
        highest[...] = now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        values = v[0, 0]
        part = _dot(values, weights.astype(values.dtype), (0, 0))
        summed[...] = summed[...] * shrink + part

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        sums = total[...]
        nothing = sums == 0
        out[0, 0] = (summed[...] / jnp.where(nothing, 1.0, sums)).T.astype(out.dtype)
        lse[0, 0] = jnp.where(nothing, -_LOWEST, highest[...] + jnp.log(sums))


def _forward(kernel, q, k, v, numbers, q_index, k_index):
    """The output ``[B, N, T, H]`` and each query's log-sum-exp ``[B, N, 1, T]``."""
    call = _Call(kernel, q, k, v, numbers, q_index, k_index, by_query=True)
    batch, num_heads, length, head_dim = q.shape
    lse = jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32)
    return call(
        _forward_program,
        "forward",
        [(q, call.queries), (lse, call.rows)],
        [(1, kernel.block), (1, kernel.block), (head_dim, kernel.block)],
    )


# ---------------------------------------------------------------------------- backward


def _gradient_of_scores(kernel, numbers, head, q, k, v, places, d_out, lse, delta):
    """The weights and the gradient of the scores, ``[s, t]``, and the pull of the bias."""
    if kernel.head_bias is None:
        bias, pull = None, None
    else:
        own = _numbers_of(kernel, numbers, head)
        bias, pull = jax.vjp(lambda own: kernel.bias(own, places[0], places[1]), own)
    scores, seen = _scores(q, k, bias, places)
    weights = jnp.where(seen, jnp.exp(scores - lse), 0.0)
    d_weights = _dot(v, d_out, (1, 1))
    return weights, weights * (d_weights - delta), pull


def _queries_program(kernel, first, last, numbers, q, k, v, *refs):
    places_refs, (d_out, lse, delta, dq, d_numbers, summed) = refs[:4], refs[4:]
    row, head, block, step = (pl.program_id(axis) for axis in range(4))

    @pl.when((block == 0) & (step == 0))
    def _():
        d_numbers[...] = jnp.zeros(d_numbers.shape, jnp.float32)

    @pl.when(step == 0)
    def _():
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    @pl.when((step >= first[row, block]) & (step <= last[row, block]))
    def _():
        places, keys = [ref[0] for ref in places_refs], k[0, 0]
        _, d_scores, pull = _gradient_of_scores(
            kernel,
            numbers,
            head,
            q[0, 0],
            keys,
            v[0, 0],
            places,
            d_out[0, 0],
            lse[0, 0],
            delta[0, 0],
        )
        if pull is not None:
            (gradient,) = pull(d_scores)
            lane = jax.lax.broadcasted_iota(jnp.int32, d_numbers.shape[2:], 1)
            for index, number in enumerate(gradient):
                d_numbers[0, 0] += jnp.where(lane == index, number, 0.0)
        summed[...] += _dot(d_scores.astype(keys.dtype), keys, (0, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = (summed[...] * (1 / math.sqrt(q.shape[-1]))).astype(dq.dtype)


def _backward_of_queries(kernel, q, k, v, numbers, q_index, k_index, *gradients):
    """Gradients of ``q`` and, ``[B, N, 1, P]``, of the numbers of the bias."""
    call = _Call(kernel, q, k, v, numbers, q_index, k_index, by_query=True)
    lanes = math.ceil(numbers.shape[1] / LANES) * LANES
    of_head = pl.BlockSpec((1, 1, 1, lanes), lambda row, head, *_: (row, head, 0, 0))
    d_numbers = jax.ShapeDtypeStruct((*q.shape[:2], 1, lanes), jnp.float32)
    return call(
        _queries_program,
        "backward_queries",
        [(q, call.queries), (d_numbers, of_head)],
        [(kernel.block, q.shape[-1])],
        gradients,
    )


def _keys_program(kernel, first, last, numbers, q, k, v, *refs):
    places_refs, (d_out, lse, delta, dk, dv, summed_k, summed_v) = refs[:4], refs[4:]
    row, kv_head, block, member, step = (pl.program_id(axis) for axis in range(5))

    @pl.when((member == 0) & (step == 0))
    def _():
        summed_k[...] = jnp.zeros(summed_k.shape, jnp.float32)
        summed_v[...] = jnp.zeros(summed_v.shape, jnp.float32)

    @pl.when((step >= first[row, block]) & (step <= last[row, block]))
    def _():
        places, queries, d_outs = [ref[0] for ref in places_refs], q[0, 0], d_out[0, 0]
        head = kv_head * pl.num_programs(3) + member
        weights, d_scores, _ = _gradient_of_scores(
            kernel, numbers, head, queries, k[0, 0], v[0, 0], places, d_outs, lse[0, 0], delta[0, 0]
        )
        summed_k[...] += _dot(d_scores.astype(queries.dtype), queries, (1, 0))
        summed_v[...] += _dot(weights.astype(d_outs.dtype), d_outs, (1, 0))

    @pl.when((member == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _():
        dk[0, 0] = (summed_k[...] * (1 / math.sqrt(q.shape[-1]))).astype(dk.dtype)
        dv[0, 0] = summed_v[...].astype(dv.dtype)


def _backward_of_keys(kernel, q, k, v, numbers, q_index, k_index, *gradients):
    """Gradients of ``k`` and ``v``, summed over the query heads that read each of theirs."""
    call = _Call(kernel, q, k, v, numbers, q_index, k_index, by_query=False)
    return call(
        _keys_program,
        "backward_keys",
        [(k, call.keys), (v, call.keys)],
        [(kernel.block, q.shape[-1])] * 2,
        gradients,
    )


# ---------------------------------------------------------------------------- grid


class _Call:
    """The grid of one kernel, and which block of each array a step of it reads.

    ``by_query``: grid ``[B, N, Q, P]``; each block of queries meets its blocks of keys. Otherwise
    ``[B, K, P, N / K, Q]``; each block of keys meets its blocks of queries, of all heads that read
    it. Blocks are prefetched, so a step outside the range of its row names the nearest block in it,
    which then is there already.
    """

    def __init__(self, kernel, q, k, v, numbers, q_index, k_index, *, by_query: bool):
        batch, num_heads, length, head_dim = q.shape
        num_kv_heads, group = k.shape[1], num_heads // k.shape[1]
        size = kernel.block
        num_queries, num_keys = length // size, k.shape[2] // size

        def clipped(row, block, step, first, last):
            return jnp.clip(step, first[row, block], jnp.maximum(last[row, block], 0))

        def query(*index):
            *grid, first, last = index
            if by_query:
                row, head, block, _ = grid
                return row, head, block
            row, kv_head, block, member, step = grid
            return row, kv_head * group + member, clipped(row, block, step, first, last)

        def key(*index):
            *grid, first, last = index
            if by_query:
                row, head, block, step = grid
                return row, head // group, clipped(row, block, step, first, last)
            row, kv_head, block, *_ = grid
            return row, kv_head, block

        self.kernel = kernel
        if by_query:
            self.grid = (batch, num_heads, num_queries, num_keys)
        else:
            self.grid = (batch, num_kv_heads, num_keys, group, num_queries)
        self.queries, self.keys = (
            pl.BlockSpec((1, 1, size, head_dim), _index(side, "row", "head", "block", 0))
            for side in (query, key)
        )
        self.rows = pl.BlockSpec((1, 1, 1, size), _index(query, "row", "head", 0, "block"))
        places, specs = [], []
        for name in TokenIndex._fields:
            of_queries, of_keys = getattr(q_index, name), getattr(k_index, name)
            places += [of_queries[:, None], of_keys[:, :, None]]
            rows = ["row" if x.shape[0] > 1 else 0 for x in (of_queries, of_keys)]
            specs += [
                pl.BlockSpec((1, 1, size), _index(query, rows[0], 0, "block")),
                pl.BlockSpec((1, size, 1), _index(key, rows[1], "block", 0)),
            ]
        self.specs = [pl.BlockSpec(memory_space=pltpu.SMEM), self.queries, self.keys, self.keys]
        self.specs += specs
        self.arrays = [numbers, q, k, v, *places]
        self.ranges = _ranges(batch, size, q_index, k_index, by_query)

    def __call__(self, program, name, outputs, scratch, gradients=()):
        """Runs ``program``; ``outputs`` are pairs of a like array and a spec."""
        more = [self.queries, self.rows, self.rows] if gradients else []
        return pl.pallas_call(
            functools.partial(program, self.kernel),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=self.grid,
                in_specs=self.specs + more,
                out_specs=[spec for _, spec in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            interpret=self.kernel.interpret,
            name=f"{NAME}_{name}",
        )(*self.ranges, *self.arrays, *gradients)


def _index(where: Callable, *axes: str | int) -> Callable:
    """An index map with the row, the head and the block that ``where`` gives on the named axes."""

    def index(*grid):
        found: Any = dict(zip(("row", "head", "block"), where(*grid), strict=True))
        return tuple(found.get(axis, 0) for axis in axes)

    return index


def _ranges(batch, size, q_index, k_index, by_query) -> list[Array]:
    """First and last block that each block meets, ``[B, Q]`` or ``[B, P]`` int32 each.

    Where it meets none, the first lies behind the last.
    """

    def blocks(places: TokenIndex) -> TokenIndex:
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size).swapaxes(0, 1), places)

    listed = visible_block_mask(blocks(q_index), blocks(k_index))
    listed = listed if by_query else listed.swapaxes(0, 1)
    index = jnp.arange(listed.shape[1], dtype=jnp.int32)[:, None]
    first = jnp.min(jnp.where(listed, index, listed.shape[1]), axis=1)
    last = jnp.max(jnp.where(listed, index, -1), axis=1)
    return [jnp.broadcast_to(x.T, (batch, x.shape[0])) for x in (first, last)]
