"""YaRN: slow frequencies interpolated, fast ones kept, and a temperature on the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fope_jax.position.checks import check_above_zero, check_factor
from fope_jax.position.scaling.base import RotaryFrequencies, Scaling


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on q and on k; the logits grow by its square.

        1 / sqrt(t) = 0.1 mscale ln(s) + 1

    >>> round(yarn_temperature(4.0), 6)
    1.138629

    Reference: Peng et al. 2023, "YaRN", Eq. 22; mscale as in DeepSeek-V2.
    """
    check_factor(factor)
    return 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class YaRN(Scaling):
    """Slow frequencies are interpolated, fast ones kept, with a linear ramp between.

        w_m -> (1 - g_m) w_m / s + g_m w_m
        g_m = 1 - clamp((m - low) / (high - low), 0, 1)
        low, high = H ln(L / (2 pi beta)) / (2 ln theta)  at beta_fast, beta_slow

    If both ends of the ramp are at one index, it is a step after that index.

    Knobs:
      factor: s, the new length over the trained one.
      original_length: L, tokens.
      beta_fast: turns within L above which a frequency is kept.
      beta_slow: turns within L below which it is interpolated.
      attention_factor: on cosine and sine; None takes ``yarn_temperature``, 1 none (FoPE's code).
      mscale: with ``mscale_all_dim``, attention_factor is the ratio of the two temperatures
        (DeepSeek-V2 and later, which scale logits by the second one themselves).
      mscale_all_dim: see ``mscale``.
      truncate: round the ramp's ends outwards to whole indices.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01, 0.001]), theta=10_000.0)
    >>> scaled = YaRN(factor=4.0, original_length=512)(rope)
    >>> scaled.inv_freq.round(6).tolist(), round(scaled.attention_factor, 6)
    ([1.0, 0.0625, 0.0025, 0.00025], 1.138629)

    Reference: Peng et al. 2023, "YaRN", Eq. 17-23.
    """

    stretches: ClassVar[bool] = True
    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_fast", "beta_slow"):
            check_above_zero(name, getattr(self, name), "turns within the trained length")
        if not self.beta_fast >= self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast}, beta_slow={self.beta_slow}: expected "
                "beta_fast >= beta_slow"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"mscale={self.mscale}, mscale_all_dim={self.mscale_all_dim}: the attention factor "
                "is the ratio of the two; give both or none"
            )
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_above_zero(name, getattr(self, name), "a factor on the attention")
        if self.attention_factor is not None and self.mscale is not None:
            raise ValueError(
                f"attention_factor={self.attention_factor}, mscale={self.mscale}: both say how "
                "much cosine and sine grow; give one"
            )

    @property
    def effective_attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            over = yarn_temperature(self.factor, self.mscale_all_dim)
            return yarn_temperature(self.factor, self.mscale) / over
        return yarn_temperature(self.factor)

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        inv_freq, theta, attention_factor = rotary
        if not theta > 1:
            raise ValueError(f"theta={theta}: YaRN's ramp needs a base above 1")
        low, high = self._clipped_ends(rotary.head_dim, theta)
        ramp = np.clip((np.arange(rotary.head_dim // 2) - low) / (high - low), 0.0, 1.0)
        return rotary._replace(
            inv_freq=inv_freq / self.factor * ramp + inv_freq * (1 - ramp),
            attention_factor=attention_factor * self.effective_attention_factor,
        )

    def ramp_ends(self, head_dim: int, theta: float) -> tuple[float, float]:
        """The indices where interpolation begins and is complete, not limited to the grid."""

        def index(turns: float) -> float:
            ratio = self.original_length / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        return (math.floor(low), math.ceil(high)) if self.truncate else (low, high)

    def _clipped_ends(self, head_dim: int, theta: float) -> tuple[float, float]:
        """The ramp's ends within the grid, never equal."""
        low, high = self.ramp_ends(head_dim, theta)
        if high < 0:  # even the fastest turns less than beta_slow times: all interpolated
            return -2.0, -1.0
        if low > head_dim - 1:  # the slowest turns more than beta_fast times: all kept
            return float(head_dim), head_dim + 1.0
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 * (low == high)  # zero width would be 0 / 0
