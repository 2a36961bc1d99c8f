"""KERPLE: a penalty on distance whose shape each head learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fope_jax.position.base import (
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    block_positions,
)
from fope_jax.position.checks import check_choice
from fope_jax.position.relative_bias.base import by_head, relative_distance
from fope_jax.typing import Array

KERPLE_FORMS = ("log", "power")
KERPLE_LEAST = 1e-2  # the authors' lower bound of both parameters
KERPLE_LARGEST_POWER = 2.0  # beyond it the kernel is not conditionally positive definite


def clamp_value(x: Array, least: float, most: float = math.inf) -> Array:
    """``x`` within bounds, with the gradient of ``x`` itself.

    The gradient of a plain clamp is 0 beyond a bound, where a parameter would be stuck for good.

    >>> clamp_value(jnp.array([-1.0, 0.5, 3.0]), 0.0, 2.0).tolist()
    [0.0, 0.5, 2.0]
    >>> jax.grad(lambda x: 7.0 * clamp_value(x, 0.0))(-1.0).item()
    7.0
    """
    bounded = jnp.clip(x, least, most)
    return jax.lax.stop_gradient(bounded) + (x - jax.lax.stop_gradient(x))


def kerple_log_bias(q_positions: Array, k_positions: Array, r1: Array, r2: Array) -> Array:
    """A penalty that grows with the logarithm of distance.

        bias[b, n, t, s] = -r1[n] * log(1 + r2[n] * |q_positions[b, t] - k_positions[b, s]|)

    Args:
      q_positions, k_positions: integers ``[B or 1, T]`` and ``[B or 1, S]``, tokens.
      r1: ``[N]`` above 0, logits.
      r2: ``[N]`` above 0, per token.

    Returns:
      ``[B, N, T, S]`` float32.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> r1 = jnp.full(1, 1 / jnp.log(2))
    >>> kerple_log_bias(jnp.array([[3]]), jnp.array([[3, 2, 0]]), r1, jnp.ones(1)).tolist()
    [[[[-0.0, -1.0, -2.0]]]]

    Reference: Chi et al. 2022, "KERPLE", Section 4, the logarithmic variant.
    """
    distance = relative_distance(*block_positions(q_positions, k_positions))[:, None]
    return _log_penalty(distance, by_head(r1), by_head(r2))


def _log_penalty(distance: Array, r1: Array, r2: Array) -> Array:
    return -r1 * jnp.log1p(r2 * jnp.abs(distance).astype(jnp.float32))


def kerple_power_bias(q_positions: Array, k_positions: Array, r1: Array, r2: Array) -> Array:
    """A penalty that grows with a power of distance; with exponent 1 it is ALiBi's.

        bias[b, n, t, s] = -r1[n] * |q_positions[b, t] - k_positions[b, s]| ** r2[n]

    Args:
      q_positions, k_positions: integers ``[B or 1, T]`` and ``[B or 1, S]``, tokens.
      r1: ``[N]`` above 0, logits.
      r2: ``[N]`` above 0, at most 2.

    Returns:
      ``[B, N, T, S]`` float32.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> half = jnp.full(1, 0.5)
    >>> kerple_power_bias(jnp.array([[9]]), jnp.array([[9, 5, 0]]), jnp.ones(1), half).tolist()
    [[[[-0.0, -2.0, -3.0]]]]

    Reference: Chi et al. 2022, "KERPLE", Section 4, the power variant.
    """
    distance = relative_distance(*block_positions(q_positions, k_positions))[:, None]
    return _power_penalty(distance, by_head(r1), by_head(r2))


def _power_penalty(distance: Array, r1: Array, r2: Array) -> Array:
    distance = jnp.abs(distance).astype(jnp.float32)
    # The gradient of a power has a logarithm of the distance, at distance 0 infinite times 0.
    powers = jnp.power(jnp.maximum(distance, 1.0), r2)
    return -r1 * jnp.where(distance > 0, powers, 0.0)


@dataclass(frozen=True)
class Kerple(PositionEmbedding):
    """A penalty on distance that each head of each layer learns the shape of.

        log:    bias[n, t, s] = -r1[n] * log(1 + r2[n] * |t - s|)
        power:  bias[n, t, s] = -r1[n] * |t - s| ** r2[n]

    Both parameters act as 0.01 where they are less, the exponent as 2 where it is more; the
    gradient passes the bound (``clamp_value``). Weight decay pulls to a nearly flat bias. Initial
    values and bounds are the authors': uniform, ``log`` r1 in [0, 2) and r2 in [0, 1), ``power``
    r1 in [0, 1) and r2 in [0, 2).

    Knobs:
      form: ``log`` or ``power``. The paper finds that ``log`` extends better.

    Reference: Chi et al. 2022, "KERPLE: Kernelized Relative Positional Embedding for Length
    Extrapolation", Section 4.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; a learned penalty that grows with distance"

    form: str = "log"

    def __post_init__(self) -> None:
        check_choice("form", self.form, KERPLE_FORMS)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        widest = {"log": (2.0, 1.0), "power": (1.0, 2.0)}[self.form]
        size = (shape.num_layers, shape.num_heads)
        drawn = {
            name: jax.random.uniform(key, size, jnp.float32, 0.0, most)
            for name, key, most in zip(("r1", "r2"), jax.random.split(key), widest, strict=True)
        }
        return PositionVariables(layer_params=drawn)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return ("heads",)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        largest = math.inf if self.form == "log" else KERPLE_LARGEST_POWER
        r1 = clamp_value(variables["r1"], KERPLE_LEAST)
        r2 = clamp_value(variables["r2"], KERPLE_LEAST, largest)
        penalty = _log_penalty if self.form == "log" else _power_penalty
        return penalty(relative_distance(q_positions, k_positions), r1, r2)
