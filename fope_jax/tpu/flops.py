"""Floating point operations of a training step: from its program, and from its sizes.

XLA's own analysis counts the body of a loop once, so scanned layers count as one layer. Here the
program before XLA is read, in which every scan states its length.
"""

from __future__ import annotations

import math
from typing import Any

from fope_jax.model import bias_kernel
from fope_jax.model.transformer import TransformerConfig


def model_flops(config: TransformerConfig, batch: int, length: int) -> float:
    """What a step must compute, whatever the program: the number behind model-flops utilisation.

    6 a token and parameter of every matrix that is multiplied (2 forward, 4 backward), and for
    attention 12 a token, key and head width, halved because keys after a query do not count.
    Multiplications and additions both count.

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
      jaxpr: closed, such as ``jax.jit(f).trace(...).jaxpr``.
      dynamic_trips: how often a loop runs whose count is only known at run time. In a training step
        these are the loops of chunked attention over the blocks of keys that a block of queries
        sees.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> step = lambda x, _: (x @ x, None)
    >>> f = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5)[0])
    >>> program_flops(f.trace(x).jaxpr, 1) / (2 * 8**3)
    5.0
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr), dynamic_trips)


def _count(jaxpr: Any, trips: float) -> float:
    return sum(_of_equation(eqn, trips) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any, trips: float) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracting)
    if name == "cond":
        return max(_count(branch.jaxpr, trips) for branch in params["branches"])
    inner = sum(_count(sub, trips) for sub in _programs(params))
    if name == "scan":
        return params["length"] * inner
    if name == "while":
        return trips * inner
    if name == "shard_map":  # its program is what one device does
        return params["mesh"].size * inner
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        ours = str(params.get("name", "")).startswith(bias_kernel.NAME)
        return math.prod(grid) * inner * (bias_kernel.computed_fraction(grid) if ours else 1.0)
    return inner


def _programs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            leaf = getattr(leaf, "jaxpr", leaf)
            if hasattr(leaf, "eqns"):
                found.append(leaf)
    return found
