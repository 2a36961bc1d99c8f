"""FIRE: a learned function of distance relative to the query's position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    bias_of_heads,
    is_in_kernel,
)
from fope_jax.position.checks import check_above_zero, check_switches, check_whole
from fope_jax.position.relative_bias.base import draw_params, relative_distance
from fope_jax.position.rotation import position_values
from fope_jax.typing import Array

FIRE_EPSILON = 1e-6


def fire_distance(q_positions: Array, k_positions: Array, c: Array, threshold: Array) -> Array:
    """Distance as a share of the query's position, both on a logarithmic scale.

        psi(|i - j|) / (psi(max(threshold, i, j)) + 1e-6),  psi(x) = log(|c| x + 1)

    Positions i and j broadcast, tokens since the start of the segment, integers or float32, else
    TypeError. ``c`` is per token, of any sign. Below ``threshold`` tokens the share depends on
    distance only. In the paper j <= i; dividing by the later position keeps the share in [0, 1] and
    symmetric.

    >>> share = fire_distance(np.array([[31], [1023]]), np.array([[0, 31]]), 1.0, 1023.0)
    >>> np.asarray(share, np.float64).round(6).tolist()
    [[0.5, 0.0], [1.0, 0.995565]]

    Reference: Li et al. 2023 (FIRE), Section 3.
    """
    distance = relative_distance(q_positions, k_positions)
    i, j = position_values(q_positions), position_values(k_positions)
    threshold, c = jnp.asarray(threshold, jnp.float32), jnp.asarray(c, jnp.float32)
    rate = jnp.abs(c)

    def longest(position: Array) -> Array:
        return jnp.log1p(rate * jnp.maximum(position, threshold))

    psi = jnp.log1p(rate * jnp.abs(distance).astype(jnp.float32))
    return psi / (jnp.where(distance < 0, longest(j), longest(i)) + FIRE_EPSILON)


def fire_bias(
    q_positions: Array,
    k_positions: Array,
    *,
    c: Array,
    threshold: Array,
    hidden_weight: Array,
    hidden_bias: Array,
    out_weight: Array,
    out_bias: Array,
) -> Array:
    """A small network applied to distance as a share of the query's position.

        bias[n, t, s] = f_n(share[t, s]),  f(x) = relu(x w1 + b1) w2 + b2

    Args:
      q_positions, k_positions: ``[B or 1, T]`` and ``[B or 1, S]``, tokens, integers or float32.
      c, threshold: numbers, see ``fire_distance``.
      hidden_weight, hidden_bias: w1 and b1, ``[width]``.
      out_weight: w2, ``[width, N]``, logits.
      out_bias: b2, ``[N]``, logits; constant over keys, so the softmax ignores it.

    Returns ``[B, N, T, S]`` float32. Raises TypeError for other dtypes of positions, ValueError for
    other shapes.

    >>> one = np.ones(1, np.float32)
    >>> fire_bias(
    ...     np.array([[4]]), np.array([[0, 4]]), c=1.0, threshold=2.0, hidden_weight=one,
    ...     hidden_bias=0.5 * one, out_weight=-2 * one[:, None], out_bias=one,
    ... ).round(4).tolist()
    [[[[-2.0, 0.0]]]]

    Reference: Li et al. 2023 (FIRE), Section 3 and the code in its appendix.
    """
    network = {"hidden_weight": hidden_weight, "hidden_bias": hidden_bias}
    network |= {"out_weight": out_weight, "out_bias": out_bias}
    variables = {"c": c, "length_factor": threshold} | network
    return bias_of_heads(FIRE(init_length=1.0), variables, q_positions, k_positions)


@dataclass(frozen=True)
class FIRE(PositionEmbedding):
    """A learned function of distance over position, so that longer inputs stay in its domain.

        bias[n, i, j] = f_n(psi(i - j) / psi(max(L, i))),  psi(x) = log(|c| x + 1)

    f is a network with one hidden layer, initialised uniform within 1 / sqrt(inputs of the layer).
    c and the threshold L, as a multiple of ``init_length``, are learned too. Queries below L see
    distance only, later ones its share of their position. Weight decay pulls f to 0 (NoPE), c to 0
    (psi linear) and L to 0 (every query interpolates).

    Knobs:
      mlp_width: hidden width of f; the paper uses 32.
      init_c: initial c, per token; the paper's 0.1.
      init_length: initial threshold L, tokens: the paper's 512, times a learned factor from 1.
      share_layers: one f, c and L for all layers (the paper's FIRE-S); False trains one per layer.

    Reference: Li et al. 2023, "Functional Interpolation for Relative Positions Improves Long
    Context Transformers", Section 3 and the code in its appendix.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; distances as a share of the position"

    mlp_width: int = 32
    init_c: float = 0.1
    init_length: float = 512.0
    share_layers: bool = False

    def __post_init__(self) -> None:
        check_switches(self)
        check_whole("mlp_width", self.mlp_width, 1, "hidden units of f")
        for name in ("init_c", "init_length"):
            check_above_zero(name, getattr(self, name), "it")

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        width = self.mlp_width

        def draw(key: Array) -> Variables:
            keys = jax.random.split(key, 4)

            def uniform(index: int, size: tuple[int, ...], inputs: int) -> Array:
                bound = 1 / math.sqrt(inputs)
                return jax.random.uniform(keys[index], size, jnp.float32, -bound, bound)

            return {
                "c": jnp.float32(self.init_c),
                "length_factor": jnp.float32(1.0),
                "hidden_weight": uniform(0, (width,), 1),
                "hidden_bias": uniform(1, (width,), 1),
                "out_weight": uniform(2, (width, shape.num_heads), width),
                "out_bias": uniform(3, (shape.num_heads,), width),
            }

        return draw_params(draw, key, shape, self.share_layers)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return {"out_weight": (None, "heads"), "out_bias": ("heads",)}.get(name, ())

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        threshold = jnp.abs(variables["length_factor"] * np.float32(self.init_length))
        share = fire_distance(q_positions, k_positions, variables["c"], threshold)
        network = (variables[name] for name in ("hidden_weight", "hidden_bias", "out_weight"))
        return _network(share, *network) + variables["out_bias"]


def _network(share: Array, hidden_weight: Any, hidden_bias: Any, out_weight: Any) -> Array:
    """``relu(share w1 + b1) w2`` of one head, weights ``[width]``."""
    if is_in_kernel(hidden_weight):
        out = jnp.zeros(share.shape, jnp.float32)
        for weight, offset, factor in zip(hidden_weight, hidden_bias, out_weight, strict=True):
            out += factor * jnp.maximum(share * weight + offset, 0.0)
        return out
    lanes = (1,) * share.ndim + (-1,)
    hidden = share[..., None] * hidden_weight.reshape(lanes) + hidden_bias.reshape(lanes)
    # TPU's default precision would round the hidden layer to 8 bits.
    return jnp.einsum("...w,w->...", jax.nn.relu(hidden), out_weight, precision="highest")
