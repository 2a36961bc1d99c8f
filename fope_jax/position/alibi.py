"""ALiBi: a penalty on attention logits that grows linearly with distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    bias_of_heads,
)
from fope_jax.position.checks import as_tuple, check_finite
from fope_jax.position.relative_bias.base import relative_distance
from fope_jax.position.rotation import as_array
from fope_jax.typing import Array


def alibi_slopes(num_heads: int) -> np.ndarray:
    """One slope per head, a geometric sequence.

        m_n = 2 ** (-8 n / N),  n = 1 .. N     (N a power of two)

    For another N: the slopes of the largest power of two below it, then every second slope of the
    next power of two, as in the authors' code. Returns ``[N]`` float32, logits per token; raises
    ValueError if ``num_heads`` is not positive.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    Reference: Press et al. 2022, "Train Short, Test Long", Section 3.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: at least one head is needed")
    power = 2 ** int(math.log2(num_heads))

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    slopes = geometric(power)
    if power < num_heads:
        slopes = np.concatenate([slopes, geometric(2 * power)[0::2][: num_heads - power]])
    return slopes.astype(np.float32)


def alibi_bias(q_positions: Array, k_positions: Array, slopes: Array) -> Array:
    """The additive bias of a block of attention logits.

        bias[b, n, t, s] = -slopes[n] * |q_positions[b, t] - k_positions[b, s]|

    Takes positions ``[B or 1, T]`` and ``[B or 1, S]``, tokens, integers or float32, and slopes
    ``[N]``, logits per token. Returns ``[B, N, T, S]`` float32, 0 or less. Keys after the query are
    penalised like earlier ones (the authors' symmetric form). Raises TypeError for other dtypes of
    positions, ValueError for other shapes.

    >>> alibi_bias(np.array([[2]]), np.array([[0, 1, 2, 3]]), np.array([0.5])).tolist()
    [[[[-1.0, -0.5, -0.0, -0.5]]]]

    Reference: Press et al. 2022, "Train Short, Test Long", Section 3; the symmetric form in issue 5
    of github.com/ofirpress/attention_with_linear_biases.
    """
    slopes = as_array(slopes)
    if slopes.ndim != 1:
        raise ValueError(f"slopes {slopes.shape}: expected [N], one a head")
    return bias_of_heads(ALiBi(), {"slopes": slopes}, q_positions, k_positions)


@dataclass(frozen=True)
class ALiBi(PositionEmbedding):
    """Attention with linear biases: distant keys are penalised, each head at its own rate.

        bias[n, t, s] = -m_n |t - s|,  m_n = 2 ** (-8 n / N) for n = 1 .. N, see ``alibi_slopes``

    Knobs:
      slopes: one per query head, logits per token; None takes ``alibi_slopes(N)``, all zero is
        NoPE.

    Reference: Press et al. 2022, "Train Short, Test Long", Section 3.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; a penalty that grows with distance"

    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.slopes is not None:  # a list would make the method unhashable
            slopes = as_tuple("slopes", self.slopes, "numbers, one for each query head")
            object.__setattr__(self, "slopes", slopes)
            for index, slope in enumerate(self.slopes):
                check_finite(f"slopes[{index}]", slope, "a slope")

    def check(self, shape: ModelShape) -> None:
        if self.slopes is not None and len(self.slopes) != shape.num_heads:
            raise ValueError(
                f"slopes has {len(self.slopes)} entries: the model has {shape.num_heads} heads"
            )

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        slopes = alibi_slopes(shape.num_heads) if self.slopes is None else self.slopes
        size = (shape.num_layers, shape.num_heads)
        stacked = jnp.broadcast_to(jnp.asarray(slopes, jnp.float32), size)
        return PositionVariables(layer_constants={"slopes": stacked})

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return ("heads",)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        distance = jnp.abs(relative_distance(q_positions, k_positions)).astype(jnp.float32)
        return -variables["slopes"] * distance
