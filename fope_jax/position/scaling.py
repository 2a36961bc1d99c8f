"""Frequencies to frequencies: what methods of length extension do to rotary frequencies."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from fope_jax.position.rotation import as_array
from fope_jax.typing import Array


def floor_frequency(training_length: int, ratio: float = 1.0) -> float:
    """The slowest frequency that turns fully within training, radians per token.

        w_l = ratio * 2 pi / L

    Raises:
      ValueError: ``training_length`` or ``ratio`` is not above 0.

    >>> round(floor_frequency(512), 6)
    0.012272

    Reference: Hua et al. 2025 (FoPE), Section 4.2.
    """
    if not training_length > 0:
        raise ValueError(f"training_length={training_length}: it counts tokens and must be above 0")
    if not ratio > 0:
        raise ValueError(f"ratio={ratio}: the share of a full turn must be above 0")
    return ratio * 2.0 * math.pi / training_length


def clip_floor(inv_freq: Array, training_length: int, ratio: float = 1.0) -> Array:
    """Zeroes the frequencies that never complete a period within the training length.

        w_m -> 0  where  w_m < ratio * 2 pi / L

    Args:
      inv_freq: ``[F]`` radians per token.
      training_length: L, tokens.
      ratio: how many periods within L a frequency needs to be kept.

    Returns:
      ``[F]`` radians per token, the kind of array that came in.

    Raises:
      ValueError: ``training_length`` or ``ratio`` is not above 0.

    >>> clip_floor(np.array([1.0, 0.1, 0.01]), training_length=100).tolist()
    [1.0, 0.1, 0.0]

    Reference: Hua et al. 2025 (FoPE), Eq. 13; their code compares strictly, as here.
    """
    inv_freq, floor = as_array(inv_freq), floor_frequency(training_length, ratio)
    numpy = np if isinstance(inv_freq, np.ndarray) else jnp
    return numpy.where(inv_freq < floor, numpy.zeros_like(inv_freq), inv_freq)


def position_interpolation(inv_freq: Array, factor: float) -> Array:
    """Slows every frequency, as if positions were divided by ``factor``.

        w_m -> w_m / s

    Args:
      inv_freq: ``[F]`` radians per token.
      factor: s, the new length over the trained one; 1 changes nothing.

    Raises:
      ValueError: ``factor`` is below 1.

    >>> position_interpolation(np.array([1.0, 0.5]), factor=2.0).tolist()
    [0.5, 0.25]

    Reference: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
    Interpolation", Eq. 4.
    """
    _check_factor(factor)
    return as_array(inv_freq) / factor


def yarn(
    inv_freq: Array,
    factor: float,
    original_length: int,
    *,
    head_dim: int,
    theta: float = 10_000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Array:
    """YaRN's frequencies: slow ones interpolated, fast ones kept, a linear ramp between.

        w_m -> (1 - g_m) w_m / s + g_m w_m
        g_m = 1 - clamp((m - low) / (high - low), 0, 1)
        low, high = H ln(L / (2 pi beta)) / (2 ln theta)  at beta_fast, beta_slow

    The ramp runs over the index ``m`` of RoPE's own grid, so ``inv_freq`` must be that grid, with
    zeros where a floor has clipped it. Frequencies only: the attention temperature of the paper is
    a factor on the logits and not part of this function.

    Args:
      inv_freq: ``[H/2]`` radians per token.
      factor: s, the new length over the trained one.
      original_length: L, tokens.
      head_dim: H.
      theta: the base that made ``inv_freq``.
      beta_fast, beta_slow: turns within L above which a frequency is kept, below which it is
        interpolated.
      truncate: round the ramp's ends outwards to whole indices.

    Raises:
      ValueError: a length, factor, base or beta out of range, or ``inv_freq`` not ``[H/2]``.

    >>> yarn(np.array([1.0, 0.1, 0.01, 0.001]), 4.0, 512, head_dim=8).round(6).tolist()
    [1.0, 0.0625, 0.0025, 0.00025]

    Reference: Peng et al. 2023, "YaRN", Eq. 17-23.
    """
    _check_factor(factor)
    if not original_length > 0:
        raise ValueError(f"original_length={original_length}: it counts tokens, must be above 0")
    if not beta_fast > beta_slow > 0:
        raise ValueError(
            f"beta_fast={beta_fast}, beta_slow={beta_slow}: expected beta_fast > beta_slow > 0"
        )
    if not theta > 1:
        raise ValueError(f"theta={theta}: YaRN's ramp needs a base above 1")
    inv_freq = as_array(inv_freq)
    if inv_freq.shape != (head_dim // 2,):
        raise ValueError(
            f"inv_freq has shape {inv_freq.shape}: YaRN's ramp needs RoPE's own grid "
            f"[{head_dim // 2}] for head_dim={head_dim}"
        )

    def index(turns: float) -> float:
        return head_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    if high < 0:  # not even the fastest frequency turns beta_slow times
        return inv_freq / factor
    if low > head_dim - 1:  # the slowest turns more than beta_fast times
        return inv_freq
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width is a step
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    ramp = ramp.astype(inv_freq.dtype)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"factor={factor}: the new length over the trained one must be 1 or more")
