"""Attention over a mesh: rows and heads are sharded, keys and values gathered along the tokens.

Positions and segments are gathered with the keys, so every method's masks and biases are those of a
single device.

A query sees the keys before it, so that of n equal parts of a row the last has twice the work of
the average. So n devices exchange queries: of 2 n pieces device i computes the attention of i and
2 n - 1 - i, of all devices as much. Layers with a window have equal work without it.

Reference: the all-gather form of context parallelism in Dubey et al. 2024, "The Llama 3 Herd of
Models", Section 3.3.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fope_jax.model.attention import attend, layer_arguments, scale_queries
from fope_jax.model.backends import FUSED_BACKENDS, LANES, range_scope, reasons_against_layer
from fope_jax.model.bias_kernel import pallas_attention
from fope_jax.model.fused import fused_attention
from fope_jax.model.masks import TokenIndex
from fope_jax.model.sharding import AXIS_RULES, active_mesh, batch_partition, partition_spec
from fope_jax.position.base import Layer, has_hook
from fope_jax.typing import Array

CONTEXT = AXIS_RULES["length"]


def sharded_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    positions: Array,
    segments: Array,
    variables: dict[str, Array],
    constants: dict[str, Array],
    position: Layer,
    sums: Array | None,
    sinks: Array | None,
    backend: str,
    **settings: Any,
) -> Array:
    """Self-attention of a layer, ``[B, T, N, H]``, on the active mesh if there is one.

    Splash and cudnn mask by stored order: with them, a row that is not stored by position is NaN,
    and with a window a row of which positions are left out. ValueError if the backend would ignore
    what the layer adds to its logits.

    Args:
      q: ``[B, T, N, E]``.
      k, v: ``[B, T, K, E]`` and ``[B, T, K, H]``.
      positions, segments: ``[B, T]`` or ``[1, T]``.
      variables, constants: of the method, with and without gradients.
      position: the layer's method and logit scale.
      sums: ``[B, T, N, 2]`` of the method's running bias, or None.
      sinks: ``[N]``, a further logit a head, or None.
      backend: the result of ``choose_backend``.
      **settings: for ``attend``.
    """
    method, mesh = position.method, active_mesh()
    shards = 1 if mesh is None else mesh.shape["context"]
    if backend in FUSED_BACKENDS and (reasons := reasons_against_layer(backend, position)):
        raise ValueError(f"attention={backend!r} cannot run: {'; '.join(reasons)}")

    def on_device(q, k, v, positions, segments, variables, constants, sums, sinks):
        arguments = layer_arguments(position)
        if position.logit_scale is not None and not has_hook(method, "contextual_bias"):
            q = scale_queries(q, position.logit_scale(positions))
            arguments["logit_scale"] = None
        if backend in ("splash", "cudnn"):  # chosen only where each device has whole rows
            return fused_attention(
                backend,
                q,
                k,
                v,
                positions=positions,
                segments=segments,
                window=position.window,
                chunk=position.chunk,
                sinks=sinks,
            )
        queries, keys = (q, positions, segments, sums), (k, positions, segments, sums)
        if shards > 1:
            keys, v = jax.tree.map(
                lambda x: jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True), (keys, v)
            )
        is_balanced = shares_work_by_exchange(position, q.shape[1], shards, backend)
        if is_balanced:
            queries = jax.tree.map(lambda x: to_balanced(x, shards), queries)
        q, q_positions, q_segments, q_sums = queries
        k, k_positions, k_segments, k_sums = keys
        if backend == "pallas":
            out = pallas_attention(
                q,
                k,
                v,
                q_index=TokenIndex(q_positions, q_segments),
                k_index=TokenIndex(k_positions, k_segments),
                method=method,
                variables={**variables, **jax.lax.stop_gradient(constants)},
                window=position.window,
                chunk=position.chunk,
                far_from=position.far_from,
                sinks=sinks,
                q_sums=q_sums,
                k_sums=k_sums,
            )
        else:
            out = attend(
                q,
                k,
                v,
                q_positions=q_positions,
                k_positions=k_positions,
                q_segments=q_segments,
                k_segments=k_segments,
                bias_variables=variables,
                bias_constants=constants,
                sinks=sinks,
                q_sums=q_sums,
                k_sums=k_sums,
                backend=backend,
                **arguments,
                **settings,
            )
        return from_balanced(out, shards) if is_balanced else out

    arrays = (q, k, v, positions, segments, variables, constants, sums, sinks)
    on_device = jax.named_scope(range_scope(position.window, position.chunk))(on_device)
    if mesh is None:
        return on_device(*arrays)
    heads = partition_spec(("batch", "length", "heads", None))
    of_variables = [
        {name: partition_spec(method.variable_axes(name)) for name in names}
        for names in (variables, constants)
    ]
    rows = (batch_partition(positions), batch_partition(segments))
    return jax.shard_map(
        on_device,
        in_specs=(heads, heads, heads, *rows, *of_variables, heads, partition_spec(("heads",))),
        out_specs=heads,
        check_vma=False,
    )(*arrays)


# ---------------------------------------------------------------------------- balanced queries


def shares_work_by_exchange(position: Layer, length: int, shards: int, backend: str) -> bool:
    """Whether queries are exchanged; ``length`` is that of the part of a row on one of ``shards``.

    The kernel takes pieces of whole tiles.
    """
    sees_all = not position.hides_keys
    return shards > 1 and sees_all and length % (2 * (LANES if backend == "pallas" else 1)) == 0


def pieces_of(device: int, shards: int) -> tuple[int, int]:
    """The pieces of a row, of ``2 shards``, that a device computes.

    >>> [pieces_of(device, 4) for device in range(4)]
    [(0, 7), (1, 6), (2, 5), (3, 4)]
    """
    return device, 2 * shards - 1 - device


def to_balanced(x: Array, shards: int) -> Array:
    """The device's ``pieces_of`` a row, from its contiguous part ``[B, T / n, ...]``."""
    even, odd = (
        jax.lax.ppermute(piece, CONTEXT, _moves(parity, shards))
        for parity, piece in enumerate(jnp.split(x, 2, axis=1))
    )
    return jnp.concatenate(_swapped_on_odd_devices(even, odd), axis=1)


def from_balanced(x: Array, shards: int) -> Array:
    """The inverse of ``to_balanced``."""
    pieces = _swapped_on_odd_devices(*jnp.split(x, 2, axis=1))
    back = (
        jax.lax.ppermute(piece, CONTEXT, [(to, home) for home, to in _moves(parity, shards)])
        for parity, piece in enumerate(pieces)
    )
    return jnp.concatenate([*back], axis=1)


def _moves(parity: int, shards: int) -> list[tuple[int, int]]:
    """From and to which device the even or the odd pieces move: one of each a device."""
    pieces = range(parity, 2 * shards, 2)
    return [(piece // 2, min(piece, 2 * shards - 1 - piece)) for piece in pieces]


def _swapped_on_odd_devices(even: Array, odd: Array) -> tuple[Array, Array]:
    """The first of a device's two pieces is even on an even device, and odd on an odd one."""
    is_even = jax.lax.axis_index(CONTEXT) % 2 == 0
    return jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)
