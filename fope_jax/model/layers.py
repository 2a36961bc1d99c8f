"""The position-wise layers of the transformer as pure functions of arrays.

Weights are stored in the parameter dtype and cast to the dtype of the activations when used.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fope_jax.model.sharding import (
    AXIS_RULES,
    Axes,
    active_mesh,
    constrain,
    constrain_gathered,
    partition_spec,
)
from fope_jax.typing import Array


def truncated_normal(key: Array, shape: tuple[int, ...], std: float, dtype: str) -> Array:
    """Draws ``std * z`` with z standard normal, truncated to |z| <= 3.

    The result has a standard deviation of 0.987 ``std``, as in the paper's code. The draw is in
    float32 and then rounded: a bfloat16 draw has few distinct values and too heavy tails.
    """
    # A flat draw gives the same bits and compiles ten times faster than one of three or four axes.
    flat = jax.random.truncated_normal(key, -3.0, 3.0, (math.prod(shape),), jnp.float32)
    return (jnp.float32(std) * flat.reshape(shape)).astype(dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square normalisation, ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis.

    ``x [..., D]`` and ``scale [D]``; computed in float32, returned in the dtype of ``x``.

    Reference: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

    >>> rms_norm(jnp.array([3.0, 3.0]), jnp.array([1.0, 2.0]), eps=0.0).tolist()
    [1.0, 2.0]
    """
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale32 = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x32 * inverse_rms * scale32).astype(x.dtype)


LINEAR_OUTPUT = "linear_output"  # checkpoint name that the rematerialisation policy saves
# "reverse" uses custom gradients, enough for training; "all" uses JAX's.
DERIVATIVES = ("reverse", "all")


def check_derivatives(derivatives: str) -> None:
    """Raises ValueError unless ``derivatives`` is one of ``DERIVATIVES``."""
    if derivatives not in DERIVATIVES:
        raise ValueError(f"derivatives={derivatives!r}: expected one of {', '.join(DERIVATIVES)}")


def linear(
    x: Array, weight: Array, axes: Axes = (None, None), derivatives: str = "reverse"
) -> Array:
    """The product of ``x [B, T, D]`` and ``weight [D, M]``: ``[B, T, M]`` in the dtype of x.

    ``derivatives="reverse"`` uses a custom gradient without forward mode. It accumulates the
    weight's gradient in float32 even for bfloat16 x, and avoids the transpose of JAX's gradient,
    which on CPU copies the activations (benchmarks/README.md).

    ``axes`` are the logical axes of the weight (``sharding.AXIS_RULES``). On a mesh each pass
    gathers the weight along "embed" in the dtype of x, and the gradient is sharded like the weight.
    """
    check_derivatives(derivatives)
    product = _linear if derivatives == "reverse" else _derived_linear
    return checkpoint_name(product(x, weight, axes), LINEAR_OUTPUT)


def _derived_linear(x: Array, weight: Array, axes: Axes) -> Array:
    return product("btd,dm->btm", x, constrain_gathered(weight.astype(x.dtype), axes))


_linear = jax.custom_vjp(_derived_linear, nondiff_argnums=(2,))


def _linear_forward(x, weight, axes):
    return _derived_linear(x, weight, axes), (x, weight)


def _linear_backward(axes, saved, d_out):
    x, weight = saved
    d_x = product("btm,dm->btd", d_out, constrain_gathered(weight.astype(x.dtype), axes))
    return d_x, constrain(weight_gradient(x, d_out).astype(weight.dtype), axes)


_linear.defvjp(_linear_forward, _linear_backward)


def product(spec: str, x: Array, y: Array) -> Array:
    """``einsum(spec, x, y)`` of two arrays of one dtype, summed in float32, in that dtype.

    >>> product("td,dm->tm", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    if x.dtype != jnp.bfloat16:
        return jnp.einsum(spec, x, y)

    # XLA on CPU uses the matrix units for a bfloat16 product with a float32 result alone: such a
    # product takes a third of the time (benchmarks/README.md). It is rounded once either way.
    def on_cpu(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    def elsewhere(x, y):
        return jnp.einsum(spec, x, y)

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=elsewhere)


def weight_gradient(x: Array, d_out: Array) -> Array:
    """Gradient ``[D, M]``, float32, of the weight of ``linear``, given that of its output."""
    out = jnp.einsum("btd,btm->dm", x, d_out, preferred_element_type=jnp.float32)
    if x.dtype == jnp.bfloat16:
        # XLA on CPU fuses the bfloat16-to-float32 product with a later transpose, as for tied
        # embeddings, into an operation that it cannot run. The barrier prevents that.
        out = jax.lax.platform_dependent(
            out, cpu=jax.lax.optimization_barrier, default=lambda out: out
        )
    return out


def project_to_heads(x: Array, weight: Array, derivatives: str = "reverse") -> Array:
    """Projects ``x [B, T, D]`` with ``weight [D, N, H]`` to ``[B, T, N, H]``."""
    flat = weight.reshape(weight.shape[0], -1)
    out: Any = linear(x, flat, ("embed", "heads"), derivatives)
    out = out.reshape(*x.shape[:2], *weight.shape[1:])
    return constrain(out, ("batch", "length", "heads", None))


def project_from_heads(x: Array, weight: Array, derivatives: str = "reverse") -> Array:
    """Projects ``x [B, T, N, H]`` with ``weight [N, H, D]`` to ``[B, T, D]``."""
    weight = weight.reshape(-1, weight.shape[-1])
    flat = x.reshape(*x.shape[:2], weight.shape[0])
    out = linear(flat, weight, ("heads", "embed"), derivatives)
    return constrain(out, ("batch", "length", None))


def swiglu(x: Array, gate: Array, up: Array, down: Array, derivatives: str = "reverse") -> Array:
    """The gated multilayer perceptron ``(silu(x gate) * (x up)) down``, ``[B, T, D]``.

    ``x [B, T, D]``, ``gate`` and ``up`` ``[D, M]``, ``down [M, D]``.

    Reference: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """
    gate_axes, activations = ("embed", "mlp"), ("batch", "length", "mlp")
    gated = jax.nn.silu(constrain(linear(x, gate, gate_axes, derivatives), activations))
    hidden = gated * constrain(linear(x, up, gate_axes, derivatives), activations)
    out = linear(hidden, down, ("mlp", "embed"), derivatives)
    return constrain(out, ("batch", "length", None))


def lookup_embedding(embedding: Array, tokens: Array) -> Array:
    """Rows ``[B, T, D]`` of ``embedding [V, D]``; NaN for a token outside the vocabulary.

    On a mesh each device looks up the rows that it holds; the results are summed.
    """
    if active_mesh() is None:
        rows = embedding.at[tokens]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    vocab_size, tensor = embedding.shape[0], AXIS_RULES["vocab"]

    def on_device(embedding, tokens):
        rows = jax.lax.all_gather(embedding, AXIS_RULES["embed"], axis=1, tiled=True)
        index = tokens - jax.lax.axis_index(tensor) * rows.shape[0]
        # Other devices' rows give zeros; a negative index would wrap around, so it is moved out of
        # range.
        index = jnp.where(index < 0, rows.shape[0], index)
        local = rows.at[index].get(mode="fill", fill_value=0.0)
        is_known = (tokens >= 0) & (tokens < vocab_size)
        return jnp.where(is_known[..., None], jax.lax.psum(local, tensor), jnp.nan)

    return jax.shard_map(
        on_device,
        in_specs=(partition_spec(("vocab", "embed")), partition_spec(("batch", "length"))),
        out_specs=partition_spec(("batch", "length", None)),
        check_vma=False,
    )(embedding, tokens)
