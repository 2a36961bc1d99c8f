"""What a model of ours computes with parts that were imported or made."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fope_jax.model.transformer import Transformer, merge, split


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def _run(graphdef, params, constants, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return merge(graphdef, params, constants)(tokens, positions, jnp.ones_like(positions))


def logits_of_parts(parts: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, T, V]`` of a configuration, position embedding, parameters and constants.

    The trees must be those that ``split`` gives for a model of this configuration.
    """
    config, position, *own = parts[:4]
    model = nnx.eval_shape(lambda: Transformer(config, position, rngs=nnx.Rngs(0)))
    graphdef, *expected = split(model)
    described = [
        jax.tree_util.tree_map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (own, expected)
    ]
    assert described[0] == described[1]
    return np.asarray(_run(graphdef, *own, tokens))
