"""The position-wise layers of the transformer as pure functions of arrays, without biases.

Weights are stored in the parameter dtype and cast to the dtype of the activations where they meet.
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
    """Draws ``std * z`` with z standard normal and truncated to |z| <= 3.

    The spread is not rescaled for the cut (it comes out at 0.987 ``std``), as in the initialiser
    of the paper's code. Drawn in float32 and rounded to ``dtype`` at the end: a draw in bfloat16
    has few values, and tails that are too heavy.
    """
    # Drawn flat: the same bits, and it compiles ten times faster than a draw of three or four axes.
    flat = jax.random.truncated_normal(key, -3.0, 3.0, (math.prod(shape),), jnp.float32)
    return (jnp.float32(std) * flat.reshape(shape)).astype(dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square normalisation, ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis.

    Args:
      x: ``[..., D]``.
      scale: ``[D]``.
      eps: added to the mean square.

    Returns:
      ``[..., D]`` in the dtype of ``x``; everything inside is float32.

    Reference: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

    >>> rms_norm(jnp.array([3.0, 3.0]), jnp.array([1.0, 2.0]), eps=0.0).tolist()
    [1.0, 2.0]
    """
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale32 = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x32 * inverse_rms * scale32).astype(x.dtype)


LINEAR_OUTPUT = "linear_output"  # name of what ``linear`` gives, for rematerialisation to keep
# "reverse" is what training needs, by gradients written out; "all" leaves them to JAX.
DERIVATIVES = ("reverse", "all")


def check_derivatives(derivatives: str) -> None:
    """Raises ValueError unless ``derivatives`` is one of ``DERIVATIVES``."""
    if derivatives not in DERIVATIVES:
        raise ValueError(f"derivatives={derivatives!r}: expected one of {', '.join(DERIVATIVES)}")


def linear(
    x: Array, weight: Array, axes: Axes = (None, None), derivatives: str = "reverse"
) -> Array:
    """The product of ``x [B, T, D]`` and ``weight [D, M]``: ``[B, T, M]`` in the dtype of x.

    With ``derivatives="reverse"`` the gradient is written out, and has no forward mode. That of the
    weight is then accumulated in float32 also where x is bfloat16. JAX's own forms its transpose
    first, which on CPU costs a copy of the activations (benchmarks/README.md).

    ``axes`` are the logical axes of the weight (``sharding.AXIS_RULES``). On a mesh it is gathered
    along "embed" in the dtype of x, for each pass again, and never kept so; the gradient is reduced
    to where the weight lies.
    """
    check_derivatives(derivatives)
    product = _linear if derivatives == "reverse" else _derived_linear
    return checkpoint_name(product(x, weight, axes), LINEAR_OUTPUT)


def _derived_linear(x: Array, weight: Array, axes: Axes) -> Array:
    return jnp.einsum("btd,dm->btm", x, constrain_gathered(weight.astype(x.dtype), axes))


_linear = jax.custom_vjp(_derived_linear, nondiff_argnums=(2,))


def _linear_forward(x, weight, axes):
    return _derived_linear(x, weight, axes), (x, weight)


def _linear_backward(axes, saved, d_out):
    x, weight = saved
    d_x = jnp.einsum("btm,dm->btd", d_out, constrain_gathered(weight.astype(x.dtype), axes))
    return d_x, constrain(weight_gradient(x, d_out).astype(weight.dtype), axes)


_linear.defvjp(_linear_forward, _linear_backward)


def weight_gradient(x: Array, d_out: Array) -> Array:
    """Gradient ``[D, M]``, float32, of the weight of ``linear`` given that of its output."""
    out = jnp.einsum("btd,btm->dm", x, d_out, preferred_element_type=jnp.float32)
    if x.dtype == jnp.bfloat16:
        # On CPU XLA cannot run a product of bfloat16 that is float32 and transposed afterwards, as
        # the gradient of tied embeddings is, once it has made one operation of both.
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
    out = linear(x.reshape(*x.shape[:2], -1), weight, ("heads", "embed"), derivatives)
    return constrain(out, ("batch", "length", None))


def swiglu(x: Array, gate: Array, up: Array, down: Array, derivatives: str = "reverse") -> Array:
    """The gated multilayer perceptron ``(silu(x gate) * (x up)) down``.

    Args:
      x: ``[B, T, D]``.
      gate: ``[D, M]`` with M the width of one branch.
      up: ``[D, M]``.
      down: ``[M, D]``.
      derivatives: see ``linear``.

    Returns:
      ``[B, T, D]``.

    Reference: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """
    gate_axes, activations = ("embed", "mlp"), ("batch", "length", "mlp")
    gated = jax.nn.silu(constrain(linear(x, gate, gate_axes, derivatives), activations))
    hidden = gated * constrain(linear(x, up, gate_axes, derivatives), activations)
    out = linear(hidden, down, ("mlp", "embed"), derivatives)
    return constrain(out, ("batch", "length", None))


def lookup_embedding(embedding: Array, tokens: Array) -> Array:
    """Rows ``[B, T, D]`` of ``embedding [V, D]``; NaN for a token that has none.

    On a mesh each device looks up the rows it holds, and the rows meet in a sum.
    """
    if active_mesh() is None:
        rows = embedding.at[tokens]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    vocab_size, tensor = embedding.shape[0], AXIS_RULES["vocab"]

    def on_device(embedding, tokens):
        rows = jax.lax.all_gather(embedding, AXIS_RULES["embed"], axis=1, tiled=True)
        index = tokens - jax.lax.axis_index(tensor) * rows.shape[0]
        # Rows of other devices are zeros here, those before this device's too.
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
