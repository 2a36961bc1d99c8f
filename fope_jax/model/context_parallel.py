"""Attention over a mesh: rows and heads apart, keys and values gathered along the tokens.

Each device has a part of every row's queries and, for as long as a layer lasts, all keys and values
of its rows and heads. Positions and segments lie with the tokens and are gathered with the keys, so
masks and biases are those of one device, whatever the method.

Reference: the all-gather form of context parallelism in Dubey et al. 2024, "The Llama 3 Herd of
Models", Section 3.3.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fope_jax.model.attention import TokenIndex, attend, bias_functions, scale_queries
from fope_jax.model.backends import FUSED_BACKENDS
from fope_jax.model.bias_kernel import pallas_attention
from fope_jax.model.fused import cudnn_attention, is_stored_in_order, splash_attention
from fope_jax.model.sharding import AXIS_RULES, Axes, active_mesh, partition_spec
from fope_jax.position.base import Layer, has_hook
from fope_jax.typing import Array

CONTEXT = AXIS_RULES["length"]


_FUSED = {"splash": splash_attention, "cudnn": cudnn_attention}


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
    backend: str,
    **settings: Any,
) -> Array:
    """Self-attention of a layer, on the active mesh if there is one.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, T, K, H]``.
      v: ``[B, T, K, H]``.
      positions: ``[B, T]`` or ``[1, T]``.
      segments: ``[B, T]`` or ``[1, T]``.
      variables: of the layer's method, with gradients; a bias sees the heads of its device only.
      constants: of the layer's method, without.
      position: the layer's method and the scale of its logits.
      backend: one of ``backends.BACKENDS`` that ``choose_backend`` chose.
      **settings: for ``attend``.

    Returns:
      ``[B, T, N, H]``; NaN in a row whose tokens are stored in another order than that of their
      positions, where the backend goes by the order.

    Raises:
      ValueError: a backend that would leave out the bias.
    """
    method, axes_of = position.method, position.method.variable_axes
    biased, contextual = has_hook(method, "bias"), has_hook(method, "contextual_bias")
    if (biased and backend in _FUSED) or (contextual and backend in FUSED_BACKENDS):
        raise ValueError(f"attention={backend!r} cannot add this method's bias to the logits")

    functions = bias_functions(position)
    if not contextual:  # then no backend needs the logits without their factor
        functions["logit_scale"] = None

    def local(q, k, v, positions, segments, variables, constants):
        if position.logit_scale is not None and not contextual:
            q = scale_queries(q, position.logit_scale(positions))
        if backend in _FUSED:  # chosen only where a device has all tokens of its rows
            out = _FUSED[backend](q, k, v, segments)
            in_order = is_stored_in_order(positions, segments)
            return jnp.where(in_order[:, None, None, None], out, jnp.nan)
        k_positions, k_segments = positions, segments
        if context > 1:
            k, v, k_positions, k_segments = (
                jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True)
                for x in (k, v, positions, segments)
            )
        if backend == "pallas":
            of_bias = {**variables, **jax.lax.stop_gradient(constants)} if biased else {}
            return pallas_attention(
                q,
                k,
                v,
                q_index=TokenIndex(positions, segments),
                k_index=TokenIndex(k_positions, k_segments),
                bias=method.bias if biased else None,
                variables=of_bias,
                heads_axes={name: _axis_of_heads(axes_of(name)) for name in of_bias},
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
            backend=backend,
            **functions,
            **settings,
        )

    mesh = active_mesh()
    context = 1 if mesh is None else mesh.shape["context"]
    if mesh is None:
        return local(q, k, v, positions, segments, variables, constants)
    heads = partition_spec(("batch", "length", "heads", None))
    return jax.shard_map(
        local,
        in_specs=(
            heads,
            heads,
            heads,
            _rows(positions),
            _rows(segments),
            {name: partition_spec(axes_of(name)) for name in variables},
            {name: partition_spec(axes_of(name)) for name in constants},
        ),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, positions, segments, variables, constants)


def _rows(x: Array) -> Any:
    return partition_spec(("batch" if x.shape[0] > 1 else None, "length"))


def _axis_of_heads(axes: Axes) -> int | None:
    return axes.index("heads") if "heads" in axes else None
