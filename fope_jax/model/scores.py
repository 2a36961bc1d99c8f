"""The logits of a block of queries with a block of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from fope_jax.model.masks import attention_mask
from fope_jax.model.running_sums import bias_of_sums
from fope_jax.typing import Array

BiasFn = Callable[[Any, Array, Array], Array]

# Finite, because -inf - (-inf) would be NaN for a query that sees no key.
LOWEST = -1e30


class ScoreRules(NamedTuple):
    """What is known while tracing; see the arguments of ``attend`` of the same names."""

    scale: float
    bias_fn: BiasFn | None = None
    window: int | None = None
    chunk: int | None = None
    far_from: int | None = None


def block_logits(rules, q, k, q_sums, k_sums, variables, q_index, k_index) -> Array:
    """Scaled, biased, masked scores ``[B, K, G, t, s]`` of ``q [B, K, G, t, E]``, G = N / K."""
    logits = products(rules, q, k, q_index, k_index) * rules.scale
    if rules.bias_fn is not None:
        logits = add_bias(logits, rules.bias_fn(variables, q_index.positions, k_index.positions))
    if q_sums is not None:
        logits += bias_of_sums(q_sums, k_sums)
    mask = attention_mask(q_index, k_index, rules.window, rules.chunk)
    return jnp.where(mask[:, None, None], logits, -jnp.inf)


def products(rules, q, k, q_index, k_index) -> Array:
    """``q.k``, of the second half of both for keys ``far_from`` tokens back or further."""
    if rules.far_from is None:
        return _all_products(q, k)
    near, far = (
        _all_products(*halves)
        for halves in zip(jnp.split(q, 2, axis=-1), jnp.split(k, 2, axis=-1), strict=True)
    )
    distance = q_index.positions[:, :, None] - k_index.positions[:, None, :]
    return jnp.where((distance >= rules.far_from)[:, None, None], far, near)


def _all_products(q: Array, k: Array) -> Array:
    """``[B, K, G, t, s]``; of the keys and the products, the smaller is transposed on a CPU."""
    if q.shape[2] * q.shape[3] < q.shape[4]:
        return jnp.moveaxis(dot("bksh,bkgth->bksgt", k, q), 2, -1)
    return dot("bkgth,bksh->bkgts", q, k)


def dot(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def add_bias(logits: Array, bias: Array) -> Array:
    batch, kv_heads, group, *block = logits.shape
    check_bias_shape(bias, (batch, kv_heads * group, *block))
    heads = (1, 1) if bias.shape[1] == 1 else (kv_heads, group)
    return logits + bias.reshape(bias.shape[0], *heads, *bias.shape[2:]).astype(jnp.float32)


def check_bias_shape(bias: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``bias`` broadcasts to ``shape``, ``[B, N, T, S]``, from 4 axes."""
    if bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, shape, strict=True)):
        raise ValueError(
            f"a bias {bias.shape} for logits [B, N, T, S] = {shape}: expected that shape, or 1 on "
            "axes along which it is the same"
        )
