"""Attention over a mesh: rows and heads are sharded, keys and values gathered along the tokens.

Positions and segments are gathered with the keys, so every method's masks and biases are those of a
single device.

Reference: the all-gather form of context parallelism in Dubey et al. 2024, "The Llama 3 Herd of
Models", Section 3.3.2.
"""

from __future__ import annotations

from typing import Any

import jax

from fope_jax.model.attention import attend, layer_arguments, scale_queries
from fope_jax.model.backends import FUSED_BACKENDS, range_scope, reasons_against_layer
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
        k_positions, k_segments, k_sums = positions, segments, sums
        if mesh is not None and mesh.shape["context"] > 1:
            k, v, k_positions, k_segments, k_sums = jax.tree.map(
                lambda x: jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True),
                (k, v, positions, segments, sums),
            )
        if backend == "pallas":
            return pallas_attention(
                q,
                k,
                v,
                q_index=TokenIndex(positions, segments),
                k_index=TokenIndex(k_positions, k_segments),
                method=method,
                variables={**variables, **jax.lax.stop_gradient(constants)},
                window=position.window,
                chunk=position.chunk,
                far_from=position.far_from,
                sinks=sinks,
                q_sums=sums,
                k_sums=k_sums,
            )
        return attend(
            q,
            k,
            v,
            q_positions=positions,
            k_positions=k_positions,
            q_segments=segments,
            k_segments=k_segments,
            bias_variables=variables,
            bias_constants=constants,
            sinks=sinks,
            q_sums=sums,
            k_sums=k_sums,
            backend=backend,
            **arguments,
            **settings,
        )

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
