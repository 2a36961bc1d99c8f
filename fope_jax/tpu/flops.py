"""Floating point operations of a training step: of its program, and of its model.

XLA's analysis counts the body of a loop once, so scanned layers would count as one layer. The jaxpr
states the length of every scan.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from fope_jax.model import bias_kernel
from fope_jax.model.config import TransformerConfig


def model_flops(config: TransformerConfig, batch: int, length: int) -> float:
    """Operations that any program of a step needs, for model-flops utilisation.

    6 per token and weight of each matrix product (2 forward, 4 backward), and for attention 12 per
    token, key and dimension of all heads, halved because half the keys are masked. Multiplications
    and additions both count.

    Reference: Chowdhery et al. 2022, "PaLM", appendix B, with the causal half.
    """
    shape = config.shape
    width = config.d_model
    heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    matrices = config.num_layers * (width * heads + 3 * width * config.mlp_dim)
    matrices += width * config.vocab_size
    attention = 6 * config.num_layers * length * shape.num_heads * shape.head_dim
    return float(batch * length * (6 * matrices + attention))


def program_flops(jaxpr: Any, dynamic_trips: float) -> float:
    """Operations of all matrix products of a program, over all devices.

    Args:
      jaxpr: such as ``jax.jit(f).trace(...).jaxpr``.
      dynamic_trips: assumed trips of a loop whose count is known only at run time. In a training
        step these are chunked attention's loops over visible blocks of keys.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> step = lambda x, _: (x @ x, None)
    >>> f = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5)[0])
    >>> program_flops(f.trace(x).jaxpr, 1) / (2 * 8**3)
    5.0
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        # Nested programs: loop bodies, branches of a condition.
        leaves = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(list(params.values()))]
        inner = [program_flops(leaf, dynamic_trips) for leaf in leaves if hasattr(leaf, "eqns")]
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracting)
        elif name == "cond":
            total += max(inner)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += dynamic_trips * sum(inner)
        elif name == "shard_map":  # its jaxpr is the program of one device
            total += params["mesh"].size * sum(inner)
        elif name == "pallas_call":
            grid = params["grid_mapping"].grid
            is_ours = str(params.get("name", "")).startswith(bias_kernel.NAME)
            computed = bias_kernel.computed_fraction(grid) if is_ours else 1.0
            total += math.prod(grid) * computed * sum(inner)
        else:
            total += sum(inner)
    return total
