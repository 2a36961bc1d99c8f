"""Scalings: functions from rotary frequencies to rotary frequencies, and how they are chained."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fope_jax.position.checks import check_above_zero, check_at_least
from fope_jax.position.rotation import inverse_frequencies
from fope_jax.typing import Array


class RotaryFrequencies(NamedTuple):
    """The frequencies of a rotation on their way through scalings.

    Attributes:
      inv_freq: ``[F]`` radians per token, one a pair of dimensions; 0 where a pair does not turn.
      theta: the base of the grid that the frequencies stand on; YaRN's ramp needs it.
      attention_factor: the factor on cosine and sine, so that logits grow by its square.
    """

    inv_freq: Array
    theta: float
    attention_factor: float = 1.0

    @property
    def head_dim(self) -> int:
        """Dimensions that rotate, two a frequency."""
        return 2 * self.inv_freq.shape[0]


_at_least_one = functools.partial(check_at_least, least=1)
# The knobs that several scalings have; None where a scaling goes without.
_KNOB_CHECKS = {
    "factor": (_at_least_one, "the new length over the trained one"),
    "original_length": (_at_least_one, "the trained length in tokens"),
    "length": (_at_least_one, "the sequence's length in tokens"),
    "theta": (check_above_zero, "the rotary base"),
    "attention_factor": (check_above_zero, "a factor on the attention"),
}


@dataclass(frozen=True)
class Scaling:
    """A change of rotary frequencies; calling it gives the changed ones.

    Class attributes:
      stretches: whether it is made to reach a longer length; of these a chain holds one at most.
    """

    stretches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, (check, meaning) in _KNOB_CHECKS.items():
            if getattr(self, name, None) is not None:
                check(name, getattr(self, name), meaning=meaning)

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence at hand."""
        return False

    @property
    def effective_attention_factor(self) -> float:
        """The factor that the scaling puts on cosine and sine; logits grow by its square."""
        return 1.0

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        """The scaled frequencies.

        Args:
          rotary: what the scalings before this one have made of RoPE's.
          length: tokens of the sequence at hand, a number or a traced scalar, for scalings that
            follow it; None means no longer than in training.

        Raises:
          ValueError: the frequencies are not those that the scaling is defined for.
        """
        raise NotImplementedError


def scaled_frequencies(
    head_dim: int, theta: float, scaling: tuple[Scaling, ...], length: Array | None = None
) -> RotaryFrequencies:
    """RoPE's frequencies, changed by each scaling in turn, the first of the tuple first.

    Args:
      head_dim: dimensions that rotate, even.
      theta: base of RoPE's frequencies.
      scaling: the chain.
      length: see ``Scaling.__call__``.

    Returns:
      ``inv_freq [H/2]``, float64 NumPy unless a scaling follows a traced length.

    Raises:
      ValueError: see ``inverse_frequencies`` and the scalings.

    Reference: each scaling's own.
    """
    frequencies = RotaryFrequencies(inverse_frequencies(head_dim, theta), theta)
    return apply_scaling(frequencies, scaling, length)


def apply_scaling(
    rotary: RotaryFrequencies, scaling: tuple[Scaling, ...], length: Array | None = None
) -> RotaryFrequencies:
    """Applies each scaling in turn; see ``scaled_frequencies``.

    Raises:
      ValueError: a known frequency is negative or not finite.
    """
    inv_freq = rotary.inv_freq
    if isinstance(inv_freq, np.ndarray):
        wrong = np.flatnonzero(~(np.isfinite(inv_freq) & (inv_freq >= 0)))
        if wrong.size:
            raise ValueError(
                f"inv_freq[{wrong[0]}]={inv_freq[wrong[0]]}: a frequency is finite and positive, "
                "or 0 where a pair does not turn"
            )
    for step in scaling:
        rotary = step(rotary, length)
    return rotary


def check_chain(scaling: Any) -> tuple[Scaling, ...]:
    """The chain as a tuple.

    Raises:
      ValueError: an entry is no scaling, is given twice, or two of them stretch to a longer length.
    """
    if isinstance(scaling, Scaling):
        raise ValueError(f"scaling={scaling}: expected a tuple of scalings, write ({scaling},)")
    chain = tuple(scaling)
    for step in chain:
        if not isinstance(step, Scaling):
            raise ValueError(f"scaling holds {step!r}: expected scalings such as YaRN(...)")
    names = [type(step).__name__ for step in chain]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"scaling gives {name} twice: it would be applied twice; keep one")
    stretching = [type(step).__name__ for step in chain if step.stretches]
    if len(stretching) > 1:
        raise ValueError(
            f"scaling holds {' and '.join(stretching)}: each stretches the frequencies to a longer "
            "length, together they would do it twice; keep one"
        )
    return chain
