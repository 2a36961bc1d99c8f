"""How far rotary phases and biases are off at long positions, beside plainer ways to compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.gallery.curves import biases
from fope_jax.position.base import ModelShape, PositionEmbedding

POSITIONS = (1_000, 10_000, 131_072, 1_048_576)
WINDOW = 64  # tokens before each position that are looked at as well
DISTANCES = 1_000  # of a bias, tokens


class Errors(NamedTuple):
    """The worst error at each of ``POSITIONS``."""

    label: str
    worst: list[float]


def phase_errors(label: str, method: PositionEmbedding, shape: ModelShape) -> Errors:
    """Of the cosines and sines in the method's own tables under jit, against float64.

    Whatever the method multiplies both with, an attention factor or a decay, is divided out.

    Args:
      label: the method's.
      method: one with fixed frequencies; NaN at positions beyond its ``limits``.
      shape: the model it serves.
    """
    inv_freq = method.frequencies(shape.head_dim)
    assert inv_freq is not None
    drawn = method.init(jax.random.key(0), shape)
    layers = [(layer.method, layer.select(drawn.at_layer(0))) for layer in method.layers()]

    @jax.jit
    def table(positions):
        tables = [own.tables(variables, positions, shape.head_dim) for own, variables in layers]
        leaves = jax.tree.leaves(tables)
        cos, sin = [x for x in leaves if x.ndim == 3 and x.shape[-1] >= inv_freq.size][:2]
        both = jnp.stack([cos, sin])[..., : inv_freq.size]  # random frequencies come after
        return both / jnp.sqrt(jnp.sum(both**2, axis=0, keepdims=True))

    return Errors(label, _worst(table, inv_freq, method.limits.max_length))


def plain_errors(inv_freq: np.ndarray) -> Errors:
    """Of the float32 product of position and frequency."""
    frequencies = jnp.asarray(inv_freq, jnp.float32)
    table = jax.jit(lambda p: _circle(p[..., None].astype(jnp.float32) * frequencies, jnp))
    return Errors("plain float32 product", _worst(table, inv_freq))


def bfloat16_errors(inv_freq: np.ndarray) -> Errors:
    """Of the product with positions rounded to bfloat16, as after an early cast of a model."""
    frequencies = jnp.asarray(inv_freq, jnp.float32)

    @jax.jit
    def table(positions):
        rounded = positions.astype(jnp.bfloat16).astype(jnp.float32)
        return _circle(rounded[..., None] * frequencies, jnp)

    return Errors("bfloat16 positions", _worst(table, inv_freq))


def _circle(phase: Any, numpy: Any) -> Any:
    return numpy.stack([numpy.cos(phase), numpy.sin(phase)])


def _worst(table: Any, inv_freq: np.ndarray, length: int | None = None) -> list[float]:
    found = []
    for position in POSITIONS:
        if length is not None and position >= length:
            found.append(np.nan)
            continue
        places = np.arange(position - WINDOW + 1, position + 1, dtype=np.int32)
        truth = _circle(places[:, None].astype(np.float64) * inv_freq, np)
        ours = np.asarray(table(places[None]), np.float64)[:, 0]
        found.append(float(np.abs(ours - truth).max()))
    return found


def bias_errors(label: str, method: PositionEmbedding, shape: ModelShape) -> Errors | None:
    """Of a bias for distances to ``DISTANCES``: what it changes when query and key move far out.

    Relative to the largest bias of the head at these distances when the query stands as near as it
    can. None where the bias depends on the position by design.
    """
    drawn = method.init(jax.random.key(0), shape)
    variables = drawn.at_layer(0)
    near = biases(method, variables, DISTANCES, DISTANCES)
    size = np.abs(near).max(axis=1, keepdims=True)
    found = []
    for position in POSITIONS:
        far = biases(method, variables, position + DISTANCES, DISTANCES)
        found.append(float((np.abs(far - near) / size).max()))
    return None if found[0] > 1e-3 else Errors(label, found)


def errors_table(found: list[Errors]) -> str:
    """Markdown."""
    heads = " | ".join(f"{position:,}" for position in POSITIONS)
    lines = [f"| method | {heads} |", "|---|" + "---|" * len(POSITIONS)]
    for row in found:
        cells = ["beyond its limit" if np.isnan(e) else f"{e:.1e}" for e in row.worst]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines)
