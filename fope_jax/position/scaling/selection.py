"""Scalings that drop or move single frequencies: floor clipping, full cycles, p-RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.checks import check_above_zero, check_share, check_tokens, check_whole
from fope_jax.position.rotation import as_array
from fope_jax.position.scaling.base import RotaryFrequencies, Scaling
from fope_jax.typing import Array


def floor_frequency(training_length: int, ratio: float = 1.0) -> float:
    """The lowest frequency with a full period in training, radians per token.

        w_l = ratio * 2 pi / L

    Raises ValueError unless ``training_length`` is a whole number and both are above 0.

    >>> round(floor_frequency(512), 6)
    0.012272

    Reference: Hua et al. 2025 (FoPE), Section 4.2.
    """
    check_tokens("training_length", training_length, "the trained length in tokens")
    check_above_zero("ratio", ratio, "the share of a full turn")
    return ratio * 2.0 * math.pi / training_length


def clip_floor(inv_freq: Array, training_length: int, ratio: float = 1.0) -> Array:
    """Zeroes frequencies without a full period within the training length.

        w_m -> 0  where  w_m < ratio * 2 pi / L

    ``inv_freq`` is ``[F]`` radians per token, NumPy or JAX; the result has the same type. Raises
    as ``floor_frequency``.

    >>> clip_floor(np.array([1.0, 0.1, 0.01]), training_length=100).tolist()
    [1.0, 0.1, 0.0]

    Reference: Hua et al. 2025 (FoPE), Eq. 13; their code compares strictly, as here.
    """
    inv_freq, floor = as_array(inv_freq), floor_frequency(training_length, ratio)
    return _numpy(inv_freq).where(inv_freq < floor, 0.0, inv_freq)


@dataclass(frozen=True)
class ClipFloor(Scaling):
    """Zeroes the frequencies that never complete a period in training.

        w_m -> 0  where  w_m < ratio * 2 pi / L

    Knobs:
      training_length: L, tokens.
      ratio: how many periods within L a frequency needs to be kept.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01]), theta=1000.0)
    >>> ClipFloor(training_length=100)(rope).inv_freq.tolist()
    [1.0, 0.1, 0.0]

    Reference: Hua et al. 2025 (FoPE), Eq. 13.
    """

    training_length: int
    ratio: float = 1.0

    def __post_init__(self) -> None:
        floor_frequency(self.training_length, self.ratio)

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        clipped = clip_floor(rotary.inv_freq, self.training_length, self.ratio)
        return rotary._replace(inv_freq=clipped)


@dataclass(frozen=True)
class SnapToCycles(Scaling):
    """Moves each frequency to the nearest with a whole number of turns in training.

        w_m -> (2 pi / L) max(round(w_m L / (2 pi)), least)  for w_m > 0,  else 0

    Pairs that stand still, such as those that a floor clipped, stay so. The toy model without
    truncated periods in FoPE's paper ("RoPE-A").

    Knobs:
      training_length: L, tokens.
      least: turns within L of the slowest; 0 stops frequencies below half a turn.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01]), theta=1000.0)
    >>> snapped = SnapToCycles(training_length=100)(rope).inv_freq
    >>> (snapped * 100 / (2 * np.pi)).round(6).tolist()
    [16.0, 2.0, 1.0]

    Reference: Hua et al. 2025 (FoPE), Table 2.
    """

    training_length: int
    least: int = 1

    def __post_init__(self) -> None:
        floor_frequency(self.training_length)
        check_whole("least", self.least, 0, "turns of the slowest frequency")

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        inv_freq, numpy = rotary.inv_freq, _numpy(rotary.inv_freq)
        one_turn = floor_frequency(self.training_length)
        turns = numpy.maximum(numpy.round(inv_freq / one_turn), self.least)
        return rotary._replace(inv_freq=numpy.where(inv_freq > 0, turns * one_turn, 0.0))


@dataclass(frozen=True)
class PRoPE(Scaling):
    """Drops the lowest frequencies, whatever the training length (p-RoPE).

        w_m -> w_m  for m < floor(p H / 2),  else 0

    Knobs:
      share: p, the share of the frequencies that is kept, above 0; 1 is RoPE.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01, 0.001]), theta=10_000.0)
    >>> PRoPE(share=0.5)(rope).inv_freq.tolist()
    [1.0, 0.1, 0.0, 0.0]

    Reference: Barbero et al. 2024, "Round and Round We Go! What makes Rotary Positional Encodings
    useful?", Section 6.1.
    """

    share: float

    def __post_init__(self) -> None:
        check_share("share", self.share, "the share of frequencies kept")

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        # A share such as 15 / 44 gives a whole number of pairs but for rounding.
        kept = math.floor(self.share * (rotary.head_dim // 2) + 1e-6)
        if kept < 1:
            raise ValueError(
                f"share={self.share}: of {rotary.head_dim // 2} frequencies none is kept; "
                f"{2 / rotary.head_dim:g} or more keeps one"
            )
        inv_freq = rotary.inv_freq
        mask = np.arange(rotary.head_dim // 2) < kept
        return rotary._replace(inv_freq=_numpy(inv_freq).where(mask, inv_freq, 0.0))


@dataclass(frozen=True)
class Proportional(Scaling):
    """p-RoPE with position interpolation, as in Gemma 4's global layers.

        w_m -> w_m / s  for m < floor(p H / 2),  else 0

    Unlike partial rotary it keeps RoPE's fastest frequencies.

    Knobs:
      share: p, the share of the frequencies that is kept, above 0.
      factor: s, the new length over the trained one.

    >>> rope = RotaryFrequencies(np.array([1.0, 0.1, 0.01, 0.001]), theta=10_000.0)
    >>> Proportional(share=0.5, factor=2.0)(rope).inv_freq.tolist()
    [0.5, 0.05, 0.0, 0.0]

    Reference: Barbero et al. 2024, "Round and Round We Go!", Section 6.1; the type "proportional"
    of Hugging Face transformers 5.
    """

    stretches: ClassVar[bool] = True
    share: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        PRoPE(self.share)

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        kept = PRoPE(self.share)(rotary)
        return kept._replace(inv_freq=kept.inv_freq / self.factor)


def _numpy(x: Array):
    return np if isinstance(x, np.ndarray) else jnp
