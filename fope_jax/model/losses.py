"""Next-token cross-entropy as sums, so that batches of any size add up exactly.

The logits ``[B, T, V]`` are the largest tensor of a small model. With ``time_chunk`` only a part of
the time axis is held at once, forward and backward.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fope_jax.model.layers import check_derivatives, product, weight_gradient
from fope_jax.model.sharding import AXIS_RULES, Axes, active_mesh, partition_spec
from fope_jax.typing import Array

TENSOR = AXIS_RULES["vocab"]
EMBED = AXIS_RULES["embed"]
COPIES = tuple(axis for axis in AXIS_RULES["batch"] if axis not in EMBED)
HIDDEN: Axes = ("batch", "length", None)
ROWS: Axes = ("batch", "length")
UNEMBEDDING: Axes = ("embed", "vocab")


class LossSums(NamedTuple):
    """Float32 scalars that can be added over batches.

    Attributes:
      nats: weighted sum of ``-log p(target)``.
      tokens: sum of the weights.
      bytes: weighted sum of the targets' UTF-8 bytes; 0 without ``token_bytes``.
      correct: weighted count of targets that are the argmax; non-finite logits count as wrong.
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
      targets: ``[B, T]`` int32. One outside the vocabulary makes ``nats`` and ``bytes`` NaN, unless
        its weight is 0, as for the -100 of ignored labels.
      weights: ``[B, T]`` float32, 0 where the target is not scored.
      token_bytes: ``[V]`` int32, UTF-8 bytes of each token.
      time_chunk: tokens of each row whose logits exist at once; None means all.
      derivatives: "reverse" for training takes the gradient in the forward pass; "all" adds forward
        mode and second derivatives.
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
        # Plain indexing would give an invalid target the bytes of another token.
        lengths = jnp.asarray(token_bytes, jnp.float32).at[targets]
        lengths = lengths.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        lengths = _zero_where_unscored(lengths, weights)
    return LossSums(nats, jnp.sum(weights), jnp.sum(lengths * weights), correct)


def token_nats(
    hidden: Array, unembedding: Array, targets: Array, *, time_chunk: int | None = None
) -> tuple[Array, Array]:
    """Cross-entropy of each target, and whether it is the model's first choice.

    For the arguments see ``loss_sums``. Returns ``nats [B, T]`` float32, ``-log p(target)``, NaN
    for a target outside the vocabulary; and ``correct [B, T]`` bool, whether the target is the
    argmax, False if the nats are not finite.
    """

    def on_device(hidden, unembedding, targets):
        @jax.checkpoint
        def score(unembedding, hidden, targets):
            _, nats, correct = _score(hidden, unembedding, targets)
            return unembedding, (nats, correct)

        unembedding = _gather(unembedding, hidden.dtype)
        return _scan_time(score, unembedding, (hidden, targets), time_chunk)[1]

    return _on_mesh(on_device, (HIDDEN, UNEMBEDDING, ROWS), (ROWS, ROWS))(
        hidden, unembedding, targets
    )


def compute_logits(hidden: Array, unembedding: Array) -> Array:
    """Logits ``[B, T, V]``, float32, multiplied in the dtype of ``hidden``."""
    return jnp.einsum(
        "btd,dv->btv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _score(hidden: Array, unembedding: Array, targets: Array) -> tuple[Array, ...]:
    """``d_nats [B, T, V]`` for this device's logits, and the results of ``token_nats``."""
    logits = compute_logits(hidden, unembedding)
    ids = jax.lax.broadcasted_iota(targets.dtype, (1, 1, logits.shape[-1]), 2)
    size = logits.shape[-1]
    on_mesh = active_mesh() is not None
    if on_mesh:
        ids += jax.lax.axis_index(TENSOR) * size
        size = jax.lax.psum(size, TENSOR)
        largest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), TENSOR)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        lse = largest + jnp.log(jax.lax.psum(total, TENSOR))
        at_target = jnp.where(ids == targets[..., None], logits, 0.0)
        chosen = jax.lax.psum(jnp.sum(at_target, axis=-1, keepdims=True), TENSOR)
    else:
        lse = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    is_known = (targets >= 0) & (targets < size)
    nats = jnp.where(is_known, lse - chosen[..., 0], jnp.nan)
    # A tie goes to the lowest id, as in argmax. This is one pass that fuses with the sum above.
    is_larger = (logits > chosen) | ((logits == chosen) & (ids < targets[..., None]))
    is_beaten = jnp.any(is_larger, axis=-1)
    if on_mesh:
        is_beaten = jax.lax.psum(is_beaten.astype(jnp.int32), TENSOR) > 0
    d_nats = jnp.exp(logits - lse[..., None]) - (ids == targets[..., None]).astype(jnp.float32)
    # Comparisons with NaN are false, so a target with NaN logits would count as the argmax.
    return d_nats, nats, jnp.isfinite(nats) & ~is_beaten


def _on_mesh(function, inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]):
    if active_mesh() is None:
        return function
    in_specs, out_specs = (tuple(map(partition_spec, axes)) for axes in (inputs, outputs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gather(unembedding: Array, dtype: Any) -> Array:
    unembedding = unembedding.astype(dtype)
    if active_mesh() is None:
        return unembedding
    return jax.lax.all_gather(unembedding, EMBED, axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sums(time_chunk, hidden, unembedding, targets, weights):
    """Weighted sums of nats and hits, with the gradient taken in the forward pass.

    It is linear in the cotangent, so a chunk's logits are computed only once.
    """
    nats, correct = token_nats(hidden, unembedding, targets, time_chunk=time_chunk)
    return _sums(nats, correct, weights)


def _sums(nats, correct, weights):
    nats = _zero_where_unscored(nats, weights)
    return jnp.sum(nats * weights), jnp.sum(correct.astype(jnp.float32) * weights)


def _zero_where_unscored(values, weights):
    """Zeros non-finite ``values`` of weight 0, because NaN * 0 is NaN."""
    return jnp.where((weights == 0) & ~jnp.isfinite(values), 0.0, values)


def _weighted_sums_forward(time_chunk, hidden, unembedding, targets, weights):
    def on_device(hidden, unembedding, targets, weights):
        gathered = _gather(unembedding, hidden.dtype)

        def score(d_unembedding, hidden, targets, weights):
            d_nats, nats, correct = _score(hidden, gathered, targets)
            d_logits = (d_nats * weights[..., None]).astype(hidden.dtype)
            d_hidden = product("btv,dv->btd", d_logits, gathered)
            return d_unembedding + weight_gradient(hidden, d_logits), (d_hidden, nats, correct)

        zeros = jnp.zeros(gathered.shape, jnp.float32)
        d_unembedding, (d_hidden, nats, correct) = _scan_time(
            score, zeros, (hidden, targets, weights), time_chunk
        )
        if active_mesh() is not None:
            d_hidden = jax.lax.psum(d_hidden, TENSOR)
            d_unembedding = jax.lax.psum_scatter(d_unembedding, EMBED, tiled=True)
            d_unembedding = jax.lax.psum(d_unembedding, COPIES)
        return d_hidden, d_unembedding.astype(unembedding.dtype), nats, correct

    axes = (HIDDEN, UNEMBEDDING, ROWS, ROWS)
    d_hidden, d_unembedding, nats, correct = _on_mesh(on_device, axes, axes)(
        hidden, unembedding, targets, weights
    )
    d_weights = _zero_where_unscored(nats, weights)
    return _sums(nats, correct, weights), (d_hidden, d_unembedding, d_weights)


def _weighted_sums_backward(time_chunk, gradients, cotangents):
    d_hidden, d_unembedding, d_weights = (
        (gradient.astype(jnp.float32) * cotangents[0]).astype(gradient.dtype)
        for gradient in gradients
    )
    return d_hidden, d_unembedding, None, d_weights


_weighted_sums.defvjp(_weighted_sums_forward, _weighted_sums_backward)


def _scan_time(body, carry, rows, time_chunk):
    """Scans ``carry, out = body(carry, *rows)`` over chunks of the time axis of ``[B, T, ...]``."""
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
        lambda carry, chunk: body(carry, *chunk), carry, jax.tree.map(split, rows)
    )
    return carry, jax.tree.map(join, out)
