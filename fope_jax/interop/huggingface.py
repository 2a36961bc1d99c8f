"""The config.json of Hugging Face's Llama, Qwen 3, OLMo 2 and SmolLM 3 to ours and back.

Every key is accounted for: it is read, it is known to change no number and kept as it stands, or it
raises. A model of ours goes by the family whose layers it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fope_jax.interop.keys import ORIGINAL, SHARE, THETA, flag, integer, number, type_named
from fope_jax.interop.rope_parameters import from_rope_parameters, inverted_ramp, to_rope_parameters
from fope_jax.interop.serving import fope_from_rope_parameters, fope_to_rope_parameters, says_fope
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

OURS = "fope_jax"
MAX_POSITIONS = "max_position_embeddings"


class Family(NamedTuple):
    """One ``model_type`` of Hugging Face.

    Attributes:
      architecture: its class there.
      norm: as in ``TransformerConfig``.
      qk_norm: as in ``TransformerConfig``.
      defaults: what its configuration takes where a key is left out; None is a value too.
      theta: the base where none is given.
      by_layer: whether it names layers without a position embedding.
    """

    architecture: str
    norm: str
    qk_norm: str
    defaults: dict[str, Any]
    theta: float = 10_000.0
    by_layer: bool = False


_HEADS = {"num_key_value_heads": None, "head_dim": None}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# Where several have the same layers the first is what such a model is exported as.
FAMILIES: dict[str, Family] = {
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

_MOST_LAYERS = 10_000
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
_ROPE = ("rope_parameters", "rope_scaling", THETA, SHARE, ORIGINAL)
_READ = {*_SIZES, *_ROPE, "model_type", "rms_norm_eps", "tie_word_embeddings", MAX_POSITIONS, OURS}
_BY_LAYER = ("no_rope_layers", "no_rope_layer_interval")

# Keys with values that this model can do without; any other value would change numbers.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    # Of every model of transformers, whether it reads them or not; a full dump has their defaults.
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
}

# Keys that change no number of the model. What they say is kept and written back. How text is drawn
# from its logits stood in config.json before generation_config.json, and still may.
_GENERATION = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_implementation",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "use_cache",
    }
)
KEPT = _GENERATION | {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "_output_attentions",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_decoder",  # these are, whatever it says
    "is_llama_config",
    "label2id",
    "max_window_layers",  # read with use_sliding_window alone
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_last_hidden_states",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_bfloat16",  # of TensorFlow
    "use_return_dict",
    "xla_device",
}
_KEPT_PREFIX = "unsloth_"  # what Unsloth notes: unsloth_fixed, unsloth_version, ...


class ImportedConfig(NamedTuple):
    """What a config.json says of a model.

    Attributes:
      config: the model.
      position: its position embedding.
      kept: keys that change no number, as they stand there.
      fingerprint: of the position embedding, where our export stored it.
    """

    config: TransformerConfig
    position: PositionEmbedding
    kept: dict[str, Any]
    fingerprint: str | None


# ---------------------------------------------------------------------------- from Hugging Face


def from_config(values: Mapping[str, Any]) -> ImportedConfig:
    """Our configuration of the model that a config.json describes.

    Args:
      values: the file's content.

    Raises:
      ValueError: a model, key or value that cannot be represented here, or a key that is missing.

    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    >>> sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    >>> described = from_config(
    ...     {"model_type": "llama", "max_position_embeddings": 128, "rope_theta": 5e5, **sizes}
    ... )
    >>> described.config.mlp_dim, described.config.qk_norm, described.position.theta
    (32, 'none', 500000.0)

    Reference: ``LlamaConfig``, ``Qwen3Config``, ``Olmo2Config`` and ``SmolLM3Config`` of Hugging
    Face transformers 5.24.0.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        if name is None and {"model", "position", "train"} <= values.keys():
            raise ValueError(
                "this is a run of fope_jax, no checkpoint of Hugging Face; `fope evaluate --run` "
                "and `fope extend --from` take it as it is"
            )
        raise ValueError(f"model_type={name!r:.80}: expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    kept, wrong = _kept(values, family)
    try:
        described = _described(values, family, kept)
    except ValueError as error:
        raise ValueError("\n  ".join([*wrong, str(error)])) from error
    if wrong:
        raise ValueError("\n  ".join(wrong))
    return described


def _described(values: Mapping[str, Any], family: Family, kept: dict[str, Any]) -> ImportedConfig:
    """What the keys that are read say."""
    given = family.defaults | {key: x for key, x in values.items() if x is not None}
    for key in (*_SIZES, MAX_POSITIONS):
        if key not in given:
            raise ValueError(f"{key!r} is missing: Hugging Face takes a default of the model")
    sizes: dict[str, Any] = {
        ours: None if given[key] is None else _size(key, given[key]) for key, ours in _SIZES.items()
    }
    config = TransformerConfig(
        **sizes,
        norm=family.norm,
        qk_norm=family.qk_norm,
        tie_embeddings=flag("tie_word_embeddings", given["tie_word_embeddings"]),
        norm_eps=number("rms_norm_eps", given["rms_norm_eps"]),
    )
    shape = config.shape
    config = dataclasses.replace(config, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)
    position = _position(given, family, shape)
    ours = values.get(OURS)
    if ours is None:
        return ImportedConfig(config, position, kept, None)
    own = _exported(ours, position, shape, family.by_layer)
    return ImportedConfig(config, own, kept, ours["fingerprint"])


def _size(key: str, value: Any) -> int:
    """A size that can be counted to: what follows makes lists of so many layers."""
    most = _MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
    if not 1 <= integer(key, value) <= most:
        raise ValueError(f"{key!r} is {value!r:.80}: expected 1 to {most:,}")
    return integer(key, value)


def _kept(values: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """The keys that change no number, and what is to say of those that may, all of them."""
    read = _READ | set(_BY_LAYER if family.by_layer else ())
    accepted = dict(_ACCEPTED)
    if "use_sliding_window" not in values:  # where it is there it decides, and must be False
        accepted["sliding_window"] = ()
    known = read | KEPT | _ACCEPTED.keys() | {"sliding_window", "layer_types"}
    kept, wrong = {}, []
    for key, value in values.items():
        if value is None:
            pass
        elif key == "layer_types":
            if not isinstance(value, list | tuple):
                wrong.append(f"{key}={value!r:.80}: expected a list")
            elif other := sorted({str(entry) for entry in value} - {"full_attention"}):
                wrong.append(f"{key} holds {', '.join(other)}: only 'full_attention' is known")
        elif key in accepted and value not in accepted[key]:
            expected = " or ".join(map(repr, accepted[key])) or "None"
            wrong.append(f"{key}={value!r:.80}: the model here can be built with {expected} only")
        elif key not in known and not key.startswith(_KEPT_PREFIX):
            wrong.append(
                f"unknown key {key!r} with the value {value!r:.80}: it may change numbers; remove "
                "it where it does not"
            )
        if key == MAX_POSITIONS or key not in read:
            kept[key] = value
    return kept, wrong


def _stated_rope(given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """``rope_parameters`` or the older ``rope_scaling``, without entries of None.

    Raises:
      ValueError: it is no mapping, or both are there and differ by more than their spelling.
    """
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        stated = given.get(name)
        if stated is None:
            continue
        if not isinstance(stated, Mapping):
            raise ValueError(f"{name}={stated!r:.80}: expected a mapping of its keys")
        entries = {key: x for key, x in stated.items() if x is not None}
        if entries:
            found[name] = entries
    first, *second = found.values() or [{}]
    theta = given.get(THETA, family.theta)
    if second and _one_spelling(first, theta) != _one_spelling(second[0], theta):
        both = ", ".join(f"{name}={entries}" for name, entries in found.items())
        raise ValueError(f"{both}: leave one out")
    return first


def _one_spelling(entries: dict[str, Any], theta: float) -> dict[str, Any]:
    """Entries with their type under one name, and with the base where it stands outside."""
    kind = type_named(entries.get("rope_type", entries.get("type", "default")))
    others = {key: x for key, x in entries.items() if key != "type"}
    return {THETA: theta} | others | {"rope_type": kind}


def _position(given: Mapping[str, Any], family: Family, shape: ModelShape) -> PositionEmbedding:
    """The position embedding, of keys without those whose value is None."""
    parameters = _stated_rope(given, family)
    if not {"rope_type", "type"} & parameters.keys():
        parameters["rope_type"] = "default"
    share = parameters.get(SHARE, given.get(SHARE, 1))
    if share != 1 and "proportional" not in parameters.values():
        raise ValueError(f"{SHARE}={share}: these models turn the whole head, 1")
    theta = given.get(THETA, None if THETA in parameters else family.theta)
    length = integer(MAX_POSITIONS, given[MAX_POSITIONS])
    if says_fope(parameters):
        fixed = parameters.get("num_inv_freq", parameters.get("fope_num_inv_freq"))
        method: PositionEmbedding = fope_from_rope_parameters(
            parameters,
            head_dim=shape.head_dim,
            training_length=length if fixed is None else None,
            rope_theta=theta,
        )
    else:
        method = _rope(parameters, given, theta, length, shape.head_dim)
    if not family.by_layer:
        return method
    rotates = _rotates(given, shape.num_layers)
    if isinstance(method, FoPE) and not all(rotates):
        raise ValueError(f"no_rope_layers={given.get(_BY_LAYER[0])}: FoPE is in all layers or none")
    return _over_layers(method, rotates)


def _rope(
    parameters: dict[str, Any],
    given: Mapping[str, Any],
    theta: float | None,
    length: int,
    head_dim: int,
) -> RoPE:
    """RoPE, each type with the meaning that ``max_position_embeddings`` has for it."""
    kind = type_named(parameters.get("rope_type", parameters.get("type")))
    original, extended = given.get(ORIGINAL), None
    if kind == "dynamic":
        if parameters.get(ORIGINAL, length) != length:
            raise ValueError(
                f"{ORIGINAL!r} of rope_type='dynamic' is {parameters[ORIGINAL]!r:.80}, "
                f"{MAX_POSITIONS!r} is {length}: Hugging Face takes the latter for the trained "
                "length; give it the trained length, or leave the former out"
            )
        original = length
    elif kind in ("yarn", "longrope", "llama3"):
        if original is None and ORIGINAL not in parameters:
            original = length
        if "factor" not in parameters and kind != "llama3":
            extended = length
    else:
        original = None
    method = from_rope_parameters(
        parameters,
        head_dim=head_dim,
        original_length=original,
        extended_length=extended,
        rope_theta=theta,
        partial_rotary_factor=given.get(SHARE) if SHARE not in parameters else None,
    )
    if difference := inverted_ramp(method, head_dim):
        raise ValueError(f"{difference}: change these keys so that the two agree")
    return method


def _rotates(given: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Which layers have a position embedding."""
    layers = given.get("no_rope_layers")
    if layers is None:
        interval = integer("no_rope_layer_interval", given.get("no_rope_layer_interval", 4))
        if interval < 1:
            raise ValueError(f"no_rope_layer_interval={interval}: expected 1 or more")
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    listed = isinstance(layers, list | tuple) and len(layers) == num_layers
    if not listed or not all(layer in (0, 1) for layer in layers):
        raise ValueError(
            f"no_rope_layers={layers!r:.80}: expected a 0 or a 1 for each of {num_layers} layers"
        )
    return [bool(layer) for layer in layers]


def _over_layers(method: PositionEmbedding, rotates: list[bool]) -> PositionEmbedding:
    """``method`` in the layers that have one, as the shortest pattern that repeats."""
    count = len(rotates)
    period = next(
        size
        for size in range(1, count + 1)
        if count % size == 0 and rotates == rotates[:size] * (count // size)
    )
    methods = tuple(method if rotate else NoPE() for rotate in rotates[:period])
    return methods[0] if period == 1 else ByLayer(methods)


def _exported(
    ours: Any, position: PositionEmbedding, shape: ModelShape, by_layer: bool
) -> PositionEmbedding:
    """The position embedding that our export stored, compared with what the other keys say."""
    if not isinstance(ours, Mapping) or not {"position", "fingerprint"} <= ours.keys():
        raise ValueError(f"{OURS}={ours!r}: expected 'position' and 'fingerprint', as exported")
    try:
        own = from_spec(ours["position"])
        stored, said = (to_position_keys(method, shape, by_layer) for method in (own, position))
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # of values of any kind
        raise ValueError(
            f"{OURS}.position={ours['position']!r:.80} is no position embedding: {error}"
        ) from error
    if stored != said:
        raise ValueError(
            f"rope_parameters say {said}, but {OURS}.position, which was exported with them, says "
            f"{stored}: one of them has been changed; without the key {OURS!r} the former count"
        )
    return own


# ---------------------------------------------------------------------------- to Hugging Face


def to_config(
    config: TransformerConfig,
    position: PositionEmbedding,
    position_hash: str,
    *,
    length: int,
    kept: Mapping[str, Any],
) -> dict[str, Any]:
    """The config.json of a model of ours.

    Args:
      config: the model.
      position: its position embedding.
      position_hash: of ``fingerprint`` with the model's constants.
      length: tokens that the model is for, its ``max_position_embeddings``; ``DynamicNTK`` needs
        the trained length there and gets it.
      kept: what ``from_config`` kept, where the model came from there.

    Raises:
      ValueError: naming the field that Hugging Face's families cannot say.
    """
    name = family_of(config, position)
    shape = config.shape
    said = {"model_type": name, "architectures": [FAMILIES[name].architecture]}
    said |= {
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
        MAX_POSITIONS: _length(position, length),
    }
    unset = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stored = {"position": to_spec(position), "fingerprint": position_hash}
    own = {**said, **to_position_keys(position, shape, FAMILIES[name].by_layer), OURS: stored}
    return unset | {key: x for key, x in kept.items() if key not in own} | own


def family_of(config: TransformerConfig, position: PositionEmbedding) -> str:
    """The ``model_type`` with the layers of a model of ours.

    Raises:
      ValueError: none has them.

    >>> sizes = dict(vocab_size=8, d_model=8, num_layers=2, num_heads=2, mlp_dim=8)
    >>> family_of(TransformerConfig(**sizes, qk_norm="head"), RoPE())
    'qwen3'
    """
    by_layer = isinstance(position, ByLayer | NoPE)
    for name, family in FAMILIES.items():
        layers = family.norm, family.qk_norm, family.by_layer
        if layers == (config.norm, config.qk_norm, by_layer):
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
    """``rope_parameters`` and, of a family that has methods by layer, ``no_rope_layers``.

    Raises:
      ValueError: Hugging Face's models and serving engines have no form of the method.
    """
    methods = position.methods if isinstance(position, ByLayer) else (position,)
    rotating = [method for method in methods if type(method) is not NoPE]
    if any(method != rotating[0] for method in rotating):
        raise ValueError(
            f"position.methods={methods}: Hugging Face knows layers with one RoPE and layers "
            "without position"
        )
    method = rotating[0] if rotating else RoPE()
    if type(method) is FoPE and not by_layer:
        parameters = fope_to_rope_parameters(method, shape)
    elif type(method) is RoPE:
        parameters = to_rope_parameters(method)
    else:
        raise ValueError(
            f"position.method={name_of(method)!r}: models of Hugging Face have no form of it; they "
            "have RoPE, RoPE with layers of NoPE, and FoPE as serving engines compute it"
        )
    if parameters.get(SHARE, 1) != 1 and parameters["rope_type"] != "proportional":
        raise ValueError(f"{SHARE}={parameters[SHARE]}: these models turn the whole head, 1")
    keys: dict[str, Any] = {"rope_parameters": parameters}
    if by_layer:
        pattern = [int(type(method) is not NoPE) for method in methods]
        keys["no_rope_layers"] = pattern * (shape.num_layers // len(pattern))
    return keys


def _length(position: PositionEmbedding, length: int) -> int:
    """``max_position_embeddings``: ``length``, but for ``dynamic`` the trained length counts."""
    methods = position.methods if isinstance(position, ByLayer) else (position,)
    for step in (step for method in methods for step in getattr(method, "scaling", ())):
        if isinstance(step, DynamicNTK):
            return step.original_length
    return length
