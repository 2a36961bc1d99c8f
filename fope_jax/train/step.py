"""One update of the parameters, as a pure function of state, constants and batch."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fope_jax.model.losses import loss_sums
from fope_jax.model.sharding import active_mesh, axis_size, tree_shardings
from fope_jax.model.transformer import merge
from fope_jax.position.base import PositionEmbedding
from fope_jax.train.bad_steps import Guard
from fope_jax.typing import Array, Batch

LOGITS_IN_MEMORY = 2**26  # 256 MB of float32; more are computed in chunks along the sequence


class TrainState(NamedTuple):
    """What an update changes: parameters, optimizer state and the state of ``Guard``, if any."""

    params: Any
    optimizer: Any
    guard: Any = ()


def state_shardings(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    position: PositionEmbedding,
    mesh: Any,
) -> TrainState:
    """A NamedSharding for each leaf: moments like their parameters, counts replicated."""
    params = tree_shardings(state.params, position, mesh)
    replicated = NamedSharding(mesh, P())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.optimizer,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(params, moments, jax.tree.map(lambda _: replicated, state.guard))


class StepMetrics(NamedTuple):
    """Float32 scalars of an update: sums of loss and weights, |g| before clipping, 1 if skipped."""

    nats: Array
    tokens: Array
    grad_norm: Array
    skipped: Array


def batch_loss(params: Any, graphdef: Any, constants: Any, batch: Batch) -> tuple[Array, Array]:
    """The training loss: nats summed over ``batch``, and the sum of the token weights."""
    model = merge(graphdef, params, constants)
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments)
    unembedding = model.unembedding_matrix()
    (size, length), vocabulary = batch.tokens.shape, unembedding.shape[1]
    mesh = active_mesh()
    if mesh is not None:  # sizes on one device
        size //= axis_size(mesh, "batch")
        length //= axis_size(mesh, "length")
        vocabulary //= axis_size(mesh, "vocab")
    fitting = LOGITS_IN_MEMORY // (size * vocabulary)
    chunk = None if fitting >= length else max(1, fitting)
    sums = loss_sums(hidden, unembedding, batch.targets, batch.weights, time_chunk=chunk)
    return sums.nats, sums.tokens


def gradient_sums(
    graphdef: Any, params: Any, constants: Any, batch: Batch, accumulate: int
) -> tuple[Any, Array, Array]:
    """Gradient of the summed nats, the nats and the weights of a batch, in float32.

    The ``accumulate`` pieces are strided along B, so that each device has rows of every piece.
    Results are sums, not means, because pieces have different numbers of scored tokens.
    """
    # In bfloat16 the small terms of the sum would be lost.
    params, rows = optax.tree.cast(params, jnp.float32), batch.tokens.shape[0] // accumulate
    loss_and_gradient = jax.value_and_grad(batch_loss, has_aux=True)
    if accumulate == 1:
        (nats, tokens), gradient = loss_and_gradient(params, graphdef, constants, batch)
        return gradient, nats, tokens

    def cut(x: Array) -> Array:
        if x.shape[0] == 1:
            return jnp.broadcast_to(x, (accumulate, *x.shape))
        return x.reshape(rows, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add_piece(sums: tuple[Any, Array, Array], piece: Batch) -> tuple[Any, None]:
        (nats, tokens), gradient = loss_and_gradient(params, graphdef, constants, piece)
        return jax.tree.map(jnp.add, sums, (gradient, nats, tokens)), None

    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))
    return jax.lax.scan(add_piece, zeros, jax.tree.map(cut, batch))[0]


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "accumulate", "guard"),
    donate_argnames=("state",),
)
def train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    constants: Any,
    batch: Batch,
    *,
    accumulate: int = 1,
    guard: Guard | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update with the mean loss per token of ``batch``; nothing in it is random.

    The gradient of a batch without a scored token is 0. Its update is made like any other: moments
    shrink, and weights follow them and the weight decay.

    Args:
      graphdef: the model without its arrays, from ``split``.
      optimizer: from ``make_optimizer``; gets gradients and parameters in float32.
      state: donated, so the caller's copy is invalid afterwards.
      constants: position constants, unchanged.
      batch: leaves ``[B, T]``; positions and segments may be ``[1, T]``, shared by all rows.
      accumulate: pieces the batch is computed in; divides B.
      guard: rejects bad updates; the state is then returned unchanged.
    """
    gradient, nats, tokens = gradient_sums(graphdef, state.params, constants, batch, accumulate)
    scored = jnp.where(tokens == 0, 1.0, tokens)  # 0 / 0 would be NaN
    gradient = jax.tree.map(lambda g: g / scored.astype(g.dtype), gradient)
    params = optax.tree.cast(state.params, jnp.float32)
    updates, moments = optimizer.update(gradient, state.optimizer, params)
    params = jax.tree.map(
        lambda old, x, update: (x + update).astype(old.dtype), state.params, params, updates
    )
    norm, skipped = optax.tree.norm(gradient), jnp.zeros(())
    after = TrainState(params, moments, state.guard)
    if guard is not None:
        is_good, means = guard.judge(state.guard, nats / scored, norm, tokens != 0)
        after = after._replace(guard=means)
        after = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), after, state)
        skipped = 1.0 - is_good.astype(jnp.float32)
    if (mesh := active_mesh()) is not None:
        position = merge(graphdef, state.params, constants).position
        shardings = state_shardings(optimizer, after, position, mesh)
        after = jax.lax.with_sharding_constraint(after, shardings)
    return after, StepMetrics(nats, tokens, norm, skipped)


@jax.jit
def all_finite(tree: Any) -> Array:
    """Whether every number in a pytree is finite; a bool scalar."""
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.array(True)
