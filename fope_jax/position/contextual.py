"""CoPE: positions that count the tokens that a query selects."""

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
from fope_jax.position.checks import check_spread, check_switches, check_whole
from fope_jax.typing import Array


def contextual_positions(logits: Array, max_position: int) -> Array:
    """How many keys from j up to the query count, each weighted by its gate.

        p[i, j] = min(sum_{k = j .. i} sigmoid(logits[i, k]), max_position - 1)

    ``logits [..., S]`` are in order of the keys' positions; -inf where masked closes the gate.

    >>> contextual_positions(jnp.array([0.0, jnp.inf, 0.0, -jnp.inf]), 8).tolist()
    [2.0, 1.5, 0.5, 0.0]

    Reference: Golovneva et al. 2024, "Contextual Position Encoding: Learning to Count What's
    Important", Eq. 3-4.
    """
    gates = jax.nn.sigmoid(logits.astype(jnp.float32))
    counted = jax.lax.cumsum(gates, axis=gates.ndim - 1, reverse=True)
    return jnp.minimum(counted, np.float32(max_position - 1))


def cope_bias(q: Array, logits: Array, position_table: Array) -> Array:
    """CoPE's bias of whole rows of scores.

        bias[i, j] = (1 - w) z[i, floor(p)] + w z[i, floor(p) + 1]
        z[i, m] = q_i . e_m,  p = p[i, j],  w = p - floor(p)

    Args:
      q: ``[B, T, N, H]``, not scaled; only ``logits`` carry 1 / sqrt(H).
      logits: ``[B, N, T, S]``, scaled, keys in order of position; -inf where masked.
      position_table: e, ``[P, H]``, or ``[N, P, H]`` for one per head.

    Returns ``[B, N, T, S]`` float32, finite also where masked. Raises ValueError if shapes do not
    fit.

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
    """Contextual position encoding: each query counts the keys that its gates select.

        g[i, k] = sigmoid(q_i . k_k / sqrt(H)),  p[i, j] = sum_{k = j .. i} g[i, k]
        bias[i, j] = q_i . e[p[i, j]]

    Counts run from a key up to the query, so attention must be causal. Each row of scores is needed
    whole, so attention cannot process keys in blocks. Weight decay pulls to NoPE.

    Knobs:
      max_position: position embeddings P; larger counts use the last one. Far fewer than the
        context suffice if most gates are nearly closed, as in the paper.
      init_std: standard deviation of the normal draw; the authors' code starts at 0.
      share_heads: one table for all heads of a layer, as in the authors' code; False: one per head.

    Reference: Golovneva et al. 2024, "Contextual Position Encoding: Learning to Count What's
    Important", Eq. 3-6 and the code in its appendix.
    """

    kind: ClassVar[str] = "contextual"
    extends: ClassVar[str] = "yes; counts beyond max_position share one embedding"

    max_position: int = 64
    init_std: float = 0.0
    share_heads: bool = True

    def __post_init__(self) -> None:
        check_switches(self)
        check_whole("max_position", self.max_position, 2, "position embeddings")
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
