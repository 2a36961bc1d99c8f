"""Greedy answers of a model, and the nats of given answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fope_jax.model.decode import forward_cached, greedy_decode, prefill
from fope_jax.model.losses import token_nats
from fope_jax.model.sharding import axis_size, device_put_sharded, partition_spec
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

Answerer = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]  # see ``model_answerer``


def model_answerer(model: Transformer, mesh: Mesh | None = None) -> Answerer:
    """Makes the answerer of a model, jitted once for each shape.

    Args:
      model: its arrays are sharded over ``mesh``, if given.
      mesh: devices of all processes. Rows are split over its "data" and "fsdp" axes.

    Returns:
      ``(prompts [B, T], answers [B, R, A]) -> (written, nats)``: greedy tokens ``[B, A]`` int32, -1
      where logits are not finite; and nats ``[B, R, A]`` float32 of each answer's tokens.
    """
    graphdef, params, constants = split(model)

    def answer(params: Any, constants: Any, prompts: Array, answers: Array) -> tuple[Array, Array]:
        model = merge(graphdef, params, constants)
        count = answers.shape[2]
        # The cache needs room for one token, even if nothing is read after one-token answers.
        hidden, cache, position = prefill(model, prompts, jnp.ones_like(prompts), max(1, count - 1))
        unembedding = model.unembedding_matrix()

        def answer_nats(answer: Array) -> Array:
            """Nats ``[B, A]`` of one answer to each prompt."""
            states = hidden[:, -1:]
            if count > 1:
                positions = position + jnp.arange(count - 1, dtype=jnp.int32)
                segments = jnp.ones_like(positions)
                after, _ = forward_cached(model, cache, answer[:, :-1], positions, segments)
                states = jnp.concatenate([states, after], axis=1)
            return token_nats(states, unembedding, answer)[0]

        nats = jax.lax.map(answer_nats, answers.swapaxes(0, 1)).swapaxes(0, 1)
        return greedy_decode(model, hidden, cache, position, count), nats

    if mesh is None:
        jitted = jax.jit(answer)
        return lambda prompts, answers: jitted(params, constants, prompts, answers)
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(answer, out_shardings=(replicated, replicated))
    by_rows = NamedSharding(mesh, partition_spec(("batch",)))
    rows = axis_size(mesh, "batch")

    def on_mesh(prompts: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(prompts)
        filled = np.resize(np.arange(count), count + -count % rows)
        arrays = [device_put_sharded(x[filled], by_rows) for x in (prompts, answers)]
        written, nats = sharded(params, constants, *arrays)
        return np.asarray(written)[:count], np.asarray(nats)[:count]

    return on_mesh
