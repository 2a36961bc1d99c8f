"""Milliseconds that the rotations of a training step take by themselves.

A per cent of a step is less than what two steps of one method differ by on a shared machine. The
rotations alone, forward and backward over all layers, can be timed to a fraction of that, and set
against the step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.cost import time_interleaved
from fope_jax.position.base import ModelShape, PositionEmbedding


class Rotation(NamedTuple):
    """Milliseconds a step: quartiles over rounds, and the median difference to the first method."""

    label: str
    low: float
    median: float
    high: float
    more: float


def rotations(
    methods: dict[str, PositionEmbedding], shape: ModelShape, batch: int, length: int, rounds: int
) -> list[Rotation]:
    """Times tables once and the rotation of q and k in each layer, with its gradient.

    Args:
      methods: rotations, the one to compare with first.
      shape: of the model; layers are scanned, as in training.
      batch: rows, which share their positions.
      length: tokens.
      rounds: timed calls of each method, interleaved.
    """
    runs = [_step(method, shape, batch, length) for method in methods.values()]
    for run in runs:
        jax.block_until_ready(run())
    seconds = time_interleaved(runs, rounds)
    found = []
    for label, own in zip(methods, seconds, strict=True):
        low, median, high = (1e3 * s for s in statistics.quantiles(own, n=4, method="inclusive"))
        pairs = [1e3 * (a - b) for a, b in zip(own, seconds[0], strict=True)]
        found.append(Rotation(label, low, median, high, statistics.median(pairs)))
    return found


def _step(method: PositionEmbedding, shape: ModelShape, batch: int, length: int):
    """The gradients of q and k of all layers, given those of the rotated ones."""
    drawn = method.init(jax.random.key(0), shape)
    model = {**drawn.model_params, **drawn.model_constants}
    layers = {**drawn.layer_params, **drawn.layer_constants}
    sizes = [(batch, length, heads, shape.head_dim) for heads in (shape.num_heads,) * 2]
    # Gradients come as arrays, so that nothing is folded into the rotation that training has not.
    q, k, dq, dk = (
        jax.random.normal(key, size)
        for key, size in zip(jax.random.split(jax.random.key(1), 4), sizes * 2, strict=True)
    )
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    @jax.jit
    def run(q, k, dq, dk, layers):
        tables = jax.lax.optimization_barrier(method.tables(model, positions, shape.head_dim))

        def layer(carry, variables):
            def rotate(q, k):
                return method.rotate({**model, **variables}, tables, q, k)

            _, pull = jax.vjp(rotate, *carry)
            turned = jax.lax.optimization_barrier(rotate(*carry))
            back = jax.lax.optimization_barrier(pull((dq, dk)))
            return jax.tree.map(lambda a, b: 0.5 * (a + b), turned, back), None

        return jax.lax.scan(layer, (q, k), layers, length=shape.num_layers)[0]

    return lambda: run(q, k, dq, dk, layers)


def rotation_table(found: Sequence[Rotation]) -> str:
    """Markdown."""
    base = found[0].label
    lines = [f"| method | ms/step (median) | quartiles | more than {base} |", "|---|---|---|---|"]
    lines += [
        f"| {r.label} | {r.median:.1f} | {r.low:.1f} to {r.high:.1f} | {r.more:+.1f} |"
        for r in found
    ]
    return "\n".join(lines)
