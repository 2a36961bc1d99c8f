"""Hugging Face's ``rope_parameters`` to methods and back; for FoPE see ``serving``.

A configuration there has one ``max_position_embeddings`` with two meanings: for ``dynamic`` it is
the length that the model was trained on, for ``yarn``, ``longrope`` and ``llama3`` the length that
it was extended to. Here they are two arguments, ``original_length`` and ``extended_length``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fope_jax.interop.keys import (
    ORIGINAL,
    SHARE,
    THETA,
    Given,
    either,
    flag,
    integer,
    number,
    numbers,
    uniform,
)
from fope_jax.interop.serving import FOPE_KEYS, SPELLINGS, says_fope
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

log = logging.getLogger(__name__)

# What each type reads, besides its name, the base and the share of dimensions that rotate.
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", ORIGINAL),
    "yarn": (
        "factor",
        ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("short_factor", "long_factor", ORIGINAL, "factor", "attention_factor"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}
# What stands beside a type that transformers passes over there, and so does this.
PASSED_OVER: dict[str, tuple[str, ...]] = {
    "default": (ORIGINAL,),  # a fact about the training that these two have no use for
    "linear": (ORIGINAL,),
    "yarn": ("attn_factor",),  # with a warning, as engines multiply by it
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
    """The method that a model of Hugging Face with these ``rope_parameters`` uses.

    What Hugging Face assumes or overlooks with a warning raises here, all unknown keys at once.
    Passed over is what changes no number, such as ``truncate`` beside types that do not round, and
    with a warning yarn's ``attn_factor``: Hugging Face does not read it, engines multiply by it.
    The older ``rope_scaling``, whose type may be spelled ``type`` and longrope ``su``, is read as
    well: pass the base that stands beside it in the configuration as ``rope_theta``. An entry of
    None counts as not given.

    Args:
      parameters: ``rope_parameters`` or ``rope_scaling`` of a configuration; of one that is nested
        by layer type, one entry.
      head_dim: H; given, the method is checked to fit it.
      original_length: tokens trained on, where the parameters do not hold it: the configuration's
        ``max_position_embeddings`` for ``dynamic``, its ``original_max_position_embeddings`` for
        Phi-3.
      extended_length: tokens extended to, the configuration's ``max_position_embeddings`` for
        ``yarn``, ``longrope`` and ``llama3``. Gives a ``factor`` that the parameters do not hold,
        and is compared with one that they do hold.
      rope_theta: the base, where the parameters do not hold it.
      partial_rotary_factor: the share of dimensions that rotate, where they do not hold it.

    Returns:
      RoPE with at most one scaling. ``dynamic`` and ``longrope`` follow the length of each row;
      Hugging Face follows the longest row of the batch, and ``dynamic`` stays stretched until a
      sequence within the trained length comes.

    Raises:
      ValueError: a key is unknown, missing, of the wrong kind, or contradicts another or an
        argument.

    >>> keys = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0}
    >>> from_rope_parameters(keys).scaling
    (PositionInterpolation(factor=4.0),)

    Reference: ``ROPE_INIT_FUNCTIONS`` of Hugging Face transformers 5.23.0.
    """
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"rope_parameters is nested by {', '.join(map(repr, nested))}: pass the entry of "
            "one layer type, and combine the methods with ByLayer"
        )
    fourier = [key for key in parameters if SPELLINGS.get(key, key) in FOPE_KEYS]
    if says_fope(parameters):
        raise ValueError(f"{fourier[0]!r} is a key of FoPE: use fope_from_rope_parameters")
    plain = {key: value for key, value in parameters.items() if key not in fourier}
    known = {kind: (*keys, *PASSED_OVER.get(kind, ())) for kind, keys in KEYS.items()}
    given = uniform(plain, tuple(KEYS), known)
    theta = given.theta(rope_theta)
    share = either(given, SHARE, partial_rotary_factor, "partial_rotary_factor")
    share = 1.0 if share is None else share
    lengths = _Lengths(original_length, extended_length)
    scaling = _SCALINGS[given.rope_type](given, lengths, share)
    if given.rope_type == "proportional":
        share = 1.0
    method = RoPE(theta, partial_rotary_factor=share, scaling=scaling)
    if head_dim is not None:
        method.check(ModelShape(head_dim, 1, 1, 1, head_dim))
        if difference := inverted_ramp(method, head_dim):
            log.warning("%s; this is YaRN", difference)
    return method


def to_rope_parameters(method: PositionEmbedding) -> dict[str, Any]:
    """The ``rope_parameters`` with which a model of Hugging Face uses this method.

    Two lengths stand elsewhere in its configuration, as ``max_position_embeddings``: the trained
    length for ``dynamic`` (also written here, where Hugging Face does not look for it), the
    extended one for ``yarn``, ``longrope`` and ``llama3``.

    Args:
      method: RoPE. Scalings with another name there go by it: ``PRoPE`` as ``proportional``,
        ``AdjustedBase`` as the base.

    Raises:
      ValueError: the method, or a part of it, cannot be said there.

    >>> to_rope_parameters(RoPE(500_000.0, scaling=(Llama3(8.0, 8192),)))["rope_type"]
    'llama3'

    Reference: as ``from_rope_parameters``.
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
    said: dict[str, Any] = _said(chain[0]) if chain else {"rope_type": "default"}
    if method.partial_rotary_factor != 1:
        if said["rope_type"] == "proportional":
            raise ValueError(
                f"partial_rotary_factor={method.partial_rotary_factor}: with rope_type="
                "'proportional' this key is the share of the frequencies kept; RoPE's must be 1"
            )
        said[SHARE] = method.partial_rotary_factor
    return said | {THETA: theta}


class _Lengths(NamedTuple):
    """The two lengths that ``max_position_embeddings`` may mean, in tokens, where known."""

    original: int | None
    extended: int | None

    def trained(self, given: Given) -> int:
        """The trained length, of the parameters or the argument."""
        length = either(given, ORIGINAL, self.original, "original_length")
        if length is None:
            length = given.number(ORIGINAL, "pass original_length, the tokens trained on")
        name = ORIGINAL if ORIGINAL in given.entries else "original_length"
        if integer(name, length) < 1:
            raise ValueError(f"{name!r} is {length}: the trained length in tokens is 1 or more")
        return int(length)

    def factor(self, given: Given) -> float:
        """``factor``, or the extended length over the trained one; both must agree."""
        trained = self.trained(given)
        if self.extended is None:
            return given.number("factor", "or pass extended_length, the tokens extended to")
        implied = number("extended_length", self.extended) / trained
        factor = given.number("factor") if "factor" in given.entries else implied
        if not math.isclose(factor, implied, rel_tol=1e-6):
            raise ValueError(
                f"'factor' is {factor:g}, extended_length={self.extended} over {trained} trained "
                f"tokens is {implied:g}: Hugging Face would take {factor:g}; leave one out"
            )
        return factor


def _linear(given: Given, lengths: _Lengths, share: float) -> tuple[Scaling, ...]:
    if lengths.original is None:
        return (PositionInterpolation(given.number("factor")),)
    return (PositionInterpolation(lengths.factor(given)),)


def _dynamic(given: Given, lengths: _Lengths, share: float) -> tuple[Scaling, ...]:
    if lengths.extended is not None:
        raise ValueError(
            f"extended_length={lengths.extended}: rope_type='dynamic' stretches to any length; "
            "max_position_embeddings is the trained length here, pass original_length"
        )
    return (DynamicNTK(given.number("factor"), lengths.trained(given)),)


def _yarn(given: Given, lengths: _Lengths, share: float) -> tuple[Scaling, ...]:
    names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    yarn = YaRN(
        lengths.factor(given),
        lengths.trained(given),
        **given.numbers(*names),
        truncate=flag("truncate", given.entries.get("truncate", True)),
    )
    other = given.numbers("attn_factor").get("attn_factor", 1)
    if other != 1:
        factor = yarn.effective_attention_factor
        log.warning(
            "'attn_factor' is %g: passed over, as Hugging Face does; cosine and sine grow by %.9g. "
            "Engines such as vLLM multiply by it: with 'attention_factor': %.9g they grow by that",
            other,
            factor,
            other * factor,
        )
    return (yarn,)


def inverted_ramp(method: RoPE, head_dim: int) -> str | None:
    """What to say where YaRN's ramp is beyond the frequencies: there Hugging Face inverts it.

    It cuts either end at the grid, so that an end that lies outside comes behind the other.
    """
    dims = round(head_dim * method.partial_rotary_factor)
    for step in method.scaling:
        if isinstance(step, YaRN):
            low, high = step.ramp_ends(dims, method.theta)
            if high < 0 or low > dims - 1:
                does, other = ("interpolates", "keeps") if high < 0 else ("keeps", "interpolates")
                return (
                    f"beta_fast={step.beta_fast:g}, beta_slow={step.beta_slow:g}, {ORIGINAL}="
                    f"{step.original_length}, {THETA}={method.theta:g}: YaRN {does} all "
                    f"{dims // 2} frequencies, Hugging Face {other} them"
                )
    return None


def _longrope(given: Given, lengths: _Lengths, share: float) -> tuple[Scaling, ...]:
    return (
        LongRoPE(
            numbers("short_factor", given.value("short_factor")),
            numbers("long_factor", given.value("long_factor")),
            lengths.trained(given),
            lengths.factor(given),
            given.numbers("attention_factor").get("attention_factor"),
        ),
    )


def _llama3(given: Given, lengths: _Lengths, share: float) -> tuple[Scaling, ...]:
    trained = lengths.trained(given)
    # Llama 3.1 extends by 16 with a factor of 8, so the two need not agree.
    if lengths.extended is not None and lengths.extended <= trained:
        raise ValueError(
            f"extended_length={lengths.extended}: rope_type='llama3' extends beyond the {trained} "
            "tokens trained on"
        )
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    return (Llama3(given.number("factor"), trained, low, high),)


def _proportional(given: Given, lengths: _Lengths, share: float) -> tuple[Scaling, ...]:
    return (Proportional(share, **given.numbers("factor")),)


_SCALINGS: dict[str, Callable[[Given, _Lengths, float], tuple[Scaling, ...]]] = {
    "default": lambda given, lengths, share: (),
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def _said(step: Scaling) -> dict[str, Any]:
    """The type of one scaling and its keys, those at their defaults left out where they may be."""
    length = getattr(step, "length", None)
    if length is not None:
        raise ValueError(
            f"length={length}: rope_parameters cannot fix the length, which "
            "Hugging Face takes from each batch"
        )
    match step:
        case PositionInterpolation():
            return {"rope_type": "linear", "factor": step.factor}
        case DynamicNTK():
            return {"rope_type": "dynamic", "factor": step.factor, ORIGINAL: step.original_length}
        case YaRN():
            base = YaRN(step.factor, step.original_length)
            names = KEYS["yarn"][2:]
            changed = [name for name in names if getattr(step, name) != getattr(base, name)]
            said = {"rope_type": "yarn", "factor": step.factor, ORIGINAL: step.original_length}
            return said | {name: getattr(step, name) for name in changed}
        case LongRoPE():
            said = {
                "rope_type": "longrope",
                "short_factor": list(step.short_factor),
                "long_factor": list(step.long_factor),
                ORIGINAL: step.original_length,
                "factor": step.factor,
            }
            if step.attention_factor is not None:
                said["attention_factor"] = step.attention_factor
            return said
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": step.factor,
                ORIGINAL: step.original_length,
                "low_freq_factor": step.low_freq_factor,
                "high_freq_factor": step.high_freq_factor,
            }
        case Proportional() | PRoPE():
            said = {"rope_type": "proportional", SHARE: step.share}
            factor = getattr(step, "factor", 1.0)
            return said if factor == 1 else said | {"factor": factor}
        case NTKAware():
            raise ValueError(
                f"scaling={step}: rope_parameters cannot say it; the same frequencies come from "
                f"theta * {step.factor:g} ** (H / (H - 2)) for H dimensions that rotate"
            )
    raise ValueError(f"scaling={step}: rope_parameters cannot say it")
