"""From a model to the nats of chosen targets: the one door between protocols and networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fope_jax.model.attention import TokenIndex
from fope_jax.model.losses import token_nats
from fope_jax.model.sharding import axis_size, batch_sharding, device_put_sharded
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

LOGITS_IN_MEMORY = 2**24  # 64 MB of float32: small against the weights of any model worth scoring

Scorer = Callable[..., tuple[Any, Any]]  # what protocols ask of a model, see ``scorer_factory``
Progress = Callable[..., Iterable[int]]


def no_progress(batches: Iterable[int], **_: Any) -> Iterable[int]:
    """The progress bar that shows nothing."""
    return batches


def score_windows(
    scorer: Scorer,
    read: Callable[[int], np.ndarray],
    count: int,
    *,
    context: int,
    scored: int,
    batch_tokens: int,
    progress: Progress = no_progress,
    desc: str = "",
    locate: Callable[[int], TokenIndex] | None = None,
    bos: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores the last ``scored`` targets of ``count`` windows, in batches of one shape.

    The last batch is filled up with copies, whose results are left out.

    Args:
      scorer: the model.
      read: window number -> ``[context + 1]`` tokens.
      count: number of windows W.
      context: tokens of a window T.
      scored: targets S scored at its end.
      batch_tokens: upper bound of tokens in a batch; one window is always allowed.
      progress, desc: called as ``progress(batches, desc=desc)``, e.g. ``tqdm``.
      locate: window number -> positions and segments ``[context]``; None leaves them to the scorer.
      bos: token that stands in place of what a window, or each segment of it, begins with; targets
        stay as they are. None changes nothing.

    Returns:
      nats ``[W, S]`` float32 and hits ``[W, S]`` bool on the host.
    """
    size = min(count, max(1, batch_tokens // context))
    nats = np.empty((count, scored), np.float32)
    hits = np.empty((count, scored), bool)
    for start in progress(range(0, count, size), desc=desc):
        numbers = np.arange(start, min(start + size, count))
        filled = np.resize(numbers, size).tolist()
        rows = np.stack([read(i) for i in filled]).astype(np.int32)
        if rows.shape[1] != context + 1:
            raise ValueError(f"read() gave {rows.shape[1]} tokens; expected {context + 1}")
        inputs, targets = rows[:, :-1], rows[:, -scored:]
        index, positions = (), np.arange(context)
        if locate is not None:
            index = (TokenIndex(*map(np.stack, zip(*map(locate, filled), strict=True))),)
            positions = index[0].positions
        if bos is not None:
            inputs = np.where(positions == 0, np.int32(bos), inputs)
        batch_nats, batch_hits = scorer(inputs, targets, *index)
        nats[numbers] = np.asarray(batch_nats)[: len(numbers)]
        hits[numbers] = np.asarray(batch_hits)[: len(numbers)]
    return nats, hits


def model_scorer(model: Transformer, mesh: Mesh | None = None) -> Scorer:
    """The scorer of a Transformer, see ``scorer_factory``."""
    graphdef, params, constants = split(model)
    return scorer_factory(graphdef, mesh)(params, constants)


def scorer_factory(graphdef: Any, mesh: Mesh | None = None) -> Callable[[Any, Any], Scorer]:
    """Makes scorers of one model with any arrays: one jitted forward pass for all of them.

    Only the scored positions are projected to the vocabulary, in pieces of at most
    ``LOGITS_IN_MEMORY`` logits, so a window costs memory for its hidden states, not ``T * V``.

    Args:
      graphdef: the model without its arrays.
      mesh: devices of all processes, over which the arrays lie. Rows and tokens are filled up to
        multiples of its axes, rows with copies and windows with padding after their end, which no
        token of theirs sees; the scores of both are left out.

    Returns:
      (params, constants) -> scorer: (tokens, targets, index=None) -> (nats, hits). Of whole windows
      ``tokens [B, T]`` it scores ``targets [B, S]``, what follows each of the last S tokens: nats
      ``[B, S]`` float32, and whether the most likely token is the target. ``index`` has positions
      and segments ``[B, T]``; None makes each window one segment with positions from 0, and is how
      a scorer that knows no others is called.
    """

    def score(
        length: int,
        params: Any,
        constants: Any,
        tokens: Array,
        targets: Array,
        index: TokenIndex | None,
    ) -> tuple[Array, Array]:
        model = merge(graphdef, params, constants)
        if index is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # [1, T]: for all rows
            index = TokenIndex(positions, (positions < length).astype(jnp.int32))
        hidden = model.hidden(tokens, index.positions, index.segments)
        scored = targets.shape[1]
        unembedding = model.unembedding_matrix()
        chunk = max(1, LOGITS_IN_MEMORY // (tokens.shape[0] * unembedding.shape[1]))
        return token_nats(hidden[:, -scored:], unembedding, targets, time_chunk=min(chunk, scored))

    if mesh is None:
        jitted = jax.jit(score, static_argnums=0)

        def on_one_device(arrays, tokens, targets, index=None):
            return jitted(tokens.shape[1], *arrays, tokens, targets, index)

        return lambda *arrays: partial(on_one_device, arrays)
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(score, static_argnums=0, out_shardings=(replicated, replicated))
    rows, columns = axis_size(mesh, "batch"), axis_size(mesh, "length")

    def on_mesh(
        arrays: tuple[Any, Any],
        tokens: np.ndarray,
        targets: np.ndarray,
        index: TokenIndex | None = None,
    ) -> tuple[Any, Any]:
        (count, length), scored = tokens.shape, targets.shape[1]
        after = -length % columns
        before = -(scored + after) % columns

        def pad(x: np.ndarray, *sides: int) -> Array:
            x = np.pad(x[np.resize(np.arange(count), count + -count % rows)], ((0, 0), sides))
            return device_put_sharded(x, batch_sharding(x, mesh))

        with jax.set_mesh(mesh):
            window = pad(tokens, 0, after), pad(targets, before, after)
            if index is not None:  # padding is in segment 0
                index = TokenIndex(*(pad(x, 0, after) for x in index))
            scores = sharded(length, *arrays, *window, index)
        # Left on the devices where one process has all of it, which may do something meanwhile.
        cut = slice(None, count), slice(before, before + scored)
        nats, hits = (x[cut] if x.is_fully_addressable else np.asarray(x)[cut] for x in scores)
        return nats, hits

    return lambda *arrays: partial(on_mesh, arrays)
