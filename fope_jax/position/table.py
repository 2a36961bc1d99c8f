"""The table of methods: names to classes, specifications to methods and back, fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.absolute import Learned, Sinusoidal
from fope_jax.position.alibi import ALiBi
from fope_jax.position.base import ModelShape, NoPE, PositionEmbedding, PositionVariables
from fope_jax.position.checks import find, nearest
from fope_jax.position.contextual import CoPE
from fope_jax.position.fope import FoPE
from fope_jax.position.logit_scaling import LogitScaling
from fope_jax.position.mixing import ByLayer, ByShare
from fope_jax.position.relative_bias import FIRE, Kerple, T5Bias
from fope_jax.position.rope import RoPE
from fope_jax.position.scaling import (
    AdjustedBase,
    ClipFloor,
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    PRoPE,
    Proportional,
    Scaling,
    SnapToCycles,
    YaRN,
)
from fope_jax.position.xpos import XPos

METHODS: dict[str, type[PositionEmbedding]] = {
    "nope": NoPE,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rope": RoPE,
    "xpos": XPos,
    "fope": FoPE,
    "alibi": ALiBi,
    "t5": T5Bias,
    "kerple": Kerple,
    "fire": FIRE,
    "cope": CoPE,
    "by_layer": ByLayer,
    "by_share": ByShare,
    "logit_scaling": LogitScaling,
}

PRESETS = {("fope", "official"): FoPE.official, ("fope", "equations"): FoPE.equations}

SCALINGS: dict[str, type[Scaling]] = {
    "position_interpolation": PositionInterpolation,
    "ntk": NTKAware,
    "dynamic_ntk": DynamicNTK,
    "yarn": YaRN,
    "llama3": Llama3,
    "longrope": LongRoPE,
    "proportional": Proportional,
    "adjusted_base": AdjustedBase,
    "clip_floor": ClipFloor,
    "snap_to_cycles": SnapToCycles,
    "p_rope": PRoPE,
}


def make(name: str, *, preset: str | None = None, **knobs: Any) -> PositionEmbedding:
    """Builds a method from its name and knobs, as configs do.

    Args:
      name: a key of ``METHODS``.
      preset: a named set of knobs, such as FoPE's ``official`` and ``equations``; None for the
        method's defaults.
      **knobs: the method's own fields, on top of the preset. A method or scaling inside them may be
        a specification (see ``from_spec``).

    Raises:
      ValueError: unknown name, preset or knob (with the nearest known one), a required knob
        missing, or a value out of range.

    >>> make("rope", theta=500_000.0).theta
    500000.0
    >>> make("rope", scaling=[{"scaling": "position_interpolation", "factor": 2.0}]).scaling
    (PositionInterpolation(factor=2.0),)
    """
    builder = find("position embedding", name, METHODS)
    if preset is not None:
        presets = [known for owner, known in PRESETS if owner == name]
        if preset not in presets:
            raise ValueError(f"unknown preset {preset!r} of {name}{nearest(preset, presets)}")
    method = _check_knobs(name, builder, knobs)
    return (PRESETS[name, preset] if preset is not None else builder)(**method)


def make_scaling(name: str, **knobs: Any) -> Scaling:
    """Builds a scaling from its name and knobs.

    Raises:
      ValueError: as ``make``.

    >>> make_scaling("ntk", factor=4.0)
    NTKAware(factor=4.0)
    """
    return (cls := find("scaling", name, SCALINGS))(**_check_knobs(name, cls, knobs))


def from_spec(value: Any) -> Any:
    """Plain values to methods and scalings: what configuration files hold.

    A mapping with the key ``method`` becomes a method, one with ``scaling`` as its name a scaling,
    a list a tuple; anything else is kept.

    >>> from_spec({"method": "by_layer", "methods": [{"method": "rope"}, {"method": "nope"}]})
    ... # doctest: +ELLIPSIS
    ByLayer(methods=(RoPE(...), NoPE()))
    """
    if isinstance(value, Mapping):
        key, name, knobs = pieces_for_key(value)
        if name is None:
            raise ValueError(
                f"{dict(value)}: expected 'method', or 'scaling' with the name of a scaling"
            )
        return (make if key == "method" else make_scaling)(name, **knobs)
    if isinstance(value, (list, tuple)):
        return tuple(from_spec(item) for item in value)
    return value


def pieces_for_key(spec: Any) -> tuple[str, Any, dict[str, Any]]:
    """``method`` or ``scaling``, its name, None where there is none, and the knobs.

    >>> pieces_for_key({"scaling": "ntk", "factor": 4.0})
    ('scaling', 'ntk', {'factor': 4.0})
    """
    knobs = dict(spec)
    # A method has a knob ``scaling`` too, which is a list.
    scaling = "method" not in knobs and isinstance(knobs.get("scaling"), str)
    key = "scaling" if scaling else "method"
    return key, knobs.pop(key, None), knobs


def to_spec(value: Any) -> Any:
    """The inverse of ``from_spec``: only dicts, lists, strings, numbers, booleans and None.

    >>> to_spec(RoPE(scaling=(PositionInterpolation(2.0),)))["scaling"]
    [{'scaling': 'position_interpolation', 'factor': 2.0}]
    """
    return _spec(value, dataclasses.fields)


def _spec(value: Any, fields_of: Callable[[Any], Iterable[Any]]) -> Any:
    def knobs() -> dict[str, Any]:
        return {f.name: _spec(getattr(value, f.name), fields_of) for f in fields_of(value)}

    for key, known in (("method", METHODS), ("scaling", SCALINGS)):
        for name, cls in known.items():
            if type(value) is cls:
                return {key: name} | knobs()
    if dataclasses.is_dataclass(value):  # a method of someone else's
        return {"method": type(value).__name__} | knobs()
    if isinstance(value, (list, tuple)):
        return [_spec(item, fields_of) for item in value]
    return value


def _hashed_fields(value: Any) -> list[Any]:
    """The fields that ``fingerprint`` covers.

    A knob that a method got after it was released (``metadata={"added_later": True}``) counts only
    where it is not at its default: checkpoints from before it keep their fingerprint.
    """
    return [
        f
        for f in dataclasses.fields(value)
        if not f.metadata.get("added_later") or getattr(value, f.name) != f.default
    ]


def name_of(method: PositionEmbedding) -> str:
    """The name under which ``METHODS`` lists the method's class.

    >>> name_of(RoPE())
    'rope'
    """
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    return type(method).__name__


class Fingerprint(NamedTuple):
    """What a position embedding effectively does: a hash to compare and a text to read."""

    hash: str
    summary: str


def fingerprint(
    method: PositionEmbedding,
    shape: ModelShape | None = None,
    variables: PositionVariables | None = None,
) -> Fingerprint:
    """Identifies the effective position embedding of a model.

    The hash covers the method and its knobs, down to the methods and scalings inside it; with a
    shape also the shape and the frequencies (as float32); with variables the bytes of the
    constants. Trained parameters are left out: they change with every step. Numbers that are equal
    (10000 and 10000.0) count as equal. It holds nothing of the process, the platform or the
    sharding; a fresh draw of coefficients may differ in its last bits between a CPU and a TPU, and
    then so does its hash, while a checkpoint carries its bytes anywhere.

    Args:
      method: the position embedding.
      shape: the model's shape; None leaves out what depends on it.
      variables: what ``method.init`` drew, or what a checkpoint restored.

    Returns:
      The first 16 hex digits of a SHA-256, and one line of text.

    >>> shape = ModelShape(d_model=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4)
    >>> fingerprint(RoPE(scaling=(NTKAware(factor=4.0),)), shape).summary
    ... # doctest: +ELLIPSIS
    'rope(theta=10000, ..., scaling=[ntk(factor=4)], ...) 2 frequencies 0.0025..1 rad/token'
    """
    spec = to_spec(method)
    digest = hashlib.sha256()
    hashed = _as_hashed(_spec(method, _hashed_fields))
    digest.update(json.dumps([hashed, shape], sort_keys=True).encode())
    summary = _text(spec)
    frequencies = None if shape is None else method.frequencies(shape.head_dim)
    if frequencies is not None:
        effective = np.asarray(frequencies, np.float32)
        digest.update(effective.astype("<f4").tobytes())
        summary += (
            f" {effective.size} frequencies {effective.min():.4g}..{effective.max():.4g} rad/token"
        )
    owned: dict[str, Any] = {}
    if variables is not None:
        owned = {**variables.model_constants, **variables.layer_constants}
    constants = hashlib.sha256()
    for label in sorted(owned):
        array = np.asarray(owned[label])
        constants.update(json.dumps([label, str(array.dtype), array.shape]).encode())
        constants.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    digest.update(constants.digest())
    if owned:
        summary += f" constants {constants.hexdigest()[:8]}"
    return Fingerprint(digest.hexdigest()[:16], summary)


def _as_hashed(spec: Any) -> Any:
    """``spec`` with every number a float, so that 1 and 1.0 have one hash; True stays True."""
    if isinstance(spec, dict):
        hashed = {key: _as_hashed(value) for key, value in spec.items()}
        # "quarter" was the name of "official" in FoPEs that clip: their checkpoints hold its hash.
        same = spec.get("clip", False) or not spec.get("drop_zero", True)
        if spec.get("method") == "fope" and spec["outputs"] == "official" and same:
            hashed["outputs"] = "quarter"
        return hashed
    if isinstance(spec, list):
        return [_as_hashed(value) for value in spec]
    number = isinstance(spec, (int, float, np.number)) and not isinstance(spec, bool)
    return float(spec) if number else spec


def _text(spec: Any) -> str:
    """A specification in one line, for people."""
    if isinstance(spec, list):
        return f"[{', '.join(map(_text, spec))}]"
    if isinstance(spec, float):
        return f"{spec:g}"
    if not isinstance(spec, dict):
        return str(spec)
    _, name, knobs = pieces_for_key(spec)
    return f"{name}({', '.join(f'{knob}={_text(value)}' for knob, value in knobs.items())})"


def _check_knobs(name: str, cls: type, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs with nested specifications built."""
    fields: Any = dataclasses.fields(cls)
    names = [field.name for field in fields]
    for knob in knobs:
        if knob not in names:
            raise ValueError(f"unknown knob {knob!r} of {name}{nearest(knob, names)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in knobs:
            raise ValueError(f"{name} needs the knob {field.name!r}")
    return {knob: from_spec(value) for knob, value in knobs.items()}
