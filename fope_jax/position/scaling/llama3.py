"""The frequency scaling of Llama 3.1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fope_jax.position.checks import check_above_zero
from fope_jax.position.scaling.base import RotaryFrequencies, Scaling


@dataclass(frozen=True)
class Llama3(Scaling):
    """Interpolates frequencies with few turns in training, keeps those with many, ramps between.

        turns_m = L w_m / (2 pi)
        g_m = clamp((turns_m - low) / (high - low), 0, 1)
        w_m -> (1 - g_m) w_m / s + g_m w_m

    Like YaRN, with a ramp over turns instead of the index, and no temperature. If low equals high
    there is no ramp: g_m is 1 at or above that many turns, else 0 (Llama 4 Scout).

    Knobs:
      factor: s, the new length over the trained one.
      original_length: L, tokens.
      low_freq_factor: turns within L up to which a frequency is interpolated.
      high_freq_factor: turns within L from which it is kept.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.02, 0.01, 0.001]), theta=10_000.0)
    >>> Llama3(factor=4.0, original_length=1000)(rope).inv_freq.round(6).tolist()
    [1.0, 0.015915, 0.003979, 0.00025]

    Reference: Llama Team 2024, "The Llama 3 Herd of Models", Section 3.4.2, and its released code.
    """

    stretches: ClassVar[bool] = True
    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("low_freq_factor", self.low_freq_factor, "turns within the trained length")
        check_above_zero("high_freq_factor", self.high_freq_factor, "turns within it")
        if not self.high_freq_factor >= self.low_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}"
                ": expected high_freq_factor >= low_freq_factor"
            )

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        inv_freq = rotary.inv_freq
        turns = self.original_length * inv_freq / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        if width:
            kept = np.clip((turns - self.low_freq_factor) / width, 0.0, 1.0)
        else:
            kept = 1.0 * (turns >= self.high_freq_factor)
        return rotary._replace(inv_freq=(1 - kept) * inv_freq / self.factor + kept * inv_freq)
