"""Sandwich: a bias that decays with distance as inner products of sinusoidal embeddings do."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position import PositionEmbedding, PositionVariables


@dataclass(frozen=True)
class Sandwich(PositionEmbedding):
    """bias[i, j] = r_n (sum_{d=1}^{W/2} cos((i - j) / 10000^(2 d / W)) - W / 2),  r_n = 8 n / N

    n = 1 .. N counts the heads.

    Knobs:
      width: W, dimensions of the sinusoidal embedding, even.

    Reference: Chi et al. 2023, "Dissecting Transformer Length Extrapolation via the Lens of
    Receptive Field Analysis", Section 5.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; a logarithmic decay"

    width: int = 16

    def __post_init__(self):
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width={self.width}: expected an even number above 0")

    def init(self, key, shape):
        ratios = 8.0 * jnp.arange(1, shape.num_heads + 1) / shape.num_heads
        stacked = jnp.broadcast_to(ratios, (shape.num_layers, shape.num_heads))
        return PositionVariables(layer_constants={"ratios": stacked})

    def variable_axes(self, name):
        return ("heads",)

    def bias(self, variables, q_positions, k_positions):
        distance = (q_positions - k_positions).astype(jnp.float32)
        total = 0.0
        for d in range(1, self.width // 2 + 1):
            total += jnp.cos(distance * np.float32(10_000.0 ** (-2 * d / self.width)))
        return variables["ratios"] * (total - self.width / 2)
