"""Running sums over a row, exact enough that their differences are."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fope_jax.typing import Array

_SUMMED_TOKENS = 128


def running_sums(increments: Array) -> Array:
    """Sums of ``increments [B, T, N]`` up to each token, ``[B, T, N, 2]``: a high and a low part.

        high + low = a[0] + .. + a[t];   bias[i, j] = (high_i - high_j) + (low_i - low_j)

    In float32. A single sum of 65,536 numbers would be rounded by more than the bias between
    neighbours. Here blocks of 128 tokens sum apart, and the sums of blocks carry their rounding
    along, so the bias is rounded by no more than a sum of 128 numbers. The gradient goes to the
    high part.
    """
    return _running_sums(increments.astype(jnp.float32))


@jax.custom_jvp
def _running_sums(increments: Array) -> Array:
    batch, length, heads = increments.shape
    count = max(1, math.ceil(length / _SUMMED_TOKENS))
    padded = jnp.pad(increments, ((0, 0), (0, count * _SUMMED_TOKENS - length), (0, 0)))
    inside = jnp.cumsum(padded.reshape(batch, count, _SUMMED_TOKENS, heads), axis=2)
    totals = inside[:, :-1, -1]
    high, low = jax.lax.associative_scan(_add_pairs, (totals, jnp.zeros_like(totals)), axis=1)
    high, low = (jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :, None] for x in (high, low))
    parts = jnp.stack([jnp.broadcast_to(high, inside.shape), inside + low], axis=-1)
    return parts.reshape(batch, count * _SUMMED_TOKENS, heads, 2)[:, :length]


@_running_sums.defjvp
def _running_sums_jvp(primals, tangents):
    (increments,), (tangent,) = primals, tangents
    summed = jnp.cumsum(tangent, axis=1)
    return _running_sums(increments), jnp.stack([summed, jnp.zeros_like(summed)], axis=-1)


def bias_of_sums(q_sums: Array, k_sums: Array) -> Array:
    """The bias ``[..., t, s]`` of ``q_sums [..., t, 2]`` and ``k_sums [..., s, 2]``, float32."""
    high, low = (q_sums[..., :, None, i] - k_sums[..., None, :, i] for i in range(2))
    return high + low


def add_sums(x: Array, y: Array) -> Array:
    """Adds numbers ``[..., 2]`` that are a high and a low part each, as from ``running_sums``."""
    return jnp.stack(_add_pairs((x[..., 0], x[..., 1]), (y[..., 0], y[..., 1])), axis=-1)


def _add_pairs(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Knuth's two-sum of the high parts; its rounding goes to the low part."""
    high = x[0] + y[0]
    part = high - x[0]
    rounding = (x[0] - (high - part)) + (y[0] - part)
    low = x[1] + y[1] + rounding
    total = high + low
    return total, low - (total - high)
