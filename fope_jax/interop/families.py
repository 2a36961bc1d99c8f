"""Hugging Face's families of models that can be built here, and what their config.json may say."""

from __future__ import annotations

from typing import Any, NamedTuple

from fope_jax.interop.rope_parameters import ORIGINAL, PARTIAL, THETA

QUANTISED = "quantization_config"
EXPORTED = "fope_jax"  # added by ``to_config``: the position embedding and its fingerprint
MAX_POSITIONS = "max_position_embeddings"
WINDOW, USE_WINDOW, LAYER_TYPES = "sliding_window", "use_sliding_window", "layer_types"
WINDOW_KEYS = {WINDOW, USE_WINDOW, LAYER_TYPES}
FULL, SLIDING = "full_attention", "sliding_attention"  # entries of ``layer_types``

# What layers may need beyond one RoPE for all; the words are those of messages.
FOPE = "FoPE"
NO_ROPE = "layers without position"
ONE_WINDOW = "a window in all layers"
SOME_WINDOWS = "a window in some layers"
ROPE_BY_TYPE = "another RoPE in layers with a window"


class Family(NamedTuple):
    """One ``model_type`` of Hugging Face.

    Attributes:
      architecture: the class in transformers.
      norm, qk_norm, qkv_bias: as in ``TransformerConfig``.
      defaults: of optional keys; None is a value too.
      theta: if none is given.
      has: what its layers may have, of the words above.
    """

    architecture: str
    norm: str
    qk_norm: str
    defaults: dict[str, Any]
    qkv_bias: bool = False
    theta: float = 10_000.0
    has: frozenset[str] = frozenset()


_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_HEADS = {"num_key_value_heads": None, "head_dim": None}
_BIAS = {"attention_bias": False}  # of q, k, v and the output: a key that a family has or not
_MISTRAL = {"head_dim": None, WINDOW: 4096}
# ``max_window_layers`` is the first layer with a window, where ``layer_types`` does not say it.
_QWEN_WINDOWS = {USE_WINDOW: False, WINDOW: 4096, "max_window_layers": 28}
_WINDOWS = frozenset((ONE_WINDOW, SOME_WINDOWS))
# If several have the same layers, the model is exported as the first.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", "pre", "none", _DEFAULTS | _BIAS | _HEADS, has=frozenset((FOPE,))
    ),
    "mistral": Family(
        "MistralForCausalLM", "pre", "none", _DEFAULTS | _MISTRAL, has=frozenset((ONE_WINDOW,))
    ),
    "ministral": Family("MinistralForCausalLM", "pre", "none", _DEFAULTS | _MISTRAL, has=_WINDOWS),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "pre",
        "none",
        _DEFAULTS | _QWEN_WINDOWS | {"head_dim": None},
        qkv_bias=True,
        has=_WINDOWS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", "pre", "head", _DEFAULTS | _BIAS | _QWEN_WINDOWS, has=_WINDOWS | {FOPE}
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "post",
        "width",
        _DEFAULTS | _BIAS | _HEADS | {"rms_norm_eps": 1e-5},
        has=frozenset((FOPE,)),
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        "post",
        "width",
        _DEFAULTS | _BIAS | _HEADS | {"rms_norm_eps": 1e-5, WINDOW: 4096},
        theta=500_000.0,
        has=_WINDOWS | {ROPE_BY_TYPE},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "pre",
        "none",
        _DEFAULTS | _BIAS | {"head_dim": None, "tie_word_embeddings": True, USE_WINDOW: False},
        theta=2_000_000.0,
        has=_WINDOWS | {NO_ROPE},
    ),
}

_GEMMA = (
    "four norms a layer with weights from 0, embeddings times sqrt(hidden_size) and GELU, which "
    "the layers here do not have"
)
_EXPERTS = "a mixture of experts in place of the MLP, which the layers here do not have"
# Families that are asked for and cannot be built, with the reason.
UNSUPPORTED = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_oss": _EXPERTS,
    "llama4_text": _EXPERTS,
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "ministral3": "queries that grow with 1 + beta ln(1 + floor(position / original length)), "
    "llama_4_scaling_beta, which no method here computes",
}

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
_ROPE_KEYS = {"rope_parameters", "rope_scaling", THETA, PARTIAL, ORIGINAL, MAX_POSITIONS}
_KEYS_READ = {*SIZES, *_ROPE_KEYS, "model_type", "rms_norm_eps", "tie_word_embeddings", EXPORTED}
# Keys that are accepted with these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    USE_WINDOW: (False,),
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
# before generation_config.json. ``max_window_layers`` matters only with ``use_sliding_window`` and
# without ``layer_types``, which an export writes; ``use_bfloat16`` only in TensorFlow.
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


def keys_read(family: Family) -> set[str]:
    """The keys that decide about numbers; the others pass through or are refused."""
    layers = {"no_rope_layers", "no_rope_layer_interval"} if NO_ROPE in family.has else set()
    return _KEYS_READ | layers | (WINDOW_KEYS if ONE_WINDOW in family.has else set())


def is_kept(key: str, family: Family, has_windows: bool) -> bool:
    """Whether a run keeps a key for its export: those that are not read, and the length.

    Keys of windows are kept too where ``use_sliding_window`` says that there are none.
    """
    turned_off = key in WINDOW_KEYS and USE_WINDOW in family.defaults and not has_windows
    return turned_off or key == MAX_POSITIONS or key not in keys_read(family)


def key_problem(key: str, value: Any, states_use_window: bool) -> str | None:
    """Why a key that is not read cannot be passed through, or None."""
    if key == LAYER_TYPES:
        if not isinstance(value, list | tuple):
            return f"{key}={value!r:.80}: expected a list"
        if other := sorted({str(entry) for entry in value} - {FULL}):
            return f"{key} holds {', '.join(other)}: only {FULL!r} is known"
        return None
    accepted = _ACCEPTED.get(key)
    if key == WINDOW:  # ``use_sliding_window``, if there, decides
        accepted = (value,) if states_use_window else ()
    if accepted is not None:
        expected = " or ".join(map(repr, accepted)) or "None"
        message = f"{key}={value!r:.80}: the model here can be built with {expected} only"
        return None if value in accepted else message
    if key == QUANTISED:
        return (
            f"{key}={value!r:.80}: the weights are quantised; save them as they are computed with "
            "first, by dequantize() and save_pretrained of transformers"
        )
    if key in PASSED_THROUGH or key.startswith(_PASSED_THROUGH_PREFIX):
        return None
    return (
        f"unknown key {key!r} with the value {value!r:.80}: it may change numbers; remove it where "
        "it does not"
    )
