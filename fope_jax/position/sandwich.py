"""Sandwich: a bias that falls with the logarithm of distance, as sinusoidal embeddings do."""

from __future__ import annotations

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
from fope_jax.position.checks import check_whole
from fope_jax.position.relative_bias.base import relative_distance
from fope_jax.position.rotation import as_array, phase_of_one
from fope_jax.typing import Array


def sandwich_ratios(num_heads: int) -> np.ndarray:
    """The compression of each head, by which its bias is divided.

        r_n = 8 n / N,  n = 1 .. N

    Returns ``[N]`` float32; raises ValueError if ``num_heads`` is not positive.

    >>> sandwich_ratios(4).tolist()
    [2.0, 4.0, 6.0, 8.0]

    Reference: Chi et al. 2023 (Sandwich), after ALiBi's slopes.
    """
    check_whole("num_heads", num_heads, 1, "heads")
    return (8.0 * np.arange(1, num_heads + 1) / num_heads).astype(np.float32)


def sandwich_bias(q_positions: Array, k_positions: Array, ratios: Array, width: int) -> Array:
    """The additive bias of a block of attention logits; see ``Sandwich``.

    Takes integer positions ``[B or 1, T]`` and ``[B or 1, S]``, tokens, ratios ``[N]``, and W, the
    even width. Returns ``[B, N, T, S]`` float32, 0 or less. Raises TypeError if
    positions are not integers, ValueError for other shapes.

    >>> keys = np.array([[0, 90, 99, 100]])
    >>> bias = sandwich_bias(np.array([[100]]), keys, np.array([2.0]), width=16)
    >>> [f"{value:.2f}" for value in bias[0, 0, 0]]
    ['-2.19', '-1.26', '-0.03', '0.00']

    Reference: Chi et al. 2023 (Sandwich).
    """
    ratios = as_array(ratios)
    if ratios.ndim != 1:
        raise ValueError(f"ratios {ratios.shape}: expected [N], one a head")
    return bias_of_heads(Sandwich(width), {"ratios": ratios}, q_positions, k_positions)


@dataclass(frozen=True)
class Sandwich(PositionEmbedding):
    """The inner product of two sinusoidal position embeddings as a bias; nothing is trained.

        bias[n, t, s] = (sum_{m=1}^{W/2} cos(w_m (t - s)) - W/2) / r_n
        w_m = 10000 ** (-2 m / W),  r_n = 8 n / N

    From one frequency's period to the next the sum falls by about 1, so that the bias follows the
    logarithm of distance, with waves, as KERPLE's and T5's do once trained. Taking off W/2 changes
    no attention; it makes the bias 0 at distance 0.

    Knobs:
      width: W, dimensions of the sinusoidal embedding, even.

    Reference: Chi et al. 2023, "Dissecting Transformer Length Extrapolation via the Lens of
    Receptive Field Analysis"; constants as in NVIDIA NeMo.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; a penalty that grows with the logarithm of distance"

    width: int = 128

    def __post_init__(self) -> None:
        check_whole("width", self.width, 2, "dimensions of the sinusoidal embedding")
        if self.width % 2:
            raise ValueError(f"width={self.width}: it must be even, sines and cosines are pairs")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """``[W/2]`` radians per token, whatever the head's size."""
        return 10_000.0 ** (-2.0 * np.arange(1, self.width // 2 + 1) / self.width)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        size = (shape.num_layers, shape.num_heads)
        ratios = jnp.asarray(sandwich_ratios(shape.num_heads))
        return PositionVariables(layer_constants={"ratios": jnp.broadcast_to(ratios, size)})

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return ("heads",)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        distance = relative_distance(q_positions, k_positions)
        total = jnp.full(distance.shape, -self.width / 2, jnp.float32)
        for frequency in self.frequencies(0):  # one number at a time: the TPU kernel has no vectors
            total += jnp.cos(phase_of_one(distance, float(frequency)))
        return total / variables["ratios"]
