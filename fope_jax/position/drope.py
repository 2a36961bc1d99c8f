"""DroPE: a model that was trained with positions and goes on without them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import Layer, Limits, PositionEmbedding
from fope_jax.position.checks import check_at_least, check_tokens
from fope_jax.position.rotation import position_values
from fope_jax.typing import Array


def drope_scale(length: Array, training_length: int, coefficient: float) -> Array:
    """The factor on the logits at ``length`` tokens, 1 up to the trained length.

        beta(n) = 1 + c ln(max(1, n / L))

    Args:
      length: n, tokens.
      training_length: L, tokens.
      coefficient: c.

    >>> np.asarray(drope_scale(np.array([256, 512, 4096]), 512, coefficient=0.103))
    array([1.       , 1.       , 1.2141825], dtype=float32)

    Reference: Gelberg et al. 2025 (DroPE), Appendix C.2.
    """
    ratio = jnp.asarray(length).astype(jnp.float32) / np.float32(training_length)
    return 1 + np.float32(coefficient) * jnp.log(jnp.maximum(ratio, 1))


@dataclass(frozen=True)
class DroPE(PositionEmbedding):
    """No positions after a training with them; attention is sharper beyond the trained length.

        logits[i, j] = beta(n) q_i.k_j / sqrt(H),  beta(n) = 1 + c ln(max(1, n / L))

    A model trained with RoPE or FoPE loses its rotations in all layers and trains for a short while
    at the length that it was trained on (``fope extend --method drope``), where beta is 1: the
    causal mask is its only source of order, as in NoPE. Nothing is trained beyond that length.

    The paper has one factor for all queries of an evaluation, of its length: state ``length``. Its
    c was fitted on held-out text: 0.412 for a model of 494 M parameters trained on 16 B tokens,
    0.103 for SmolLM-360M. It trains for 0.5% to 12.5% of the tokens before, at a rate of 3e-4
    (higher ones needed a norm of q and k).

    Knobs:
      training_length: L, tokens.
      coefficient: c; 0 is NoPE.
      length: n, tokens, for all queries, as in the paper. None counts the keys of each query, so
        that no length is stated before: the last query gets the paper's factor.

    Reference: Gelberg et al. 2025, "Extending the Context of Pretrained LLMs by Dropping Their
    Positional Embeddings", Section 5 and Appendix C.2.
    """

    kind: ClassVar[str] = "none"
    extends: ClassVar[str] = "after training with positions, then a little without"

    training_length: int
    coefficient: float = 0.412
    length: int | None = None

    def __post_init__(self) -> None:
        check_tokens("training_length", self.training_length, "the trained length in tokens")
        check_at_least("coefficient", self.coefficient, 0, "the growth of the logits with ln n")
        if self.length is not None:
            check_tokens("length", self.length, "the tokens of an evaluation")

    @property
    def limits(self) -> Limits:
        # A query's keys are counted by its position, which is wrong without a causal mask.
        return Limits(needs_causal_mask=self.length is None)

    def layers(self) -> tuple[Layer, ...]:
        return (Layer(self, logit_scale=self.scale),)

    def scale(self, positions: Array) -> Array:
        """The factor ``[1 or B, 1 or T]`` on the logits of queries at ``positions [B, T]``."""
        if self.length is None:
            return drope_scale(
                position_values(positions) + 1, self.training_length, self.coefficient
            )
        ratio = max(1.0, self.length / self.training_length)
        return jnp.full((1, 1), 1 + self.coefficient * math.log(ratio), jnp.float32)
