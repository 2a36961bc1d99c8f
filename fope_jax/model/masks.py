"""Which keys a query sees, for tokens and for blocks of them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from fope_jax.typing import Array


class TokenIndex(NamedTuple):
    """Positions and segments (0 is padding), int32 ``[..., B, T]``; B may be 1 for all rows."""

    positions: Array
    segments: Array


def attention_mask(
    q_index: TokenIndex, k_index: TokenIndex, window: int | None = None, chunk: int | None = None
) -> Array:
    """Whether each query ``[B, t]`` sees each key ``[B, s]``: ``[B, t, s]`` bool; B may be 1."""
    q_positions, k_positions = q_index.positions[:, :, None], k_index.positions[:, None, :]
    mask = k_positions <= q_positions
    mask &= k_index.segments[:, None, :] == q_index.segments[:, :, None]
    mask &= (q_index.segments != 0)[:, :, None]
    if window is not None:
        mask &= q_positions - k_positions < window
    if chunk is not None:
        mask &= q_positions // chunk == k_positions // chunk
    return mask


def visible_key_blocks(
    q_index: TokenIndex, k_index: TokenIndex, window: int | None = None, chunk: int | None = None
) -> tuple[Array, Array]:
    """For Q blocks of queries ``[Q, B, t]`` and P of keys ``[P, B, s]``, the key blocks to visit.

    Returns int32 ``order [Q, P]``, key blocks with those to visit first, and their ``count [Q]``.
    """
    mask = jnp.any(visible_block_mask(q_index, k_index, window, chunk), axis=-1)
    order = jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(mask, axis=-1, dtype=jnp.int32)


def visible_block_mask(
    q_index: TokenIndex, k_index: TokenIndex, window: int | None = None, chunk: int | None = None
) -> Array:
    """Whether a block of queries has to visit a block of keys: ``[Q, P, B]`` bool.

    A block of keys is skipped if its first (segment, position) comes after the last query, or its
    last segment before the first query's; with a window or chunk also if its last position in the
    first query's segment is too far before. No visible pair is skipped, whatever the stored order.
    """
    q_first, q_first_position, q_last, q_last_position = (
        x[:, None] for x in _first_and_last(q_index)
    )
    k_first, k_first_position, k_last, k_last_position = (x[None] for x in _first_and_last(k_index))
    is_after = (k_first > q_last) | ((k_first == q_last) & (k_first_position > q_last_position))
    is_visited = ~is_after & (k_last >= q_first)
    is_before = k_last == q_first  # then no key is in a later segment
    if window is not None:
        is_visited &= ~(is_before & (q_first_position - k_last_position >= window))
    if chunk is not None:
        is_visited &= ~(is_before & (q_first_position // chunk > k_last_position // chunk))
    return is_visited


def _first_and_last(index: TokenIndex) -> tuple[Array, Array, Array, Array]:
    """First and last (segment, position) of each block and row, ignoring padding: 4 * [Q, B]."""
    positions, segments = index
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(segments == 0, none, segments), axis=-1)
    last = jnp.max(segments, axis=-1)
    at_first = jnp.where(segments == first[..., None], positions, none)
    at_last = jnp.where(segments == last[..., None], positions, -none)
    return first, jnp.min(at_first, axis=-1), last, jnp.max(at_last, axis=-1)
