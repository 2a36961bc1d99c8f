"""Scalings by one factor: position interpolation, NTK-aware, dynamic NTK, adjusted base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.scaling.base import RotaryFrequencies, Scaling
from fope_jax.typing import Array


@dataclass(frozen=True)
class PositionInterpolation(Scaling):
    """Slows every frequency, as if positions were divided by the factor.

        w_m -> w_m / s

    Knobs:
      factor: s, the new length over the trained one; 1 changes nothing.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.5]), theta=4.0)
    >>> PositionInterpolation(factor=2.0)(rope).inv_freq.tolist()
    [0.5, 0.25]

    Reference: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
    Interpolation", Eq. 4.
    """

    stretches: ClassVar[bool] = True
    factor: float

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        return rotary._replace(inv_freq=rotary.inv_freq / self.factor)


@dataclass(frozen=True)
class AdjustedBase(Scaling):
    """Moves the frequencies to another base ("ABF"): the slow ones slow down most.

        w_m -> w_m (theta / theta') ** (2 m / H)  =  theta' ** (-2 m / H)  for RoPE's own

    Knobs:
      theta: theta', the new base.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1]), theta=100.0)
    >>> AdjustedBase(theta=10_000.0)(rope).inv_freq.round(6).tolist()
    [1.0, 0.01]

    Reference: Xiong et al. 2023, "Effective Long-Context Scaling of Foundation Models", Section
    4.1.
    """

    theta: float

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        return _rebase(rotary, self.theta / rotary.theta)


@dataclass(frozen=True)
class NTKAware(Scaling):
    """Raises the base so that the slowest frequency slows by the factor and the fastest stays.

        theta' = theta * s ** (H / (H - 2)),   w_m -> w_m * s ** (-2 m / (H - 2))

    Knobs:
      factor: s, the new length over the trained one.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01]), theta=1000.0)
    >>> NTKAware(factor=4.0)(rope).inv_freq.round(6).tolist()
    [1.0, 0.05, 0.0025]

    Reference: Peng et al. 2023, "YaRN", Section 3.1, after bloc97 2023.
    """

    stretches: ClassVar[bool] = True
    factor: float

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        return _ntk(rotary, self.factor)


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """NTK-aware scaling, only by as much as the current sequence needs.

        s(n) = s n / L - (s - 1)  for n > L, else 1;   w_m -> w_m * s(n) ** (-2 m / (H - 2))

    All tokens use the frequencies for the sequence's length n, so cached keys must be rotated again
    as it grows (``Limits.follows_length``).

    Knobs:
      factor: s, the strength of the stretch.
      original_length: L, tokens.
      length: n, tokens, for all sequences (float64 frequencies); None takes each row's last
        position + 1 (float32).

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01]), theta=1000.0)
    >>> DynamicNTK(factor=2.0, original_length=512)(rope, length=1280).inv_freq.round(6).tolist()
    [1.0, 0.05, 0.0025]

    Reference: emozilla 2023, "Dynamically Scaled RoPE"; Peng et al. 2023, "YaRN", Section 3.3.
    """

    stretches: ClassVar[bool] = True
    factor: float
    original_length: int
    length: int | None = None

    @property
    def follows_length(self) -> bool:
        return self.length is None

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        if self.length is not None:
            length = self.length
        if length is None:
            return rotary
        if isinstance(length, (int, np.integer)):
            times = max(length, self.original_length) / self.original_length
        else:
            length = jnp.asarray(length).astype(jnp.float32)
            times = jnp.maximum(length, self.original_length) / self.original_length
        return _ntk(rotary, self.factor * times - (self.factor - 1))


def _ntk(rotary: RotaryFrequencies, factor: Array) -> RotaryFrequencies:
    head_dim = rotary.head_dim
    if head_dim < 4:
        raise ValueError(
            f"head_dim={head_dim}: NTK scaling keeps the first pair and slows the last, so at "
            "least 4 dimensions must rotate"
        )
    return _rebase(rotary, factor ** (head_dim / (head_dim - 2)))


def _rebase(rotary: RotaryFrequencies, ratio: Array) -> RotaryFrequencies:
    """Moves frequencies from base theta to ``theta * ratio``."""
    inv_freq = rotary.inv_freq
    exponent = -np.arange(0, rotary.head_dim, 2) / rotary.head_dim
    if not isinstance(ratio, (int, float, np.number)):  # traced: float32 even with x64 enabled
        exponent, inv_freq = (jnp.asarray(row, jnp.float32) for row in (exponent, inv_freq))
    return rotary._replace(inv_freq=inv_freq * ratio**exponent, theta=rotary.theta * ratio)
