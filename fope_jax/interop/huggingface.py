"""Hugging Face's config.json of Llama, Qwen 3, OLMo 2 and SmolLM 3 to TransformerConfig and back.

Each key is read, passed through because it changes no number, or refused. Export picks the family
with the same layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fope_jax.interop.rope_parameters import (
    ORIGINAL,
    PARTIAL,
    THETA,
    canonical_type,
    flag,
    from_rope_parameters,
    integer,
    inverted_ramp_message,
    is_fope,
    number,
    to_rope_parameters,
)
from fope_jax.interop.serving import fope_from_rope_parameters, fope_to_rope_parameters
from fope_jax.model.config import TransformerConfig
from fope_jax.position import (
    ByLayer,
    DynamicNTK,
    FoPE,
    ModelShape,
    NoPE,
    PositionEmbedding,
    RoPE,
    from_spec,
    name_of,
    to_spec,
)

EXPORTED = "fope_jax"  # added by ``to_config``: the position embedding and its fingerprint
MAX_POSITIONS = "max_position_embeddings"
TRAINING_LENGTH = "training_length"  # key beside them, if it is not ``max_position_embeddings``


class Family(NamedTuple):
    """One ``model_type`` of Hugging Face; norms are named as in ``TransformerConfig``."""

    architecture: str
    norm: str
    qk_norm: str
    defaults: dict[str, Any]  # of optional keys; None is a value too
    theta: float = 10_000.0  # if none is given
    by_layer: bool = False  # whether it names layers without a position embedding


_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_HEADS = {"num_key_value_heads": None, "head_dim": None}
# If several have the same layers, the model is exported as the first.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "pre", "none", _DEFAULTS | _HEADS),
    "qwen3": Family("Qwen3ForCausalLM", "pre", "head", _DEFAULTS),
    "olmo2": Family(
        "Olmo2ForCausalLM", "post", "width", _DEFAULTS | _HEADS | {"rms_norm_eps": 1e-5}
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "pre",
        "none",
        _DEFAULTS | {"head_dim": None, "tie_word_embeddings": True},
        theta=2_000_000.0,
        by_layer=True,
    ),
}

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
_MOST_LAYERS = 10_000  # bounds the size of lists with an entry per layer
_ROPE_KEYS = {"rope_parameters", "rope_scaling", THETA, PARTIAL, ORIGINAL, MAX_POSITIONS}
_KEYS_READ = {*_SIZES, *_ROPE_KEYS, "model_type", "rms_norm_eps", "tie_word_embeddings", EXPORTED}
# Keys that are accepted with these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    # Common to all transformers configurations; a full dump has their defaults.
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
}
# Keys that change no number. The first paragraph holds generation options, which config.json had
# before generation_config.json. ``max_window_layers`` matters only with ``use_sliding_window``,
# ``use_bfloat16`` only in TensorFlow.
_PASSED_THROUGH_NAMES = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    cache_implementation decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
    use_cache

    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled _name_or_path
    _output_attentions architectures attn_implementation bos_token_id dtype eos_token_id
    experts_implementation finetuning_task gradient_checkpointing id2label initializer_range
    is_decoder is_llama_config label2id max_window_layers name_or_path num_labels
    output_attentions output_hidden_states pad_token_id prefix pretraining_tp problem_type
    return_dict sep_token_id task_specific_params tf_legacy_loss tie_last_hidden_states
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version
    unk_token_id use_bfloat16 use_return_dict xla_device
"""
PASSED_THROUGH = frozenset(_PASSED_THROUGH_NAMES.split())
_PASSED_THROUGH_PREFIX = "unsloth_"  # written by Unsloth: unsloth_fixed, unsloth_version, ...


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

    Raises ValueError with every model, key or value that is not supported, and missing keys.

    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    >>> sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = from_config(
    ...     {"model_type": "llama", "max_position_embeddings": 128, "rope_theta": 5e5, **sizes}
    ... )
    >>> config.config.mlp_dim, config.config.qk_norm, config.position.theta
    (32, 'none', 500000.0)

    Reference: ``LlamaConfig``, ``Qwen3Config``, ``Olmo2Config`` and ``SmolLM3Config`` of Hugging
    Face transformers 5.24.0.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        if name is None and {"model", "position", "train"} <= values.keys():
            raise ValueError(
                "this is a run of fope_jax, no checkpoint of Hugging Face; `fope evaluate` and "
                "`fope extend` take it as it is"
            )
        raise ValueError(f"model_type={name!r:.80}: expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    by_layer_keys = {"no_rope_layers", "no_rope_layer_interval"}
    keys_read = _KEYS_READ | (by_layer_keys if family.by_layer else set())
    problems = [
        problem
        for key, value in values.items()
        if value is not None and key not in keys_read
        if (problem := _problem(key, value, "use_sliding_window" in values))
    ]
    given = family.defaults | {key: value for key, value in values.items() if value is not None}
    try:
        config = _model_config(given, family)
        position = _position(given, family, config.shape)
        exported = given.get(EXPORTED)
        if exported is not None:
            position = _exported_position(exported, position, config.shape, family.by_layer)
    except ValueError as error:
        raise ValueError("\n  ".join([*problems, str(error)])) from error
    if problems:
        raise ValueError("\n  ".join(problems))
    extra_keys = {k: x for k, x in values.items() if k == MAX_POSITIONS or k not in keys_read}
    length = integer(MAX_POSITIONS, given[MAX_POSITIONS])
    return ImportedConfig(
        config,
        position,
        extra_keys,
        exported and exported["fingerprint"],
        integer(TRAINING_LENGTH, exported.get(TRAINING_LENGTH, length)) if exported else length,
    )


def _problem(key: str, value: Any, states_sliding_window: bool) -> str | None:
    """Why a key that is not read cannot be passed through, or None."""
    if key == "layer_types":
        if not isinstance(value, list | tuple):
            return f"{key}={value!r:.80}: expected a list"
        if other := sorted({str(entry) for entry in value} - {"full_attention"}):
            return f"{key} holds {', '.join(other)}: only 'full_attention' is known"
        return None
    accepted = _ACCEPTED.get(key)
    if key == "sliding_window":  # ``use_sliding_window``, if there, decides
        accepted = (value,) if states_sliding_window else ()
    if accepted is not None:
        expected = " or ".join(map(repr, accepted)) or "None"
        message = f"{key}={value!r:.80}: the model here can be built with {expected} only"
        return None if value in accepted else message
    if key in PASSED_THROUGH or key.startswith(_PASSED_THROUGH_PREFIX):
        return None
    return (
        f"unknown key {key!r} with the value {value!r:.80}: it may change numbers; remove it where "
        "it does not"
    )


def _model_config(given: Mapping[str, Any], family: Family) -> TransformerConfig:
    for key in (*_SIZES, MAX_POSITIONS):
        if key not in given:
            raise ValueError(f"{key!r} is missing: Hugging Face takes a default of the model")
    sizes: dict[str, Any] = {}
    for key, field in _SIZES.items():
        most = _MOST_LAYERS if field == "num_layers" else 2**31 - 1
        if given[key] is not None and not 1 <= integer(key, given[key]) <= most:
            raise ValueError(f"{key!r} is {given[key]!r:.80}: expected 1 to {most:,}")
        sizes[field] = given[key] if given[key] is None else integer(key, given[key])
    config = TransformerConfig(
        **sizes,
        norm=family.norm,
        qk_norm=family.qk_norm,
        tie_embeddings=flag("tie_word_embeddings", given["tie_word_embeddings"]),
        norm_eps=number("rms_norm_eps", given["rms_norm_eps"]),
    )
    shape = config.shape
    return dataclasses.replace(config, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)


def _position(given: Mapping[str, Any], family: Family, shape: ModelShape) -> PositionEmbedding:
    """The position embedding; the meaning of ``max_position_embeddings`` depends on its type."""
    parameters = _stated_rope(given, family.theta)
    if not {"rope_type", "type"} & parameters.keys():
        parameters["rope_type"] = "default"
    rope_type = canonical_type(parameters.get("rope_type", parameters.get("type")))
    partial = parameters.get(PARTIAL, given.get(PARTIAL, 1))
    if partial != 1 and rope_type != "proportional":
        raise ValueError(f"{PARTIAL}={partial}: these models rotate the whole head, 1")
    theta = given.get(THETA, None if THETA in parameters else family.theta)
    length = integer(MAX_POSITIONS, given[MAX_POSITIONS])
    if is_fope(parameters):
        count = parameters.get("num_inv_freq", parameters.get("fope_num_inv_freq"))
        method: PositionEmbedding = fope_from_rope_parameters(
            parameters,
            head_dim=shape.head_dim,
            training_length=length if count is None else None,
            rope_theta=theta,
        )
    else:
        original, extended = None, None
        if rope_type == "dynamic":
            if parameters.get(ORIGINAL, length) != length:
                raise ValueError(
                    f"{ORIGINAL!r} of rope_type='dynamic' is {parameters[ORIGINAL]!r:.80}, "
                    f"{MAX_POSITIONS!r} is {length}: Hugging Face takes the latter for the trained "
                    "length; give it the trained length, or leave the former out"
                )
            original = length
        elif rope_type in ("yarn", "longrope", "llama3"):
            original = given.get(ORIGINAL, None if ORIGINAL in parameters else length)
            extended = None if "factor" in parameters or rope_type == "llama3" else length
        method = from_rope_parameters(
            parameters,
            head_dim=shape.head_dim,
            original_length=original,
            extended_length=extended,
            rope_theta=theta,
            partial_rotary_factor=None if PARTIAL in parameters else given.get(PARTIAL),
        )
        if difference := inverted_ramp_message(method, shape.head_dim):
            raise ValueError(f"{difference}: change these keys so that the two agree")
    return _by_layer(method, given, shape.num_layers) if family.by_layer else method


def _stated_rope(given: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """``rope_parameters`` or the older ``rope_scaling``, without entries of None."""
    stated = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = given.get(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r:.80}: expected a mapping of its keys")
        if entries := {key: x for key, x in value.items() if x is not None}:
            stated[name] = entries

    def canonical(entries: dict[str, Any]) -> dict[str, Any]:
        rope_type = canonical_type(entries.get("rope_type", entries.get("type", "default")))
        others = {key: x for key, x in entries.items() if key != "type"}
        return {THETA: given.get(THETA, theta)} | others | {"rope_type": rope_type}

    first, *second = stated.values() or [{}]
    if second and canonical(first) != canonical(second[0]):
        both = ", ".join(f"{name}={entries}" for name, entries in stated.items())
        raise ValueError(f"{both}: leave one out")
    return first


def _by_layer(
    method: PositionEmbedding, given: Mapping[str, Any], num_layers: int
) -> PositionEmbedding:
    """``method`` in the layers that use it, as the shortest repeating pattern."""
    layers = given.get("no_rope_layers")  # despite the name, 1 means the layer has RoPE
    if layers is None:
        interval = integer("no_rope_layer_interval", given.get("no_rope_layer_interval", 4))
        if interval < 1:
            raise ValueError(f"no_rope_layer_interval={interval}: expected 1 or more")
        layers = [int((index + 1) % interval != 0) for index in range(num_layers)]
    is_list = isinstance(layers, list | tuple) and len(layers) == num_layers
    if not is_list or not all(layer in (0, 1) for layer in layers):
        raise ValueError(
            f"no_rope_layers={layers!r:.80}: expected a 0 or a 1 for each of {num_layers} layers"
        )
    if isinstance(method, FoPE) and not all(layers):
        raise ValueError(f"no_rope_layers={layers}: FoPE is in all layers or none")
    period = next(
        size
        for size in range(1, num_layers + 1)
        if num_layers % size == 0 and layers == layers[:size] * (num_layers // size)
    )
    methods = tuple(method if layer else NoPE() for layer in layers[:period])
    return methods[0] if period == 1 else ByLayer(methods)


def _exported_position(
    exported: Any, position: PositionEmbedding, shape: ModelShape, by_layer: bool
) -> PositionEmbedding:
    """The position embedding that an export stored; ValueError unless it agrees with the keys."""
    if not isinstance(exported, Mapping) or not {"position", "fingerprint"} <= exported.keys():
        raise ValueError(
            f"{EXPORTED}={exported!r}: expected 'position' and 'fingerprint', as exported"
        )
    spec = exported["position"]
    try:
        stored = from_spec(spec)
        expected, stated = (to_position_keys(x, shape, by_layer) for x in (stored, position))
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
    return stored


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
    shape = config.shape
    for step in (s for m in _methods(position) for s in getattr(m, "scaling", ())):
        length = step.original_length if isinstance(step, DynamicNTK) else length
    exported = {"position": to_spec(position), "fingerprint": fingerprint}
    if training_length != length:
        exported[TRAINING_LENGTH] = training_length
    values = {
        "model_type": name,
        "architectures": [FAMILIES[name].architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        MAX_POSITIONS: length,
        **to_position_keys(position, shape, FAMILIES[name].by_layer),
        EXPORTED: exported,
    }
    unset = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return unset | {key: x for key, x in extra_keys.items() if key not in values} | values


def family_of(config: TransformerConfig, position: PositionEmbedding) -> str:
    """The ``model_type`` with the same layers; ValueError if there is none.

    >>> sizes = dict(vocab_size=8, d_model=8, num_layers=2, num_heads=2, mlp_dim=8)
    >>> family_of(TransformerConfig(**sizes, qk_norm="head"), RoPE())
    'qwen3'
    """
    layers = (config.norm, config.qk_norm, isinstance(position, ByLayer | NoPE))
    for name, family in FAMILIES.items():
        if layers == (family.norm, family.qk_norm, family.by_layer):
            if name == "llama" and config.d_model % config.num_heads:
                raise ValueError(
                    f"d_model={config.d_model}: Llama needs a multiple of "
                    f"num_heads={config.num_heads}"
                )
            return name
    known = "; ".join(
        f"{name}: {family.norm!r}, {family.qk_norm!r}" + " by layer" * family.by_layer
        for name, family in FAMILIES.items()
    )
    raise ValueError(
        f"norm={config.norm!r}, qk_norm={config.qk_norm!r} with position.method="
        f"{name_of(position)!r}: no family of Hugging Face has these ({known})"
    )


def to_position_keys(
    position: PositionEmbedding, shape: ModelShape, by_layer: bool
) -> dict[str, Any]:
    """``rope_parameters`` and any ``no_rope_layers``; ValueError if they cannot express it."""
    methods = _methods(position)
    rotating = [method for method in methods if type(method) is not NoPE] or [RoPE()]
    if any(method != rotating[0] for method in rotating):
        raise ValueError(
            f"position.methods={methods}: Hugging Face knows layers with one RoPE and layers "
            "without position"
        )
    method = rotating[0]
    if type(method) is FoPE and not by_layer:
        parameters = fope_to_rope_parameters(method, shape)
    elif type(method) is RoPE:
        parameters = to_rope_parameters(method)
    else:
        raise ValueError(
            f"position.method={name_of(method)!r}: models of Hugging Face have no form of it; they "
            "have RoPE, RoPE with layers of NoPE, and FoPE as serving engines compute it"
        )
    if parameters.get(PARTIAL, 1) != 1 and parameters["rope_type"] != "proportional":
        raise ValueError(f"{PARTIAL}={parameters[PARTIAL]}: these models rotate the whole head, 1")
    keys: dict[str, Any] = {"rope_parameters": parameters}
    if by_layer:
        pattern = [int(type(method) is not NoPE) for method in methods]
        keys["no_rope_layers"] = pattern * (shape.num_layers // len(pattern))
    return keys


def _methods(position: PositionEmbedding) -> tuple[PositionEmbedding, ...]:
    return position.methods if isinstance(position, ByLayer) else (position,)


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
        family = FAMILIES[family_of(config, position)]
        to_position_keys(position, config.shape, family.by_layer)
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
