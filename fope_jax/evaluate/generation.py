"""From a model to its answers: what it writes, and how likely it holds other answers."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fope_jax.model.decode import forward_cached, greedy_decode, prefill
from fope_jax.model.losses import token_nats
from fope_jax.model.sharding import axis_size, device_put_sharded, partition_spec
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array


class Answerer(Protocol):
    """What a retrieval protocol asks of a model."""

    def __call__(self, prompts: np.ndarray, answers: np.ndarray) -> tuple[Any, Any]:
        """Goes on with prompts, and reads answers that are given.

        Args:
          prompts: ``[B, T]`` int32, whole prompts.
          answers: ``[B, R, A]`` int32, R answers to each.

        Returns:
          written: ``[B, A]`` int32, the most likely token after the prompt, and after each of
            those written; -1 where the logits are not finite.
          nats: ``[B, R, A]`` float32, of each token of each answer after the prompt.
        """
        ...


def model_answerer(model: Transformer, mesh: Mesh | None = None) -> Answerer:
    """The answerer of a Transformer: one jitted program for each shape.

    A prompt is read once; everything after it goes on from its key cache.

    Args:
      model: its arrays lie over ``mesh``, where one is given.
      mesh: devices of all processes. Rows are shared out over its "data" and "fsdp" axes, filled
        up with copies whose answers are left out; how the rest is cut up is left to the compiler.
    """
    graphdef, params, constants = split(model)

    def answer(params: Any, constants: Any, prompts: Array, answers: Array) -> tuple[Array, Array]:
        model = merge(graphdef, params, constants)
        count = answers.shape[2]
        # Room for one token even where answers have a single one and nothing is read after it.
        hidden, cache, position = prefill(model, prompts, jnp.ones_like(prompts), max(1, count - 1))
        unembedding = model.unembedding_matrix()

        def nats_of(answer: Array) -> Array:
            """``[B, A]`` of one answer to each prompt."""
            last = hidden[:, -1:]
            if count > 1:
                positions = position + jnp.arange(count - 1, dtype=jnp.int32)
                ones = jnp.ones_like(positions)
                last = jnp.concatenate(
                    [last, forward_cached(model, cache, answer[:, :-1], positions, ones)[0]], axis=1
                )
            return token_nats(last, unembedding, answer)[0]

        nats = jax.lax.map(nats_of, answers.swapaxes(0, 1)).swapaxes(0, 1)
        return greedy_decode(model, hidden, cache, position, count), nats

    if mesh is None:
        alone = jax.jit(answer)
        return lambda prompts, answers: alone(params, constants, prompts, answers)
    whole = NamedSharding(mesh, PartitionSpec())
    together = jax.jit(answer, out_shardings=(whole, whole))
    by_rows = NamedSharding(mesh, partition_spec(("batch",)))
    rows = axis_size(mesh, "batch")

    def on_mesh(prompts: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(prompts)
        filled = np.resize(np.arange(count), count + -count % rows)
        placed = [device_put_sharded(x[filled], by_rows) for x in (prompts, answers)]
        written, nats = together(params, constants, *placed)
        return np.asarray(written)[:count], np.asarray(nats)[:count]

    return on_mesh
