"""Nats of chosen targets: the interface between protocols and models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fope_jax.data.random_positions import PositionDraw
from fope_jax.evaluate.progress import Progress, no_progress
from fope_jax.model.losses import token_nats
from fope_jax.model.masks import TokenIndex
from fope_jax.model.sharding import axis_size, batch_sharding, device_put_sharded
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.typing import Array

LOGITS_IN_MEMORY = 2**24  # 64 MB of float32, less than the weights of most models

Scorer = Callable[..., tuple[Any, Any]]  # see ``scorer_factory``


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
    """Scores the last S = ``scored`` targets of W = ``count`` windows, in batches of one shape.

    Args:
      read: window number -> ``[context + 1]`` tokens.
      batch_tokens: most tokens in a batch; one window is always allowed.
      progress, desc: called as ``progress(batches, desc=desc)``, e.g. ``tqdm``.
      locate: window number -> positions and segments ``[context]``; None is one segment.
      bos: token that replaces the input at each position 0; targets do not change.

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


def at_random_positions(scorer: Scorer, draw: PositionDraw) -> Scorer:
    """``scorer`` at positions drawn for each row from its tokens, whatever batch it is in."""

    def score(tokens: Array, targets: Array, index: TokenIndex | None = None) -> tuple[Any, Any]:
        rows = np.asarray(tokens)
        segments = np.ones(rows.shape, np.int32) if index is None else np.asarray(index.segments)
        positions = positions_of_rows(draw, rows, segments)
        return scorer(tokens, targets, TokenIndex(positions, segments))

    return score


def positions_of_rows(draw: PositionDraw, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Positions drawn for ``segments [B, S]``, for each row from its tokens ``rows [B, T]``."""
    keys = [np.frombuffer(sha256(row.tobytes()).digest(), "<u4").tolist() for row in rows]
    return np.concatenate(
        [draw.positions(one[None], key) for one, key in zip(segments, keys, strict=True)]
    )


def model_scorer(model: Transformer, mesh: Mesh | None = None) -> Scorer:
    """The scorer of a model, see ``scorer_factory``."""
    graphdef, params, constants = split(model)
    return scorer_factory(graphdef, mesh)(params, constants)


def scorer_factory(graphdef: Any, mesh: Mesh | None = None) -> Callable[[Any, Any], Scorer]:
    """Makes scorers of one model for any arrays, with one jitted forward pass.

    Only scored positions are projected to the vocabulary, at most ``LOGITS_IN_MEMORY`` logits at
    once: logits of a whole window would take T * V. With ``mesh``, over which arrays are sharded,
    rows and tokens are padded to multiples of its axes.

    Returns:
      ``(params, constants) -> scorer``. A scorer maps ``tokens [B, T]``, ``targets [B, S]`` (after
      the last S tokens) and ``index`` to nats ``[B, S]`` float32 and hits ``[B, S]``, whether the
      target is the most likely token. ``index`` is positions and segments ``[B, T]``; None is one
      segment.
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
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # [1, T]
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
        # A single process keeps scores on the device: np.asarray would block until they are ready.
        cut = slice(None, count), slice(before, before + scored)
        nats, hits = (x[cut] if x.is_fully_addressable else np.asarray(x)[cut] for x in scores)
        return nats, hits

    return lambda *arrays: partial(on_mesh, arrays)
