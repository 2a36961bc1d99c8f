"""Fingerprints: hashes of a position embedding's effect, to compare runs and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.base import ModelShape, PositionEmbedding, PositionVariables
from fope_jax.position.registry import split_spec, to_spec


class Fingerprint(NamedTuple):
    """A hash to compare and a one-line text to read."""

    hash: str
    summary: str


def fingerprint(
    method: PositionEmbedding,
    shape: ModelShape | None = None,
    variables: PositionVariables | None = None,
) -> Fingerprint:
    """The hash (16 hex digits of a SHA-256) and a summary of a model's position embedding.

    The hash covers the method with its knobs and nested methods; with ``shape`` also the shape and
    the float32 frequencies; with ``variables`` (from ``init`` or a checkpoint) the bytes of the
    constants. Trained parameters are left out because they change every step. Equal numbers (10000
    and 10000.0) hash alike. The hash does not depend on process, platform or sharding, but freshly
    drawn coefficients may differ in the last bits between CPU and TPU.

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
    """``to_spec`` with numbers as floats, without ``added_later`` knobs at their defaults."""
    if isinstance(value, (list, tuple)):
        return [_hashed(item) for item in value]
    if isinstance(value, np.bool_):
        return bool(value)
    if not dataclasses.is_dataclass(value):
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return float(value) if is_number else value
    spec = {key: name for key, name in to_spec(value).items() if key in ("method", "scaling")}
    for field in dataclasses.fields(value):
        knob = getattr(value, field.name)
        # An unused new knob must not change the fingerprint of older checkpoints.
        if not field.metadata.get("added_later") or knob != field.default:
            spec[field.name] = _hashed(knob)
    # Checkpoints hold the hash of "quarter", the earlier name of "official" for these knobs.
    is_official = spec.get("method") == "fope" and spec["outputs"] == "official"
    if is_official and (spec["clip"] or not spec["drop_zero"]):
        spec["outputs"] = "quarter"
    return spec


def _text(spec: Any) -> str:
    if isinstance(spec, list):
        return f"[{', '.join(map(_text, spec))}]"
    if isinstance(spec, float):
        return f"{spec:g}"
    if not isinstance(spec, dict):
        return str(spec)
    _, name, knobs = split_spec(spec)
    return f"{name}({', '.join(f'{knob}={_text(value)}' for knob, value in knobs.items())})"
