"""Hugging Face's config.json of the families in ``families`` to TransformerConfig and back.

Each key is read, passed through because it changes no number, or refused. Export picks the first
family with the same layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fope_jax.interop.families import (
    EXPORTED,
    FAMILIES,
    FOPE,
    LAYER_TYPES,
    MAX_POSITIONS,
    SIZES,
    UNSUPPORTED,
    USE_WINDOW,
    Family,
    is_kept,
    key_problem,
    keys_read,
)
from fope_jax.interop.layer_keys import layer_keys, layer_needs, read_layers
from fope_jax.interop.layer_positions import from_layer_positions, layer_positions
from fope_jax.interop.rope_parameters import flag, integer, number
from fope_jax.model.config import TransformerConfig
from fope_jax.position import DynamicNTK, FoPE, PositionEmbedding, from_spec, name_of, to_spec
from fope_jax.position.checks import MOST_TOKENS

TRAINING_LENGTH = "training_length"  # key of an export, if it is not ``max_position_embeddings``
WINDOWS = "windows"  # key of an export, if the model has any
_MOST_LAYERS = 10_000  # bounds the size of lists with an entry per layer


class ImportedConfig(NamedTuple):
    """A model as described by a config.json."""

    config: TransformerConfig
    position: PositionEmbedding
    extra_keys: dict[str, Any]  # keys that change no number, and max_position_embeddings
    fingerprint: str | None  # of the position embedding, if fope exported it
    training_length: int  # tokens


# ---------------------------------------------------------------------------- from Hugging Face


def from_config(values: Mapping[str, Any]) -> ImportedConfig:
    """The TransformerConfig and position embedding that a config.json describes.

    Windows are in ``config.windows`` where one position embedding serves all layers, else in the
    pattern of methods. Raises ValueError with every model, key or value that is not supported, and
    missing keys.

    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    >>> sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = from_config(
    ...     {"model_type": "llama", "max_position_embeddings": 128, "rope_theta": 5e5, **sizes}
    ... )
    >>> config.config.mlp_dim, config.config.qk_norm, config.position.theta
    (32, 'none', 500000.0)

    Reference: the configurations of ``FAMILIES`` in Hugging Face transformers 5.24.0.
    """
    name = _family_name(values)
    family = FAMILIES[name]
    known = keys_read(family)
    problems = [
        problem
        for key, value in values.items()
        if value is not None and key not in known
        if (problem := key_problem(key, value, USE_WINDOW in values))
    ]
    given = family.defaults | {key: value for key, value in values.items() if value is not None}
    try:
        config = _model_config(given, family)
        layers = read_layers(values, family, config.shape)
        windows, position = from_layer_positions(layers)
        config = dataclasses.replace(config, windows=windows)
        exported = given.get(EXPORTED)
        if exported is not None:
            config, position = _exported_layers(exported, config, position, family)
    except ValueError as error:
        raise ValueError("\n  ".join([*problems, str(error)])) from error
    if problems:
        raise ValueError("\n  ".join(problems))
    has_windows = any(layer.window is not None for layer in layers)
    length = _size(MAX_POSITIONS, given[MAX_POSITIONS])
    return ImportedConfig(
        config,
        position,
        {key: value for key, value in values.items() if is_kept(key, family, has_windows)},
        exported and exported["fingerprint"],
        _size(TRAINING_LENGTH, exported.get(TRAINING_LENGTH, length)) if exported else length,
    )


def _family_name(values: Mapping[str, Any]) -> str:
    name = values.get("model_type")
    if name is None and {"model", "position", "train"} <= values.keys():
        raise ValueError(
            "this is a run of fope_jax, no checkpoint of Hugging Face; `fope evaluate` and "
            "`fope extend` take it as it is"
        )
    if isinstance(name, str) and name in UNSUPPORTED:
        raise ValueError(f"model_type={name!r}: it has {UNSUPPORTED[name]}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type={name!r:.80}: expected one of {', '.join(FAMILIES)}")
    if name == "mistral" and values.get(LAYER_TYPES) is not None:
        return "ministral"  # as transformers reads it
    return name


def _size(key: str, value: Any, most: int = MOST_TOKENS) -> int:
    """``value``; ValueError unless it is a whole number from 1 to ``most``."""
    if not 1 <= integer(key, value) <= most:
        raise ValueError(f"{key!r} is {value!r:.80}: expected 1 to {most:,}")
    return int(value)


def _model_config(given: Mapping[str, Any], family: Family) -> TransformerConfig:
    for key in (*SIZES, MAX_POSITIONS):
        if key not in given:
            raise ValueError(f"{key!r} is missing: Hugging Face takes a default of the model")
    sizes: dict[str, Any] = {}
    for key, field in SIZES.items():
        most = _MOST_LAYERS if field == "num_layers" else MOST_TOKENS
        sizes[field] = None if given[key] is None else _size(key, given[key], most)
    _size(MAX_POSITIONS, given[MAX_POSITIONS])
    config = TransformerConfig(
        **sizes,
        norm=family.norm,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tie_embeddings=flag("tie_word_embeddings", given["tie_word_embeddings"]),
        norm_eps=number("rms_norm_eps", given["rms_norm_eps"]),
    )
    shape = config.shape
    return dataclasses.replace(config, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)


def _exported_layers(
    exported: Any, config: TransformerConfig, position: PositionEmbedding, family: Family
) -> tuple[TransformerConfig, PositionEmbedding]:
    """Windows and position embedding as exported; ValueError unless they agree with the keys."""
    if not isinstance(exported, Mapping) or not {"position", "fingerprint"} <= exported.keys():
        raise ValueError(
            f"{EXPORTED}={exported!r}: expected 'position' and 'fingerprint', as exported"
        )
    spec, shape = exported["position"], config.shape
    try:
        stored = from_spec(spec)
        written = dataclasses.replace(config, windows=tuple(exported.get(WINDOWS, ())))
        expected, stated = (
            layer_keys(family, layer_positions(model, method), shape)
            for model, method in ((written, stored), (config, position))
        )
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # the spec is any JSON
        raise ValueError(
            f"{EXPORTED}.position={spec!r:.80} is no position embedding: {error}"
        ) from error
    if expected != stated:
        raise ValueError(
            f"rope_parameters say {stated}, but {EXPORTED}.position, which was exported with them, "
            f"says {expected}: one of them has been changed; without the key {EXPORTED!r} the "
            "former count"
        )
    return written, stored


# ---------------------------------------------------------------------------- to Hugging Face


def to_config(
    config: TransformerConfig,
    position: PositionEmbedding,
    fingerprint: str,
    *,
    length: int,
    extra_keys: Mapping[str, Any],
    training_length: int | None = None,
) -> dict[str, Any]:
    """The config.json of a model; ValueError if no family of Hugging Face supports a field.

    ``fingerprint`` is that of the position embedding with the model's constants. ``length`` is
    ``max_position_embeddings``; ``DynamicNTK`` replaces it with its trained length. ``extra_keys``
    are from ``from_config``, if the model was imported. ``training_length`` is ``length`` if None.
    """
    training_length = training_length or length
    name = family_of(config, position)
    family, shape = FAMILIES[name], config.shape
    layers = layer_positions(config, position)
    for step in (s for layer in layers for s in getattr(layer.method, "scaling", ())):
        length = step.original_length if isinstance(step, DynamicNTK) else length
    exported = {"position": to_spec(position), "fingerprint": fingerprint}
    if config.windows:
        exported[WINDOWS] = list(config.windows)
    if training_length != length:
        exported[TRAINING_LENGTH] = training_length
    values = {
        "model_type": name,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        **{key: x for key, x in family.defaults.items() if key == "attention_bias"},
        "tie_word_embeddings": config.tie_embeddings,
        MAX_POSITIONS: length,
        **layer_keys(family, layers, shape),
        EXPORTED: exported,
    }
    unset = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return unset | {key: x for key, x in extra_keys.items() if key not in values} | values


def family_of(config: TransformerConfig, position: PositionEmbedding) -> str:
    """The ``model_type`` with the same layers; ValueError if there is none.

    >>> sizes = dict(vocab_size=8, d_model=8, num_layers=2, num_heads=2, mlp_dim=8)
    >>> from fope_jax.position import RoPE
    >>> family_of(TransformerConfig(**sizes, qk_norm="head"), RoPE())
    'qwen3'
    """
    if config.attention_sinks:
        raise ValueError(
            f"attention_sinks=True: of the families of Hugging Face gpt-oss has them, with "
            f"{UNSUPPORTED['gpt_oss'].split(',')[0]}"
        )
    layers = layer_positions(config, position)
    needs = layer_needs(layers, config.shape)
    if FOPE in needs and type(position) is not FoPE:
        raise ValueError(
            f"position.method={name_of(position)!r} of FoPE: engines hold one set of coefficients "
            "for all layers; write position.method='fope'"
        )
    kinds = [(f.norm, f.qk_norm, f.qkv_bias) for f in FAMILIES.values()]
    own = config.norm, config.qk_norm, config.qkv_bias
    for (name, family), kind in zip(FAMILIES.items(), kinds, strict=True):
        if own == kind and needs <= family.has:
            if name == "llama" and config.d_model % config.num_heads:
                raise ValueError(
                    f"d_model={config.d_model}: Llama needs a multiple of "
                    f"num_heads={config.num_heads}"
                )
            return name
    known = "; ".join(
        ", ".join([f"{name}: {norm!r}, {qk_norm!r}", *(["qkv_bias"] * bias)])
        + "".join(f", {have}" for have in sorted(FAMILIES[name].has))
        for name, (norm, qk_norm, bias) in zip(FAMILIES, kinds, strict=True)
    )
    raise ValueError(
        f"norm={config.norm!r}, qk_norm={config.qk_norm!r}"
        + ", qkv_bias=True" * config.qkv_bias
        + f" with position.method={name_of(position)!r}"
        + "".join(f", {need}" for need in sorted(needs))
        + f": no family of Hugging Face has these ({known})"
    )


# ---------------------------------------------------------------------------- before training

# Knobs with which engines compute FoPE; `check_served` decides.
_SERVED_FOPE = {
    "share_layers": True,
    "outputs": "surviving",
    "heads": "key_value",
    "zero_sine": 1.0,
    "series": True,
    "frequencies_from": "rope",
    "sigma_convention": "xavier",
    "normalise": False,
    "drop_zero": True,
    "scaling": (),
}


def export_warning(config: TransformerConfig, position: PositionEmbedding) -> str | None:
    """Why a run could not be exported, and what to change before it is trained; None if it can.

    >>> sizes = dict(vocab_size=8, d_model=16, num_layers=2, num_heads=2, mlp_dim=8)
    >>> from fope_jax.position import RoPE
    >>> print(export_warning(TransformerConfig(**sizes), RoPE()))
    None
    """
    reason = export_problem(config, position)
    if reason is None:
        return None
    advice = ""
    if changes := _changes_for_export(config, position):
        options = (f"--config.position.{knob}={value}" for knob, value in changes.items())
        advice = f"; to export it, train it with {' '.join(options)}"
    return f"this run cannot be exported to Hugging Face: {reason}{advice}"


def export_problem(config: TransformerConfig, position: PositionEmbedding) -> str | None:
    """Why no family of Hugging Face has this model; None if one has."""
    try:
        family_of(config, position)
    except ValueError as error:
        return str(error)
    return None


def _changes_for_export(config: TransformerConfig, position: PositionEmbedding) -> dict[str, Any]:
    """The fewest knobs of FoPE to change; empty if the method is another or none would do."""
    if type(position) is not FoPE:
        return {}
    changes = {k: value for k, value in _SERVED_FOPE.items() if getattr(position, k) != value}

    def is_exportable(changes: Mapping[str, Any]) -> bool:
        try:
            changed = dataclasses.replace(position, **changes)
        except ValueError:
            return False
        return export_problem(config, changed) is None

    if not is_exportable(changes):
        return {}
    for knob in list(changes):
        others = {name: value for name, value in changes.items() if name != knob}
        changes = others if is_exportable(others) else changes
    return changes
