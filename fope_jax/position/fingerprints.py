"""Fingerprints: what a position embedding effectively does, to compare runs and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.base import ModelShape, PositionEmbedding, PositionVariables
from fope_jax.position.registry import split_spec, to_spec


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

    >>> from fope_jax.position import NTKAware, RoPE
    >>> shape = ModelShape(d_model=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4)
    >>> fingerprint(RoPE(scaling=(NTKAware(factor=4.0),)), shape).summary
    ... # doctest: +ELLIPSIS
    'rope(theta=10000, ..., scaling=[ntk(factor=4)], ...) 2 frequencies 0.0025..1 rad/token'
    """
    digest = hashlib.sha256(json.dumps([_hashed(method), shape], sort_keys=True).encode())
    summary = _text(to_spec(method))
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


def _hashed(value: Any) -> Any:
    """``to_spec`` with every number a float, so that 1 and 1.0 have one hash; True stays True.

    A knob that a method got after it was released (``metadata={"added_later": True}``) counts only
    where it is not at its default: checkpoints from before it keep their fingerprint.
    """
    if isinstance(value, (list, tuple)):
        return [_hashed(item) for item in value]
    if not dataclasses.is_dataclass(value):
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return float(value) if is_number else value
    spec = {key: name for key, name in to_spec(value).items() if key in ("method", "scaling")}
    for field in dataclasses.fields(value):
        knob = getattr(value, field.name)
        if not field.metadata.get("added_later") or knob != field.default:
            spec[field.name] = _hashed(knob)
    # "quarter" was the name of "official" in FoPEs that clip: their checkpoints hold its hash.
    is_official = spec.get("method") == "fope" and spec["outputs"] == "official"
    if is_official and (spec["clip"] or not spec["drop_zero"]):
        spec["outputs"] = "quarter"
    return spec


def _text(spec: Any) -> str:
    """A specification in one line, for people."""
    if isinstance(spec, list):
        return f"[{', '.join(map(_text, spec))}]"
    if isinstance(spec, float):
        return f"{spec:g}"
    if not isinstance(spec, dict):
        return str(spec)
    _, name, knobs = split_spec(spec)
    return f"{name}({', '.join(f'{knob}={_text(value)}' for knob, value in knobs.items())})"
