"""Checks of knobs; each raises a ValueError with the knob, its value and what is accepted."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fope_jax.spelling import likely

MOST_TOKENS = 2**31 - 1  # positions are int32
# A knob beyond the largest float32 is infinite once it is used, and one below the smallest is 0.
_SMALLEST, _LARGEST = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo("f4").max))


def check_number(name: str, value: Any, meaning: str) -> None:
    """Raises ValueError unless ``value`` is a number; "4", True and None are none."""
    is_number = isinstance(value, numbers.Real) or hasattr(value, "dtype") and not np.ndim(value)
    if isinstance(value, (bool, np.bool_, np.character)) or not is_number:
        raise ValueError(f"{name}={value!r}: {meaning}, a number")


def check_switches(method: Any) -> None:
    """Raises ValueError unless each knob that is on or off is True or False.

    ``interleaved="false"`` would otherwise be on, as any text is.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(field.default, bool) and not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{field.name}={value!r}: expected True or False")


def check_hashable(method: Any) -> None:
    """Raises ValueError for a knob that is a list or an array and part of the method's hash.

    Flax and `jax.jit` compare and hash a method to tell programs apart, which neither allows.
    """
    for field in dataclasses.fields(method):
        if not (field.compare if field.hash is None else field.hash):
            continue
        value = getattr(method, field.name)
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"{type(method).__name__}.{field.name} = {value!r:.80} is a "
                f"{type(value).__name__}; accepted: a number, a text, a method or scaling, None, "
                "or a tuple of these"
            ) from None


def as_tuple(name: str, value: Any, meaning: str) -> tuple[Any, ...]:
    """The entries of a list; ValueError for one value, a text or a mapping."""
    is_one = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    if is_one or isinstance(value, (str, bytes, Mapping)):
        raise ValueError(f"{name}={value!r}: expected a tuple of {meaning}")
    return tuple(value)


def check_at_least(name: str, value: float, least: float, meaning: str) -> None:
    """Raises ValueError unless ``value`` is finite in float32 and ``least`` or more."""
    check_number(name, value, meaning)
    if not least <= value <= _LARGEST:
        raise ValueError(f"{name}={value}: {meaning} must be {least:g} or more, and finite")


def check_above_zero(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless ``value`` is finite and above 0, both in float32."""
    check_number(name, value, meaning)
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{name}={value}: {meaning} must be above 0, and finite")


def check_share(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless ``value`` is above 0 and at most 1."""
    check_number(name, value, meaning)
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: {meaning} is above 0, to 1")


def check_whole(name: str, value: int, least: int, meaning: str) -> None:
    """Raises ValueError unless ``value`` is a whole number, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: {meaning}, a whole number")
    if value < least:
        raise ValueError(f"{name}={value}: {meaning} must be {least} or more")


def check_tokens(name: str, value: int, meaning: str, least: int = 1) -> None:
    """Raises ValueError unless ``value`` is a whole number from ``least`` to ``MOST_TOKENS``."""
    check_whole(name, value, least, meaning)
    if value > MOST_TOKENS:
        raise ValueError(
            f"{name}={value}: {meaning}, at most {MOST_TOKENS}, as positions are int32"
        )


def check_factor(factor: float) -> None:
    """Raises ValueError unless ``factor`` can be the new length over the trained one."""
    check_at_least("factor", factor, 1, "the new length over the trained one")


def check_spread(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` can be a standard deviation."""
    check_number(name, value, "a standard deviation")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{name}={value}: a standard deviation is finite, 0 or more")


def check_finite(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless ``value`` is finite in float32."""
    check_number(name, value, meaning)
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{name}={value}: {meaning} must be finite")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


# What papers and other libraries call our methods and scalings; the first four are Hugging Face's.
OTHER_NAMES = {
    "default": "rope",
    "linear": "position_interpolation",
    "dynamic": "dynamic_ntk",
    "su": "longrope",
    "pi": "position_interpolation",
    "rotary": "rope",
    "none": "nope",
}


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """Returns ``known[name]``; ValueError listing the known names if it is missing."""
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, known)}")
    return known[name]


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a suggestion and the known names.

    >>> nearest("rop", ["alibi", "rope"]), nearest("rotary", ["alibi", "rope"])
    ("; did you mean 'rope'? Known: alibi, rope", "; did you mean 'rope'? Known: alibi, rope")
    """
    known = list(known)
    meant = OTHER_NAMES.get(str(name))
    if meant not in known:
        meant = likely(str(name), known)
    advice = f"; did you mean {meant!r}?" if meant else "."
    return f"{advice} Known: {', '.join(known) or 'none'}"
