"""Hugging Face's ``rope_parameters`` to methods and back; for FoPE see ``serving``.

``max_position_embeddings`` is the trained length for ``dynamic``, and the extended length for
``yarn``, ``longrope`` and ``llama3``. Here these are two arguments, ``original_length`` and
``extended_length``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position import (
    AdjustedBase,
    DynamicNTK,
    FoPE,
    Llama3,
    LongRoPE,
    ModelShape,
    NTKAware,
    PositionEmbedding,
    PositionInterpolation,
    PRoPE,
    Proportional,
    RoPE,
    Scaling,
    YaRN,
)
from fope_jax.position.checks import nearest
from fope_jax.spelling import likely

log = logging.getLogger(__name__)

THETA = "rope_theta"
PARTIAL = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"
FOPE_KEYS = ("use_fope", "num_inv_freq", "fope_sep_head", "fope_init_factor")
FOPE_SPELLINGS = {"fope_num_inv_freq": "num_inv_freq", "fope_sep_heads": "fope_sep_head"}


class RopeType(NamedTuple):
    """One ``rope_type``: its scaling, None for plain RoPE, and its keys."""

    scaling: type[Scaling] | None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # not read by transformers


ROPE_TYPES = {
    "default": RopeType(None, ignored=(ORIGINAL,)),
    "linear": RopeType(PositionInterpolation, ("factor",), ignored=(ORIGINAL,)),
    "dynamic": RopeType(DynamicNTK, ("factor", ORIGINAL)),
    "yarn": RopeType(
        YaRN,
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        ignored=("attn_factor",),  # with a warning: serving engines multiply by it
    ),
    "longrope": RopeType(
        LongRoPE, ("short_factor", "long_factor", ORIGINAL, "factor"), ("attention_factor",)
    ),
    "llama3": RopeType(Llama3, ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor")),
    "proportional": RopeType(Proportional, (PARTIAL,), ("factor",)),
}
# Fields of the scalings that differ from the key.
_FIELDS = {ORIGINAL: "original_length", PARTIAL: "share"}

# Keys that trainers write for any type, with the values that change no frequency.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncate": (True, False),
    "finetuned": (True, False),
    "factor": (1,),
    "attention_factor": (1,),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}


def from_rope_parameters(
    parameters: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    original_length: int | None = None,
    extended_length: int | None = None,
    rope_theta: float | None = None,
    partial_rotary_factor: float | None = None,
) -> RoPE:
    """The RoPE of a Hugging Face model with these ``rope_parameters``, with at most one scaling.

    Keys that change no number are ignored. So is ``attn_factor`` of ``yarn``, with a warning:
    transformers does not read it, serving engines multiply by it. The older ``rope_scaling`` works
    too, with ``type``, and ``su`` for ``longrope``. None counts as missing. ``dynamic`` and
    ``longrope`` follow the length of each row; transformers follows the longest row of the batch.

    Args:
      parameters: ``rope_parameters`` or ``rope_scaling``; one entry of it if nested by layer type.
      head_dim: H, to check the method against.
      original_length: trained length in tokens, if not in the parameters:
        ``max_position_embeddings`` for ``dynamic``, ``original_max_position_embeddings`` for Phi-3.
      extended_length: extended length in tokens, ``max_position_embeddings`` for ``yarn``,
        ``longrope`` and ``llama3``. It gives a missing ``factor``; a given one must agree.
      rope_theta, partial_rotary_factor: base and share of dimensions, if not in the parameters.

    Raises ValueError for unknown keys, all at once, and for a key that is missing, of the wrong
    kind, or contradicts another or an argument.

    >>> keys = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0}
    >>> from_rope_parameters(keys).scaling
    (PositionInterpolation(factor=4.0),)

    Reference: ``ROPE_INIT_FUNCTIONS`` of Hugging Face transformers 5.23.0.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"rope_parameters = {parameters!r}: expected a mapping; a model without scaling has "
            "{'rope_type': 'default'}"
        )
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"rope_parameters is nested by {', '.join(map(repr, nested))}: pass the entry of "
            "one layer type, and combine the methods with ByLayer"
        )
    fope_keys = [key for key in parameters if FOPE_SPELLINGS.get(key, key) in FOPE_KEYS]
    if is_fope(parameters):
        raise ValueError(f"{fope_keys[0]!r} is a key of FoPE: use fope_from_rope_parameters")
    rope_type, entries = read_keys(
        {key: value for key, value in parameters.items() if key not in fope_keys},
        {name: (*t.required, *t.optional, *t.ignored) for name, t in ROPE_TYPES.items()},
    )
    scaling, required, optional, _ = ROPE_TYPES[rope_type]
    theta = read_theta(entries, rope_theta)
    _add_argument(entries, PARTIAL, partial_rotary_factor, "partial_rotary_factor")
    _add_argument(entries, ORIGINAL, original_length, "original_length")
    reads_lengths = ORIGINAL in required or rope_type == "linear" and original_length is not None
    if extended_length is not None and reads_lengths:
        _add_factor(entries, rope_type, extended_length)
    partial = entries.setdefault(PARTIAL, 1.0)
    for key in required:
        if key not in entries:
            advice = ""
            if key == ORIGINAL:
                advice = "; pass original_length, the tokens trained on"
            elif key == "factor" and rope_type in ("yarn", "longrope"):
                advice = "; or pass extended_length, the tokens extended to"
            raise ValueError(f"{key!r} is missing: rope_type={rope_type!r} needs it{advice}")
    knobs = {
        _FIELDS.get(key, key): _convert(key, entries[key])
        for key in (*required, *optional)
        if key in entries
    }
    step = None if scaling is None else scaling(**knobs)
    attn_factor = number("attn_factor", entries.get("attn_factor", 1))
    if isinstance(step, YaRN) and attn_factor != 1:
        factor = step.effective_attention_factor
        log.warning(
            "'attn_factor' is %g: ignored, as Hugging Face does; cosine and sine grow by %.9g. "
            "Engines such as vLLM multiply by it: with 'attention_factor': %.9g they grow by that",
            attn_factor,
            factor,
            attn_factor * factor,
        )
    method = RoPE(
        theta,
        partial_rotary_factor=1.0 if PARTIAL in required else number(PARTIAL, partial),
        scaling=() if step is None else (step,),
    )
    if head_dim is not None:
        method.check(ModelShape(head_dim, 1, 1, 1, head_dim))
        if difference := inverted_ramp_message(method, head_dim):
            log.warning("%s; this is YaRN", difference)
    return method


def to_rope_parameters(method: PositionEmbedding) -> dict[str, Any]:
    """The ``rope_parameters`` of a method for Hugging Face; ValueError if they cannot express it.

    ``PRoPE`` is written as ``proportional``, ``AdjustedBase`` as the base. Set
    ``max_position_embeddings`` to the trained length for ``dynamic``, to the extended one for
    ``yarn``, ``longrope`` and ``llama3``.

    >>> to_rope_parameters(RoPE(500_000.0, scaling=(Llama3(8.0, 8192),)))["rope_type"]
    'llama3'
    """
    if not isinstance(method, RoPE):
        hint = "; use fope_to_rope_parameters" if isinstance(method, FoPE) else ""
        raise ValueError(f"{method}: rope_parameters can say RoPE only{hint}")
    for knob in ("interleaved", "learnable"):
        if getattr(method, knob):
            raise ValueError(f"{knob}=True: rope_parameters cannot say it")
    theta, chain = method.theta, method.scaling
    if chain and isinstance(chain[0], AdjustedBase):
        theta, chain = chain[0].theta, chain[1:]
    if len(chain) > 1:
        names = ", ".join(type(step).__name__ for step in chain)
        raise ValueError(f"scaling holds {names}: rope_parameters can say one")
    parameters: dict[str, Any] = {"rope_type": "default"}
    if chain:
        parameters = _scaling_parameters(chain[0])
    if method.partial_rotary_factor != 1:
        if PARTIAL in parameters:
            raise ValueError(
                f"partial_rotary_factor={method.partial_rotary_factor}: with rope_type="
                "'proportional' this key is the share of the frequencies kept; RoPE's must be 1"
            )
        parameters[PARTIAL] = method.partial_rotary_factor
    return parameters | {THETA: theta}


def _scaling_parameters(step: Scaling) -> dict[str, Any]:
    """The type and keys of one scaling, optional keys only if not at their defaults."""
    if isinstance(step, PRoPE):
        step = Proportional(step.share)
    length = getattr(step, "length", None)
    if length is not None:
        raise ValueError(
            f"length={length}: rope_parameters cannot fix the length, which "
            "Hugging Face takes from each batch"
        )
    names = [name for name, known in ROPE_TYPES.items() if known.scaling is type(step)]
    if not names:
        advice = ""
        if isinstance(step, NTKAware):
            advice = (
                f"; the same frequencies come from theta * {step.factor:g} ** (H / (H - 2)) for H "
                "dimensions that rotate"
            )
        raise ValueError(f"scaling={step}: rope_parameters cannot say it{advice}")
    _, required, optional, _ = ROPE_TYPES[names[0]]
    defaults = {field.name: field.default for field in dataclasses.fields(step)}
    parameters: dict[str, Any] = {"rope_type": names[0]}
    for key in (*required, *optional):
        name = _FIELDS.get(key, key)
        value = getattr(step, name)
        if key in required or value != defaults[name]:
            parameters[key] = list(value) if isinstance(value, tuple) else value
    return parameters


def is_fope(parameters: Mapping[str, Any]) -> bool:
    """Whether ``rope_parameters`` have a key of FoPE; ``"use_fope": False`` turns it off.

    >>> is_fope({"num_inv_freq": 16}), is_fope({"num_inv_freq": 16, "use_fope": False})
    (True, False)
    """
    given = {FOPE_SPELLINGS.get(key, key) for key, value in parameters.items() if value is not None}
    return bool(given.intersection(FOPE_KEYS)) and parameters.get("use_fope") is not False


def inverted_ramp_message(method: RoPE, head_dim: int) -> str | None:
    """How transformers differs from YaRN if the ramp lies beyond the frequencies, or None.

    Transformers clips each end of the ramp to the frequencies, so an end outside passes the other.
    """
    dims = round(head_dim * method.partial_rotary_factor)
    for step in method.scaling:
        if isinstance(step, YaRN):
            low, high = step.ramp_ends(dims, method.theta)
            if high < 0 or low > dims - 1:
                here, there = ("interpolates", "keeps") if high < 0 else ("keeps", "interpolates")
                return (
                    f"beta_fast={step.beta_fast:g}, beta_slow={step.beta_slow:g}, {ORIGINAL}="
                    f"{step.original_length}, {THETA}={method.theta:g}: YaRN {here} all "
                    f"{dims // 2} frequencies, Hugging Face {there} them"
                )
    return None


# ---------------------------------------------------------------------------- keys and values


def canonical_type(name: Any) -> Any:
    """The ``rope_type``; ``su`` is Phi-3's first name for ``longrope``."""
    return "longrope" if name == "su" else name


def read_keys(
    parameters: Mapping[str, Any], types: Mapping[str, Iterable[str]]
) -> tuple[str, dict[str, Any]]:
    """The type of ``rope_parameters`` and its keys, without neutral ones and entries of None.

    ``types`` holds the keys of each type, besides base and partial rotary factor. ValueError for a
    type that is missing or unknown, and for all keys that it does not have.
    """
    entries = {key: value for key, value in parameters.items() if value is not None}
    names = [canonical_type(entries.pop(key)) for key in ("rope_type", "type") if key in entries]
    if not names:
        raise ValueError("'rope_type' is missing: pass 'default' for plain RoPE")
    if len(names) > 1 and names[0] != names[1]:
        raise ValueError(f"'rope_type' is {names[0]!r}, 'type' is {names[1]!r}: leave one out")
    rope_type = names[0]
    if rope_type not in tuple(types):  # a tuple, because the type may be unhashable
        raise ValueError(f"'rope_type' is {rope_type!r}{nearest(rope_type, types)}")
    known = list(dict.fromkeys(("rope_type", THETA, PARTIAL, *types[rope_type])))
    problems = [
        f"unknown key {key!r} of rope_type={rope_type!r} with the value {value!r:.80}"
        + (f" (did you mean {meant!r}?)" if (meant := likely(key, known)) else "")
        for key, value in entries.items()
        if key not in known and value not in _NEUTRAL.get(key, ())
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Known: {', '.join(known)}")
    return rope_type, {key: value for key, value in entries.items() if key in known}


def read_theta(entries: dict[str, Any], rope_theta: float | None) -> float:
    """The base, from the keys or the argument."""
    _add_argument(entries, THETA, rope_theta, "rope_theta")
    if THETA not in entries:
        raise ValueError(
            f"{THETA!r} is missing: Hugging Face takes a default of the model; pass rope_theta"
        )
    return number(THETA, entries[THETA])


def _add_argument(entries: dict[str, Any], key: str, argument: Any, name: str) -> None:
    """Adds the argument's value; ValueError if the key differs."""
    if argument is None:
        return
    if key in entries and (given := number(key, entries[key])) != argument:
        raise ValueError(f"{key!r} is {given:g}, {name}={argument}: leave one out")
    _convert(key, argument, name)
    entries.setdefault(key, argument)


def _add_factor(entries: dict[str, Any], rope_type: str, extended_length: Any) -> None:
    """Adds the factor implied by the lengths; ValueError if a given one differs."""
    extended = number("extended_length", extended_length)
    if rope_type == "dynamic":
        raise ValueError(
            f"extended_length={extended}: rope_type='dynamic' stretches to any length; "
            "max_position_embeddings is the trained length here, pass original_length"
        )
    if ORIGINAL not in entries:
        return
    trained = _convert(ORIGINAL, entries[ORIGINAL])
    if rope_type == "llama3":  # Llama 3.1 extends by 16 with a factor of 8, so they may differ
        if extended <= trained:
            raise ValueError(
                f"extended_length={extended}: rope_type='llama3' extends beyond the {trained} "
                "tokens trained on"
            )
        return
    factor = number("factor", entries.setdefault("factor", extended / trained))
    if not math.isclose(factor, extended / trained, rel_tol=1e-6):
        raise ValueError(
            f"'factor' is {factor:g}, extended_length={extended} over {trained} trained tokens is "
            f"{extended / trained:g}: Hugging Face would take {factor:g}; leave one out"
        )


def _convert(key: str, value: Any, name: str | None = None) -> Any:
    """``value`` in the type that ``key`` needs; ``name`` is for messages."""
    name = name or key
    if key == ORIGINAL:
        if (length := integer(name, value)) < 1:
            raise ValueError(f"{name!r} is {length}: the trained length in tokens is 1 or more")
        return length
    if key == "truncate":
        return flag(name, value)
    if key in ("short_factor", "long_factor"):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"{name!r} is {value!r}: expected a list of numbers, one a frequency")
        return tuple(number(f"{name}[{index}]", entry) for index, entry in enumerate(value))
    return number(name, value)


def number(name: str, value: Any) -> float:
    """``value``; ValueError unless it is a finite number."""
    value = value.item() if isinstance(value, np.number) else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer from JSON can be too large for a float.
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name!r} is {value!r}: expected a finite number")
    return value


def integer(name: str, value: Any) -> int:
    """``value``; ValueError unless it is a whole number."""
    if number(name, value) != int(value):
        raise ValueError(f"{name!r} is {value!r}: expected a whole number")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """``value``; ValueError unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name!r} is {value!r}: expected True or False")
    return bool(value)
