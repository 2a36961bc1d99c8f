"""KERPLE: a learned penalty on distance for each head."""

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
    """``x`` within bounds, with gradient 1 everywhere.

    A plain clamp has gradient 0 beyond a bound, where a parameter would stay stuck.

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

    Takes positions ``[B or 1, T]`` and ``[B or 1, S]``, tokens, integers or float32; r1 (logits)
    and r2 (per token) are ``[N]``, above 0. Returns ``[B, N, T, S]`` float32. Raises TypeError for
    other dtypes of positions, ValueError for other shapes.

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
    """A penalty that grows with a power of distance; exponent 1 is ALiBi.

        bias[b, n, t, s] = -r1[n] * |q_positions[b, t] - k_positions[b, s]| ** r2[n]

    Arguments, result and errors as ``kerple_log_bias``; r2 is at most 2.

    >>> half = jnp.full(1, 0.5)
    >>> kerple_power_bias(jnp.array([[9]]), jnp.array([[9, 5, 0]]), jnp.ones(1), half).tolist()
    [[[[-0.0, -2.0, -3.0]]]]

    Reference: Chi et al. 2022, "KERPLE", Section 4, the power variant.
    """
    distance = relative_distance(*block_positions(q_positions, k_positions))[:, None]
    return _power_penalty(distance, by_head(r1), by_head(r2))


def _power_penalty(distance: Array, r1: Array, r2: Array) -> Array:
    distance = jnp.abs(distance).astype(jnp.float32)
    # The gradient of x ** r2 contains log(x): at distance 0 it would be 0 * inf = NaN.
    powers = jnp.power(jnp.where(distance > 0, distance, 1.0), r2)
    return -r1 * jnp.where(distance > 0, powers, 0.0)


@dataclass(frozen=True)
class Kerple(PositionEmbedding):
    """A penalty on distance whose shape each head of each layer learns.

        log:    bias[n, t, s] = -r1[n] * log(1 + r2[n] * |t - s|)
        power:  bias[n, t, s] = -r1[n] * |t - s| ** r2[n]

    Parameters below 0.01 act as 0.01, an exponent above 2 as 2; gradients pass the bounds
    (``clamp_value``). Weight decay pulls to a nearly flat bias. Bounds and uniform initial ranges
    are the authors': ``log`` r1 in [0, 2), r2 in [0, 1); ``power`` r1 in [0, 1), r2 in [0, 2).

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
