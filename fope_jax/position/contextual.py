"""CoPE: positions that count what the query looks for, not tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    Limits,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
)
from fope_jax.position.checks import check_spread
from fope_jax.typing import Array


def contextual_positions(logits: Array, max_position: int) -> Array:
    """How many of the keys from j to the query count, each by its gate.

        p[i, j] = min(sum_{k = j .. i} sigmoid(logits[i, k]), max_position - 1)

    Args:
      logits: ``[..., S]`` with all keys in the order of their positions; -inf where the query does
        not see the key, whose gate is then 0.
      max_position: positions there are embeddings for.

    >>> contextual_positions(jnp.array([0.0, jnp.inf, 0.0, -jnp.inf]), 8).tolist()
    [2.0, 1.5, 0.5, 0.0]

    Reference: Golovneva et al. 2024, "Contextual Position Encoding: Learning to Count What's
    Important", Eq. 3-4.
    """
    gates = jax.nn.sigmoid(logits.astype(jnp.float32))
    counted = jax.lax.cumsum(gates, axis=gates.ndim - 1, reverse=True)
    return jnp.minimum(counted, np.float32(max_position - 1))


def cope_bias(q: Array, logits: Array, position_table: Array) -> Array:
    """The bias of whole rows of scores from positions that depend on content.

        bias[i, j] = (1 - w) z[i, floor(p)] + w z[i, floor(p) + 1]
        z[i, m] = q_i . e_m,  p = p[i, j],  w = p - floor(p)

    Args:
      q: ``[B, T, N, H]``, unscaled: the factor 1 / sqrt(H) is on ``logits`` alone.
      logits: ``[B, N, T, S]``, scaled, with all keys in the order of their positions; -inf where
        the query does not see the key.
      position_table: e, ``[P, H]``, or ``[N, P, H]`` with one a head.

    Returns:
      ``[B, N, T, S]`` float32, finite everywhere, where the query does not see the key as well.

    Raises:
      ValueError: shapes do not fit each other.

    >>> q = jnp.ones((1, 1, 1, 2))
    >>> table = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    >>> cope_bias(q, jnp.array([0.0, jnp.inf, 0.0]).reshape(1, 1, 1, 3), table).tolist()
    [[[[3.0, 2.0, 0.5]]]]

    Reference: Golovneva et al. 2024, "Contextual Position Encoding: Learning to Count What's
    Important", Eq. 3-6 and the code in its appendix.
    """
    given = f"q {q.shape}, logits {logits.shape}, position_table {position_table.shape}"
    heads = position_table.shape[:-2]
    fits = q.ndim == logits.ndim == 4 and position_table.ndim in (2, 3)
    fits = fits and logits.shape[:3] == (q.shape[0], q.shape[2], q.shape[1])
    if not fits or position_table.shape[-1] != q.shape[-1] or heads not in ((), q.shape[2:3]):
        expected = "expected [B, T, N, H], [B, N, T, S] and [P, H] or [N, P, H]"
        raise ValueError(f"{given}: {expected}")
    size = position_table.shape[-2]
    heads = "nph" if position_table.ndim == 3 else "ph"
    q, table = q.astype(jnp.float32), position_table.astype(jnp.float32)
    scores = jnp.einsum(f"btnh,{heads}->bntp", q, table, precision="highest")
    positions = contextual_positions(logits, size)
    low = jax.lax.stop_gradient(jnp.floor(positions))
    share = positions - low
    low = low.astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    below, above = (jnp.take_along_axis(scores, at, axis=-1, mode="clip") for at in (low, high))
    return below + share * (above - below)


@dataclass(frozen=True)
class CoPE(PositionEmbedding):
    """Contextual position encoding: each query counts the keys that its gates let through.

        g[i, k] = sigmoid(q_i . k_k / sqrt(H)),  p[i, j] = sum_{k = j .. i} g[i, k]
        bias[i, j] = q_i . e[p[i, j]]

    The count goes from a key up to the query: attention must be causal. Every row of scores is
    needed whole, so attention cannot go block by block over keys. Weight decay pulls to NoPE.

    Knobs:
      max_position: position embeddings P; counts beyond P - 1 use the last one. Far less than the
        context is enough where gates are mostly closed, and the paper's choice.
      init_std: standard deviation of the normal draw; the authors' code starts at 0.
      share_heads: one table for all heads of a layer, as the authors' code. False trains one a
        head.

    Reference: Golovneva et al. 2024, "Contextual Position Encoding: Learning to Count What's
    Important", Eq. 3-6 and the code in its appendix.
    """

    kind: ClassVar[str] = "contextual"
    extends: ClassVar[str] = "yes; counts beyond max_position share one embedding"

    max_position: int = 64
    init_std: float = 0.0
    share_heads: bool = True

    def __post_init__(self) -> None:
        if self.max_position < 2:
            raise ValueError(
                f"max_position={self.max_position}: positions need 2 embeddings or more"
            )
        check_spread("init_std", self.init_std)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        heads = () if self.share_heads else (shape.num_heads,)
        size = (shape.num_layers, *heads, self.max_position, shape.head_dim)
        draw = jax.random.normal(key, size, jnp.float32)
        return PositionVariables(layer_params={"position_table": draw * np.float32(self.init_std)})

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return () if self.share_heads else ("heads",)

    @property
    def limits(self) -> Limits:
        return Limits(needs_causal_mask=True)

    def contextual_bias(self, variables: Variables, q: Array, logits: Array) -> Array:
        return cope_bias(q, logits, variables["position_table"])
