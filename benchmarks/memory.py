"""Temporary memory of chunked attention with a bias, forward and backward, as compiled."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fope_jax.model.attention import attend, layer_arguments
from fope_jax.position.base import ModelShape, PositionEmbedding, PositionVariables


class Growth(NamedTuple):
    """Temporary bytes by sequence length, and the exponent of their growth.

    Attributes:
      label: the method's.
      sizes: bytes by tokens.
      exponent: of ``bytes ~ tokens ** exponent`` from the shortest to the longest.
    """

    label: str
    sizes: dict[int, int]
    exponent: float


def temporary_bytes(method: PositionEmbedding, shape: ModelShape, length: int) -> int:
    """Bytes that XLA sets aside for attention and its gradient over one row of ``length`` tokens.

    Nothing is run: the program is compiled and asked.
    """
    drawn = jax.eval_shape(lambda: method.init(jax.random.key(0), shape))
    trained, constants = _one_layer(drawn)
    layer = method.layers()[0]
    trained, constants = layer.select(trained), layer.select(constants)

    def loss(q, k, v, trained, constants):
        places = jnp.arange(length, dtype=jnp.int32)[None]
        out = attend(
            q,
            k,
            v,
            q_positions=places,
            k_positions=places,
            q_segments=jnp.ones_like(places),
            k_segments=jnp.ones_like(places),
            **layer_arguments(layer),
            bias_variables=trained,
            bias_constants=constants,
        )
        return jnp.sum(out)

    q = jax.ShapeDtypeStruct((1, length, shape.num_heads, shape.head_dim), jnp.float32)
    k = jax.ShapeDtypeStruct((1, length, shape.num_kv_heads, shape.head_dim), jnp.float32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    analysis: Any = gradient.lower(q, k, k, trained, constants).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def _one_layer(drawn: PositionVariables) -> tuple[dict, dict]:
    """Shapes of the trained variables and constants of one layer and of the model."""

    def first(layers):
        return {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in layers.items()}

    return (
        {**drawn.model_params, **first(drawn.layer_params)},
        {**drawn.model_constants, **first(drawn.layer_constants)},
    )


def growth(label: str, method: PositionEmbedding, shape: ModelShape, lengths: list[int]) -> Growth:
    """``temporary_bytes`` at each length."""
    sizes = {length: temporary_bytes(method, shape, length) for length in sorted(lengths)}
    return Growth(label, sizes, exponent(sizes))


def exponent(sizes: dict[int, int]) -> float:
    """Of the growth between the shortest and the longest; NaN with one length.

    >>> exponent({1024: 10, 4096: 40}), exponent({1024: 10, 4096: 160})
    (1.0, 2.0)
    """
    short, long = min(sizes), max(sizes)
    if short == long:
        return math.nan
    return math.log(sizes[long] / sizes[short]) / math.log(long / short)


def memory_table(found: list[Growth], shape: ModelShape) -> str:
    """Markdown, in MB, with one ``[N, T, T]`` float32 tensor for comparison."""
    lengths = list(found[0].sizes)
    lines = [
        f"| method | {' | '.join(f'{length:,}' for length in lengths)} | exponent |",
        "|---|" + "---|" * (len(lengths) + 1),
    ]
    whole = Growth("one [N, T, T]", {t: 4 * shape.num_heads * t * t for t in lengths}, 2.0)
    for row in [*found, whole]:
        cells = " | ".join(f"{size / 1e6:,.1f}" for size in row.sizes.values())
        lines.append(f"| {row.label} | {cells} | {row.exponent:.2f} |")
    return "\n".join(lines)
