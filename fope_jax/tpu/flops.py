"""Floating point operations of a training step: of its program, and of its model.

XLA's analysis counts the body of a loop once, so scanned layers would count as one layer. The jaxpr
states the length of every scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from fope_jax.model.backends import query_width, range_of_scope, visited_blocks
from fope_jax.model.config import TransformerConfig
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.position.base import Layer, PositionEmbedding

Trips = Callable[[str], float]


def model_flops(
    config: TransformerConfig, position: PositionEmbedding, batch: int, length: int
) -> float:
    """Operations that any program of a step needs, for model-flops utilisation.

    6 per token and weight of each matrix product (2 forward, 4 backward), and for attention 6 per
    token, key that it sees and dimension of all heads, once for the scores and once for the values.
    Multiplications and additions both count. A token sees half the keys of a row, or those of its
    window.

    Reference: Chowdhery et al. 2022, "PaLM", appendix B, with the causal half.
    """
    shape = config.shape
    width = config.d_model
    heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    matrices = config.num_layers * (width * heads + 3 * width * config.mlp_dim)
    matrices += width * config.vocab_size
    pattern = layer_pattern(config, position)
    attention = 0.0
    for layer in pattern:
        score = query_width(layer, shape) // (1 if layer.far_from is None else 2)
        attention += 6 * _keys_seen(layer, length) * shape.num_heads * (score + shape.head_dim)
    attention *= config.num_layers // len(pattern)
    return float(batch * length * (6 * matrices + attention))


def _keys_seen(layer: Layer, length: int) -> float:
    """Keys that a query sees, on average over a row of one document."""
    row = min(length, layer.chunk or length)
    window = min(row, layer.window or row)
    return window - window**2 / (2 * row)


def visits_of_queries(length: int, block: int) -> Trips:
    """From the name stack of a loop of chunked attention to its trips.

    They are the blocks of keys that a block of queries visits, on average over a row of one
    document.
    """
    count = math.ceil(length / block)
    size = math.ceil(length / count)
    return lambda names: visited_blocks(count, size, *range_of_scope(names)) / count


def program_flops(jaxpr: Any, dynamic_trips: Trips, names: str = "") -> float:
    """Operations of all matrix products of a program, over all devices.

    ``dynamic_trips`` gives the assumed trips of a loop whose count is known only at run time, from
    its name stack: in a training step, chunked attention's loops over visible blocks of keys.
    ``names`` is the name stack of the program itself.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> step = lambda x, _: (x @ x, None)
    >>> f = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5)[0])
    >>> program_flops(f.trace(x).jaxpr, lambda names: 1) / (2 * 8**3)
    5.0
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        # Nested programs: loop bodies, branches of a condition.
        leaves = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(list(params.values()))]
        stack = f"{names}/{equation.source_info.name_stack}"
        inner = [
            program_flops(leaf, dynamic_trips, stack) for leaf in leaves if hasattr(leaf, "eqns")
        ]
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracting)
        elif name == "cond":
            total += max(inner)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += dynamic_trips(stack) * sum(inner)
        elif name == "shard_map":  # its jaxpr is the program of one device
            total += params["mesh"].size * sum(inner)
        elif name == "pallas_call":
            if params["cost_estimate"] is not None:  # our kernel's, whose grid is dynamic
                total += params["cost_estimate"].flops
            else:
                steps = math.prod(params["grid_mapping"].grid)
                total += steps * _splash_fraction(equation, stack) * sum(inner)
        else:
            total += sum(inner)
    return total


def _splash_fraction(equation: Any, names: str) -> float:
    """The fraction of the grid's blocks that splash computes; it steps over the others.

    Its first operand states for each block of queries which of the keys to take, ``[1, Q, P]``, P
    shortened to the most of them.
    """
    blocks = equation.invars[0].aval.shape[1:]
    count, length = max(blocks), equation.invars[2].aval.shape[-2]
    window, chunk = range_of_scope(names)
    tokens = min(window or length, chunk or length)  # a chunk is a window and further documents
    return visited_blocks(count, length // count, tokens) / math.prod(blocks)
