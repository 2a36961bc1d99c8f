"""Reading ``rope_parameters`` strictly: what is unknown, missing or contradictory raises."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.checks import nearest

THETA = "rope_theta"
SHARE = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"


class Given(NamedTuple):
    """One ``rope_parameters``, its spelling made uniform and its entries of None left out.

    Attributes:
      rope_type: a key of ``KEYS``.
      entries: key to value.
    """

    rope_type: str
    entries: dict[str, Any]

    def value(self, key: str, advice: str = "") -> Any:
        """The value under a key that the type cannot do without."""
        if key not in self.entries:
            raise ValueError(
                f"{key!r} is missing: rope_type={self.rope_type!r} needs it{advice and '; '}"
                f"{advice}"
            )
        return self.entries[key]

    def number(self, key: str, advice: str = "") -> float:
        """The number under a key that the type cannot do without."""
        return number(key, self.value(key, advice))

    def theta(self, argument: float | None) -> float:
        """The base, of the parameters or the argument."""
        theta = either(self, THETA, argument, "rope_theta")
        if theta is None:
            raise ValueError(
                f"{THETA!r} is missing: Hugging Face takes a default of the model; pass rope_theta"
            )
        return theta

    def numbers(self, *keys: str) -> dict[str, float]:
        """Those of the keys that are given, with their numbers."""
        return {key: self.number(key) for key in keys if key in self.entries}


def uniform(
    parameters: Mapping[str, Any], types: tuple[str, ...], keys: Mapping[str, tuple[str, ...]]
) -> Given:
    """Checks type and keys, and leaves out entries of None.

    Raises:
      ValueError: no type or an unknown one, or a key that the type does not read.
    """
    entries = {key: value for key, value in parameters.items() if value is not None}
    kinds = [entries.pop(key) for key in ("rope_type", "type") if key in entries]
    if not kinds:
        raise ValueError("'rope_type' is missing: pass 'default' for plain RoPE")
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise ValueError(f"'rope_type' is {kinds[0]!r}, 'type' is {kinds[1]!r}: leave one out")
    kind = kinds[0]
    if kind not in types:
        raise ValueError(f"'rope_type' is {kind!r}{nearest(kind, types)}")
    known = ("rope_type", THETA, SHARE, *keys[kind])
    for key in entries:
        if key not in known:
            raise ValueError(f"unknown key {key!r} of rope_type={kind!r}{nearest(key, known)}")
    return Given(kind, entries)


def either(given: Given, key: str, argument: float | None, name: str) -> float | None:
    """A number that stands in the parameters or comes as an argument; both must agree."""
    own = given.entries.get(key)
    if own is None:
        return None if argument is None else number(name, argument)
    own = number(key, own)
    if argument is not None and argument != own:
        raise ValueError(f"{key!r} is {own:g}, {name}={argument}: leave one out")
    return own


def number(key: str, value: Any) -> float:
    """``value``, or ValueError unless it is a finite number."""
    numeric = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    # An integer of a JSON file may be beyond every float.
    if not numeric or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{key!r} is {value!r}: expected a finite number")
    return value if isinstance(value, (int, float)) else value.item()


def integer(key: str, value: Any) -> int:
    """``value``, or ValueError unless it is a whole number."""
    if number(key, value) != int(value):
        raise ValueError(f"{key!r} is {value!r}: expected a whole number")
    return int(value)


def numbers(key: str, value: Any) -> tuple[float, ...]:
    """``value`` as a tuple, or ValueError unless it is a list of finite numbers."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{key!r} is {value!r}: expected a list of numbers, one a frequency")
    return tuple(number(f"{key}[{index}]", entry) for index, entry in enumerate(value))


def flag(key: str, value: Any) -> bool:
    """``value``, or ValueError unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{key!r} is {value!r}: expected True or False")
    return bool(value)
