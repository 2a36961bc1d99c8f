"""LongRoPE: searched factors per frequency, for short and for long sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.checks import as_tuple, check_above_zero, check_tokens
from fope_jax.position.scaling.base import RotaryFrequencies, Scaling


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """Divides each frequency by its own factor, found by search.

        w_m -> w_m / short_m  for a sequence of n <= L tokens
        w_m -> w_m / long_m   for n > L

    When a sequence grows beyond L, all its frequencies change at once, see ``DynamicNTK``.

    Knobs:
      short_factor: one factor per frequency, up to L.
      long_factor: one factor per frequency, beyond L.
      original_length: L, tokens.
      factor: s, the longest new length over the trained one; affects only attention_factor.
      attention_factor: on cosine and sine at every length; None is ``sqrt(1 + ln s / ln L)``.
      length: n, tokens, for all sequences; None takes each row's last position + 1.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1]), theta=100.0)
    >>> scaling = LongRoPE((1.0, 1.0), (1.0, 5.0), original_length=4096, factor=32.0)
    >>> scaling(rope, length=4096).inv_freq.tolist(), scaling(rope, length=4097).inv_freq.tolist()
    ([1.0, 0.1], [1.0, 0.02])

    Reference: Ding et al. 2024, "LongRoPE", Section 3.3; attention_factor as in Phi-3.
    """

    stretches: ClassVar[bool] = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    factor: float
    attention_factor: float | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            # A list would make the scaling unhashable.
            factors = as_tuple(name, getattr(self, name), "factors, one a frequency")
            object.__setattr__(self, name, factors)
            for index, factor in enumerate(factors):
                check_above_zero(f"{name}[{index}]", factor, "a factor on a period")
        super().__post_init__()
        check_tokens("original_length", self.original_length, "the trained length in tokens", 2)

    @property
    def follows_length(self) -> bool:
        return self.length is None

    @property
    def effective_attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        needed = rotary.head_dim // 2
        for name in ("short_factor", "long_factor"):
            if (count := len(getattr(self, name))) != needed:
                raise ValueError(f"{name} has {count} entries: {needed} frequencies need one each")
        if self.length is not None:
            length = self.length
        length = 0 if length is None else length
        short = rotary.inv_freq / np.array(self.short_factor)
        long = rotary.inv_freq / np.array(self.long_factor)
        if isinstance(length, (int, np.integer)):
            inv_freq = long if length > self.original_length else short
        else:  # traced: float32 even with x64 enabled
            inv_freq = jnp.where(
                length > self.original_length,
                jnp.asarray(long, jnp.float32),
                jnp.asarray(short, jnp.float32),
            )
        return rotary._replace(
            inv_freq=inv_freq,
            attention_factor=rotary.attention_factor * self.effective_attention_factor,
        )
