"""Reading ``rope_parameters`` strictly: what is unknown, missing or contradictory raises."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.checks import nearest
from fope_jax.spelling import likely

THETA = "rope_theta"
SHARE = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"

# What trainers write beside types that do not read it, and what with these values changes no
# frequency and no attention: they are passed over. With another value such a key raises.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncate": (True, False),  # XTuner writes False beside every type; YaRN alone rounds
    "finetuned": (True, False),  # of YaRN's authors: whether the weights were trained with it
    "factor": (1,),
    "attention_factor": (1,),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}


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


def type_named(name: Any) -> Any:
    """The type of a name: ``su`` is what Phi-3 first called ``longrope``, others are their own."""
    return "longrope" if name == "su" else name


def uniform(
    parameters: Mapping[str, Any], types: tuple[str, ...], keys: Mapping[str, tuple[str, ...]]
) -> Given:
    """Checks type and keys, and leaves out entries of None and those that say nothing.

    Raises:
      ValueError: no type or an unknown one, or keys that the type does not read, all of them.
    """
    entries = {key: value for key, value in parameters.items() if value is not None}
    kinds = [type_named(entries.pop(key)) for key in ("rope_type", "type") if key in entries]
    if not kinds:
        raise ValueError("'rope_type' is missing: pass 'default' for plain RoPE")
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise ValueError(f"'rope_type' is {kinds[0]!r}, 'type' is {kinds[1]!r}: leave one out")
    kind = kinds[0]
    if kind not in types:
        raise ValueError(f"'rope_type' is {kind!r}{nearest(kind, types)}")
    known = ("rope_type", THETA, SHARE, *keys[kind])
    beside = {key: value for key, value in entries.items() if key not in known}
    unknown = {key: x for key, x in beside.items() if x not in NEUTRAL.get(key, ())}
    if unknown:
        listed = "; ".join(
            f"unknown key {key!r} of rope_type={kind!r} with the value {value!r:.80}"
            + (f" (did you mean {meant!r}?)" if (meant := likely(key, known)) else "")
            for key, value in unknown.items()
        )
        raise ValueError(f"{listed}. Known: {', '.join(known)}")
    return Given(kind, {key: value for key, value in entries.items() if key not in beside})


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
    value = value.item() if isinstance(value, np.number) else value
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer of a JSON file may be beyond every float.
    if not numeric or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{key!r} is {value!r}: expected a finite number")
    return value


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
