"""The table of methods: names to classes, construction by name, and fingerprints."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.absolute import Learned, Sinusoidal
from fope_jax.position.alibi import ALiBi
from fope_jax.position.base import ModelShape, NoPE, PositionEmbedding, PositionVariables
from fope_jax.position.fope import FoPE
from fope_jax.position.rope import RoPE

METHODS: dict[str, type[PositionEmbedding]] = {
    "nope": NoPE,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rope": RoPE,
    "alibi": ALiBi,
    "fope": FoPE,
}

PRESETS = {("fope", "official"): FoPE.official, ("fope", "equations"): FoPE.equations}


def make(name: str, *, preset: str | None = None, **knobs: Any) -> PositionEmbedding:
    """Builds a method from its name and knobs, as configs do.

    Args:
      name: a key of ``METHODS``.
      preset: a named set of knobs, such as FoPE's ``official`` and ``equations``; None for the
        method's defaults.
      **knobs: the method's own fields, on top of the preset.

    Raises:
      ValueError: unknown name, preset or knob (with the nearest known one), a required knob
        missing, or a value out of range.

    >>> make("rope", theta=500_000.0)
    RoPE(theta=500000.0, interleaved=False)
    """
    if name not in METHODS:
        raise ValueError(f"unknown position embedding {name!r}{_nearest(name, METHODS)}")
    method = METHODS[name]
    builder: Any = method
    if preset is not None:
        presets = [known for owner, known in PRESETS if owner == name]
        if preset not in presets:
            raise ValueError(f"unknown preset {preset!r} of {name}{_nearest(preset, presets)}")
        builder = PRESETS[name, preset]
    known = dataclasses.fields(method)
    names = [field.name for field in known]
    for knob in knobs:
        if knob not in names:
            raise ValueError(f"unknown knob {knob!r} of {name}{_nearest(knob, names)}")
    for field in known:
        if field.default is dataclasses.MISSING and field.name not in knobs:
            raise ValueError(f"{name} needs the knob {field.name!r}")
    return builder(**knobs)


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
    method: PositionEmbedding, shape: ModelShape, variables: PositionVariables
) -> Fingerprint:
    """Identifies the effective position embedding of a model.

    The hash covers the method, its knobs, the shape it serves, its frequencies (as float32) and
    the bytes of its constants. Trained parameters are left out: they change with every step.

    Args:
      method: the position embedding.
      shape: the model's shape.
      variables: what ``method.init`` drew, or what a checkpoint restored.

    Returns:
      The first 16 hex digits of a SHA-256, and one line of text.

    >>> shape = ModelShape(d_model=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4)
    >>> fingerprint(RoPE(), shape, RoPE().init(None, shape)).summary
    'rope(theta=10000.0, interleaved=False) 2 frequencies 0.01..1 rad/token'
    """
    knobs = dataclasses.asdict(method)
    description = [name_of(method), knobs, list(shape)]
    digest = hashlib.sha256()
    digest.update(json.dumps(description, sort_keys=True, default=np.generic.item).encode())
    summary = f"{name_of(method)}({', '.join(f'{k}={v}' for k, v in knobs.items())})"
    frequencies = method.frequencies(shape.head_dim)
    if frequencies is not None:
        effective = np.asarray(frequencies, np.float32)
        digest.update(effective.astype("<f4").tobytes())
        summary += (
            f" {effective.size} frequencies {effective.min():.4g}..{effective.max():.4g} rad/token"
        )
    constants = hashlib.sha256()
    owned = {**variables.model_constants, **variables.layer_constants}
    for label in sorted(owned):
        array = np.asarray(owned[label])
        constants.update(json.dumps([label, str(array.dtype), array.shape]).encode())
        constants.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    digest.update(constants.digest())
    if owned:
        summary += f" constants {constants.hexdigest()[:8]}"
    return Fingerprint(digest.hexdigest()[:16], summary)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    nearest = f"; did you mean {close[0]!r}?" if close else "."
    return f"{nearest} Known: {', '.join(known) or 'none'}"
