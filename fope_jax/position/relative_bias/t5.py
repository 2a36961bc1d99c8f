"""T5's bias: a trained number for each head and distance bucket."""

from __future__ import annotations

import bisect
import dataclasses
import math
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
    bias_of_heads,
    is_in_kernel,
)
from fope_jax.position.checks import check_spread, check_switches, check_tokens, check_whole
from fope_jax.position.relative_bias.base import draw_params, relative_distance
from fope_jax.position.rotation import token_positions
from fope_jax.typing import Array


def _check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    check_whole("num_buckets", num_buckets, 2, "buckets of distance")
    check_tokens("max_distance", max_distance, "the distance of the last bucket")
    if bidirectional and (num_buckets < 4 or num_buckets % 2):
        raise ValueError(f"num_buckets={num_buckets}: expected an even number, 4 or more")
    exact = num_buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(
            f"max_distance={max_distance}: distances below {exact} have a bucket each with "
            f"num_buckets={num_buckets}; expected more than {exact}"
        )


def _wide_bucket_edges(num_buckets: int, max_distance: int) -> np.ndarray:
    """The least distance of each bucket that holds several, ``[num_buckets - exact - 1]`` int32."""
    exact = num_buckets // 2
    wide = num_buckets - exact

    def wide_bucket(distance: int) -> np.float32:
        # Platforms differ in the last bit of a logarithm, which decides at whole numbers: compute
        # in float64 on the host and round to float32.
        slot = np.log(distance / exact) / math.log(max_distance / exact) * wide
        return np.float32(slot)

    distances = range(exact, max_distance + 1)
    edges = [bisect.bisect_left(distances, i, key=wide_bucket) for i in range(1, wide)]
    return np.array([distances[edge] for edge in edges], np.int32)


def t5_buckets(
    relative_position: Array,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Array:
    """The bucket of each relative position: one per distance when near, logarithmic when far.

        bucket = d                                                                for d <  e
        bucket = min(n - 1, e + floor((n - e) log(d / e) / log(max_distance / e)))  for d >= e

    with n = ``num_buckets`` and e = n / 2. Causal: d is the distance to an earlier key, and later
    keys are in bucket 0. Bidirectional: n is halved, d is the absolute distance, and later keys use
    the second half of the buckets.

    Args:
      relative_position: integers of any shape, tokens: key position minus query position.
      num_buckets: 2 or more, in total; 4 or more and even if bidirectional.
      max_distance: all keys from this distance on share the last bucket; tokens.
      bidirectional: distinguish keys after the query.

    Returns int32 in ``[0, num_buckets)``, identical on every platform. Raises TypeError if
    positions are not integers, ValueError for too few buckets or if ``max_distance`` is within the
    exact ones.

    >>> t5_buckets(np.array([0, -1, -15, -16, -127, -128, 5])).tolist()
    [0, 1, 15, 16, 31, 31, 0]

    Reference: Raffel et al. 2020 (T5), Section 2.1, and its code.
    """
    _check_buckets(num_buckets, max_distance, bidirectional)
    before = -token_positions(relative_position)
    offset = jnp.zeros_like(before)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(before < 0, np.int32(num_buckets), offset)
        before = jnp.abs(before)
    distance = jnp.maximum(before, 0)
    exact = num_buckets // 2
    edges = _wide_bucket_edges(num_buckets, max_distance).reshape((1,) * distance.ndim + (-1,))
    passed = jnp.sum(distance[..., None] >= edges, axis=-1, dtype=jnp.int32)
    return offset + jnp.minimum(distance, exact) + passed


def t5_bias(
    q_positions: Array,
    k_positions: Array,
    table: Array,
    *,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Array:
    """T5's bias for a block of attention logits.

        bias[b, n, t, s] = table[bucket(q_positions[b, t] - k_positions[b, s]), n]

    Takes integer positions ``[B or 1, T]`` and ``[B or 1, S]``, tokens, and logits
    ``[num_buckets, N]``; returns ``[B, N, T, S]`` float32. Raises TypeError if positions are not
    integers, ValueError for other shapes or as ``t5_buckets``.

    >>> table = np.array([[0.5], [0.25], [0.125], [0.0]])
    >>> t5_bias(np.array([[9]]), np.array([[0, 7, 8, 9]]), table, max_distance=8).tolist()
    [[[[0.0, 0.125, 0.25, 0.5]]]]

    Reference: Raffel et al. 2020 (T5), Section 2.1.
    """
    method = T5Bias(len(table), max_distance, bidirectional=bidirectional)
    return bias_of_heads(method, {"bias_table": table}, q_positions, k_positions)


@dataclass(frozen=True)
class T5Bias(PositionEmbedding):
    """A trained bias for each head and distance bucket; buckets widen with distance.

        bias[n, t, s] = table[bucket(t - s), n]

    Logits keep the scale 1 / sqrt(H), which T5 leaves out. Weight decay pulls to NoPE.

    Knobs:
      num_buckets: buckets of distance, half of them one token wide; T5 uses 32.
      max_distance: all keys from this distance on share the last bucket, tokens; T5 uses 128.
      share_layers: one table for all layers, as in T5. False trains one per layer.
      init_std: standard deviation of the uniform draw, logits. None is T5X's
        ``sqrt(2 / (num_buckets + N))``; Hugging Face uses ``1 / sqrt(D)``.
      bidirectional: half of the buckets for keys after the query, for attention without a causal
        mask.

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer", Section 2.1; initial values as in T5X.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; beyond max_distance one bucket"

    num_buckets: int = 32
    max_distance: int = 128
    share_layers: bool = True
    init_std: float | None = None
    bidirectional: bool = dataclasses.field(default=False, metadata={"added_later": True})

    def __post_init__(self) -> None:
        check_switches(self)
        _check_buckets(self.num_buckets, self.max_distance, self.bidirectional)
        if self.init_std is not None:
            check_spread("init_std", self.init_std)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        size = (self.num_buckets, shape.num_heads)
        std = math.sqrt(2 / sum(size)) if self.init_std is None else self.init_std

        widest = np.float32(math.sqrt(3) * std)

        def draw(key: Array) -> Variables:
            return {"bias_table": jax.random.uniform(key, size, jnp.float32, -1.0, 1.0) * widest}

        return draw_params(draw, key, shape, self.share_layers)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return (None, "heads")

    @property
    def limits(self) -> Limits:
        return Limits(needs_causal_mask=not self.bidirectional)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        distance, table = relative_distance(q_positions, k_positions), variables["bias_table"]
        if not is_in_kernel(table):
            buckets = t5_buckets(
                -distance,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
                bidirectional=self.bidirectional,
            )
            return jnp.take(table, buckets, mode="clip")
        if not self.bidirectional:
            return self._select(distance, table)
        half = self.num_buckets // 2
        before, after = self._select(distance, table[:half]), self._select(-distance, table[half:])
        return jnp.where(distance < 0, after, before)

    def _select(self, distance: Array, values: tuple[Array, ...]) -> Array:
        """The value of each distance's bucket, by comparisons instead of indexing."""
        exact = range(1, len(values) // 2 + 1)
        edges = (*exact, *map(int, _wide_bucket_edges(len(values), self.max_distance)))
        bias = jnp.full(distance.shape, values[0], jnp.float32)
        for edge, value in zip(edges, values[1:], strict=True):
            bias = jnp.where(distance >= edge, value, bias)
        return bias
