"""Next-token cross-entropy as sums, so that batches of any size add up exactly.

The logits ``[B, T, V]`` are the largest tensor of a small model: with ``time_chunk`` they exist
for a part of the time axis only, in the forward and in the backward pass.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fope_jax.model.layers import check_derivatives, weight_gradient
from fope_jax.model.sharding import AXIS_RULES, Axes, active_mesh, partition_spec
from fope_jax.typing import Array


class LossSums(NamedTuple):
    """Float32 scalars; ratios are taken where they are reported.

    Attributes:
      nats: weighted sum of ``-log p(target)``.
      tokens: sum of the weights.
      bytes: weighted sum of the UTF-8 bytes that the targets stand for; 0 without ``token_bytes``.
      correct: weighted count of targets that are the most probable token; none where the logits
        are not finite.
    """

    nats: Array
    tokens: Array
    bytes: Array
    correct: Array


def loss_sums(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    weights: Array,
    *,
    token_bytes: Array | None = None,
    time_chunk: int | None = None,
    derivatives: str = "reverse",
) -> LossSums:
    """Sums of the loss over a batch.

    Args:
      hidden: ``[B, T, D]``, after the final norm.
      unembedding: ``[D, V]``.
      targets: ``[B, T]`` int32.
      weights: ``[B, T]`` float32, 0 where the target is not scored.
      token_bytes: ``[V]`` int32, UTF-8 bytes of each token.
      time_chunk: tokens of each row whose logits exist at once; None means all.
      derivatives: "reverse", what training needs: the gradient is taken in the forward pass. "all":
        forward mode and second derivatives work as well.

    Returns:
      The sums. A target outside the vocabulary makes ``nats`` and ``bytes`` NaN where its weight is
      not 0; where it is 0 the target may be anything, such as the -100 of ignored labels.
    """
    weights = weights.astype(jnp.float32)
    check_derivatives(derivatives)
    if derivatives == "reverse":
        sums: Any = _weighted_sums(time_chunk, hidden, unembedding, targets, weights)
    else:
        sums = _sums(*token_nats(hidden, unembedding, targets, time_chunk=time_chunk), weights)
    nats, correct = sums
    lengths = jnp.zeros_like(weights)
    if token_bytes is not None:
        # Plain indexing would take the bytes of another token for a target that is none.
        lengths = jnp.asarray(token_bytes, jnp.float32).at[targets]
        lengths = lengths.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        lengths = _zero_where_unscored(lengths, weights)
    return LossSums(nats, jnp.sum(weights), jnp.sum(lengths * weights), correct)


def token_nats(
    hidden: Array, unembedding: Array, targets: Array, *, time_chunk: int | None = None
) -> tuple[Array, Array]:
    """Cross-entropy of each target and whether the model would have chosen it.

    Args:
      hidden: ``[B, T, D]``, after the final norm.
      unembedding: ``[D, V]``.
      targets: ``[B, T]`` int32.
      time_chunk: tokens of each row whose logits exist at once; None means all.

    Returns:
      nats: ``[B, T]`` float32, ``-log p(target)``; NaN for a target outside the vocabulary.
      correct: ``[B, T]`` bool, whether the target is the argmax of the logits; False where the nats
        are not finite.
    """

    def local(hidden, unembedding, targets):
        @jax.checkpoint
        def body(whole, hidden, targets):
            _, _, nats, correct = _terms(hidden, whole, targets)
            return whole, (nats, correct)

        return _over_time(body, _whole(unembedding, hidden), (hidden, targets), time_chunk)[1]

    return _on_mesh(local, (HIDDEN, UNEMBEDDING, ROWS), (ROWS, ROWS))(hidden, unembedding, targets)


def compute_logits(hidden: Array, unembedding: Array) -> Array:
    """Logits ``[B, T, V]``, float32, multiplied in the dtype of ``hidden``."""
    return jnp.einsum(
        "btd,dv->btv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _terms(hidden, unembedding, targets):
    """Logits ``[B, T, V]`` and, ``[B, T]``, their log-sum-exp, the nats and the hits.

    On a mesh the logits are this device's part of the vocabulary, the rest is of all of it.
    """
    logits = compute_logits(hidden, unembedding)
    on_mesh = active_mesh() is not None
    if on_mesh:
        largest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), TENSOR)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        lse = largest + jnp.log(jax.lax.psum(total, TENSOR))
        size = jax.lax.psum(logits.shape[-1], TENSOR)
        at_target = jnp.where(_is_target(logits, targets), logits, 0.0)
        chosen = jax.lax.psum(jnp.sum(at_target, axis=-1, keepdims=True), TENSOR)
    else:
        lse = jax.nn.logsumexp(logits, axis=-1)
        size = logits.shape[-1]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    known = (targets >= 0) & (targets < size)
    nats = jnp.where(known, lse - chosen[..., 0], jnp.nan)
    # The first of the largest, as argmax has it, in one pass that fuses with the sum above.
    earlier = _vocabulary(logits, targets) < targets[..., None]
    beaten = jnp.any((logits > chosen) | ((logits == chosen) & earlier), axis=-1)
    if on_mesh:
        beaten = jax.lax.psum(beaten.astype(jnp.int32), TENSOR) > 0
    # No comparison with NaN is true: a target whose logits are NaN is beaten by none.
    return logits, lse, nats, jnp.isfinite(nats) & ~beaten


def _is_target(logits: Array, targets: Array) -> Array:
    return _vocabulary(logits, targets) == targets[..., None]


def _vocabulary(logits: Array, targets: Array) -> Array:
    """The token id of each logit, ``[1, 1, V]``."""
    ids = jax.lax.broadcasted_iota(targets.dtype, (1, 1, logits.shape[-1]), 2)
    if active_mesh() is None:
        return ids
    return ids + jax.lax.axis_index(TENSOR) * logits.shape[-1]


# -------------------------------------------------------------------------- on a mesh

TENSOR = AXIS_RULES["vocab"]
EMBED = AXIS_RULES["embed"]
COPIES = tuple(axis for axis in AXIS_RULES["batch"] if axis not in EMBED)
HIDDEN: Axes = ("batch", "length", None)
ROWS: Axes = ("batch", "length")
UNEMBEDDING: Axes = ("embed", "vocab")


def _on_mesh(function, inputs, outputs):
    """``function`` on the part of each array that a device has; as it is without a mesh."""
    if active_mesh() is None:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(partition_spec(axes) for axes in inputs),
        out_specs=tuple(partition_spec(axes) for axes in outputs),
        check_vma=False,
    )


def _whole(unembedding, hidden):
    """The unembedding in the dtype of ``hidden``, gathered along D."""
    unembedding = unembedding.astype(hidden.dtype)
    if active_mesh() is None:
        return unembedding
    return jax.lax.all_gather(unembedding, EMBED, axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sums(time_chunk, hidden, unembedding, targets, weights):
    """Weighted sums of nats and hits.

    The forward pass under differentiation takes the gradient while the logits of a chunk are
    there: it is linear in the cotangent of the sum, so the logits are computed once only.
    """
    nats, correct = token_nats(hidden, unembedding, targets, time_chunk=time_chunk)
    return _sums(nats, correct, weights)


def _sums(nats, correct, weights):
    nats = _zero_where_unscored(nats, weights)
    return jnp.sum(nats * weights), jnp.sum(correct.astype(jnp.float32) * weights)


def _zero_where_unscored(values, weights):
    """``values`` with 0 for what is not finite and has no weight: NaN * 0 would be NaN."""
    return jnp.where((weights == 0) & ~jnp.isfinite(values), 0.0, values)


def _weighted_sums_forward(time_chunk, hidden, unembedding, targets, weights):
    def local(hidden, unembedding, targets, weights):
        whole = _whole(unembedding, hidden)

        def body(d_unembedding, hidden, targets, weights):
            logits, lse, nats, correct = _terms(hidden, whole, targets)
            at_target = _is_target(logits, targets).astype(jnp.float32)
            d_logits = (jnp.exp(logits - lse[..., None]) - at_target) * weights[..., None]
            d_logits = d_logits.astype(hidden.dtype)
            d_hidden = jnp.einsum("btv,dv->btd", d_logits, whole)
            return d_unembedding + weight_gradient(hidden, d_logits), (d_hidden, nats, correct)

        zeros = jnp.zeros(whole.shape, jnp.float32)
        d_unembedding, (d_hidden, nats, correct) = _over_time(
            body, zeros, (hidden, targets, weights), time_chunk
        )
        if active_mesh() is not None:
            d_hidden = jax.lax.psum(d_hidden, TENSOR)
            d_unembedding = jax.lax.psum_scatter(d_unembedding, EMBED, tiled=True)
            d_unembedding = jax.lax.psum(d_unembedding, COPIES)
        return d_hidden, d_unembedding.astype(unembedding.dtype), nats, correct

    d_hidden, d_unembedding, nats, correct = _on_mesh(
        local, (HIDDEN, UNEMBEDDING, ROWS, ROWS), (HIDDEN, UNEMBEDDING, ROWS, ROWS)
    )(hidden, unembedding, targets, weights)
    d_weights = _zero_where_unscored(nats, weights)
    return _sums(nats, correct, weights), (d_hidden, d_unembedding, d_weights)


def _weighted_sums_backward(time_chunk, saved, cotangents):
    d_hidden, d_unembedding, d_weights = saved
    d_nats, _ = cotangents
    return (
        (d_hidden.astype(jnp.float32) * d_nats).astype(d_hidden.dtype),
        (d_unembedding.astype(jnp.float32) * d_nats).astype(d_unembedding.dtype),
        None,
        d_weights * d_nats,
    )


_weighted_sums.defvjp(_weighted_sums_forward, _weighted_sums_backward)


def _over_time(body, carry, rows, time_chunk):
    """Runs ``carry, out = body(carry, *rows)`` over chunks of the time axis of ``[B, T, ...]``.

    Returns the last carry and the outputs, put together along the time axis.
    """
    batch, length = rows[0].shape[:2]
    if time_chunk is None or time_chunk >= length:
        return body(carry, *rows)
    if time_chunk < 1:
        raise ValueError(f"time_chunk={time_chunk}: expected 1 or more tokens, or None for all")
    count = math.ceil(length / time_chunk)

    def split(x):
        padding = [(0, 0), (0, count * time_chunk - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(batch, count, time_chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    carry, out = jax.lax.scan(
        lambda carry, chunk: body(carry, *chunk), carry, tuple(split(x) for x in rows)
    )
    return carry, jax.tree.map(join, out)
