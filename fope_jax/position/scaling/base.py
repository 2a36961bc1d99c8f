"""The interface of scalings, functions of rotary frequencies, and chains of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fope_jax.position.checks import (
    as_tuple,
    check_above_zero,
    check_at_least,
    check_switches,
    check_tokens,
)
from fope_jax.position.rotation import inverse_frequencies
from fope_jax.typing import Array


class RotaryFrequencies(NamedTuple):
    """Rotary frequencies on their way through scalings.

    Attributes:
      inv_freq: ``[F]`` radians per token, one per pair of dimensions; 0 if a pair does not turn.
      theta: the base of the frequencies; YaRN's ramp needs it.
      attention_factor: factor on cosine and sine; logits grow by its square.
    """

    inv_freq: Array
    theta: float
    attention_factor: float = 1.0

    @property
    def head_dim(self) -> int:
        """The number of rotated dimensions, two per frequency."""
        return 2 * self.inv_freq.shape[0]


_at_least_one = functools.partial(check_at_least, least=1)
# Knobs that several scalings share; absent or None is not checked.
_KNOB_CHECKS = {
    "factor": (_at_least_one, "the new length over the trained one"),
    "original_length": (check_tokens, "the trained length in tokens"),
    "length": (check_tokens, "the sequence's length in tokens"),
    "theta": (check_above_zero, "the rotary base"),
    "attention_factor": (check_above_zero, "a factor on the attention"),
}


@dataclass(frozen=True)
class Scaling:
    """A change of rotary frequencies, applied by calling it.

    A chain has at most one that ``stretches`` the frequencies to a longer length.
    """

    stretches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_switches(self)
        for name, (check, meaning) in _KNOB_CHECKS.items():
            if getattr(self, name, None) is not None:
                check(name, getattr(self, name), meaning=meaning)

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on the current sequence's length."""
        return False

    @property
    def effective_attention_factor(self) -> float:
        """The factor on cosine and sine; logits grow by its square."""
        return 1.0

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        """The scaled frequencies; ValueError if the scaling is not defined for these.

        ``length``, tokens of the current sequence, may be traced; None is up to the training
        length.
        """
        raise NotImplementedError


def scaled_frequencies(
    head_dim: int, theta: float, scaling: tuple[Scaling, ...], length: Array | None = None
) -> RotaryFrequencies:
    """RoPE's frequencies ``inv_freq [H/2]``, changed by each scaling in order.

    They are float64 NumPy unless a scaling follows a traced ``length`` (see ``Scaling.__call__``).
    Raises ValueError as ``inverse_frequencies`` and the scalings do, and for no chain of them.
    """
    frequencies = RotaryFrequencies(inverse_frequencies(head_dim, theta), theta)
    return apply_scaling(frequencies, check_chain(scaling), length)


def apply_scaling(
    rotary: RotaryFrequencies, scaling: tuple[Scaling, ...], length: Array | None = None
) -> RotaryFrequencies:
    """Applies each scaling in order.

    ValueError if a known frequency is negative or not finite, before or after a scaling, which the
    message names.
    """
    _check_frequencies(rotary.inv_freq, "")
    for step in scaling:
        rotary = step(rotary, length)
        _check_frequencies(rotary.inv_freq, f"{type(step).__name__} gives ")
    return rotary


def _check_frequencies(inv_freq: Any, origin: str) -> None:
    if not isinstance(inv_freq, np.ndarray):  # traced
        return
    wrong = np.flatnonzero(~(np.isfinite(inv_freq) & (inv_freq >= 0)))
    if wrong.size:
        raise ValueError(
            f"{origin}inv_freq[{wrong[0]}]={inv_freq[wrong[0]]}: a frequency is finite and "
            "positive, or 0 where a pair does not turn"
        )


def check_chain(scaling: Any) -> tuple[Scaling, ...]:
    """The chain as a tuple; ValueError for a non-scaling, a repeated one, or two that stretch."""
    if isinstance(scaling, Scaling):
        raise ValueError(f"scaling={scaling}: expected a tuple of scalings, write ({scaling},)")
    named = isinstance(scaling, str)
    chain: tuple[Any, ...] = (scaling,) if named else as_tuple("scaling", scaling, "scalings")
    for step in chain:
        if not isinstance(step, Scaling):
            raise ValueError(
                f"scaling holds {step!r}: expected scalings such as NTKAware(4.0), in a "
                "configuration [{'scaling': 'ntk', 'factor': 4.0}]"
            )
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
