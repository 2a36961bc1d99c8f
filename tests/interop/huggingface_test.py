"""config.json of Hugging Face: what it means here, and what must raise."""

import json
from pathlib import Path

import pytest

from fope_jax.interop.families import PASSED_THROUGH
from fope_jax.interop.huggingface import from_config
from fope_jax.position import (
    ByLayer,
    DynamicNTK,
    FoPE,
    Llama3,
    LongRoPE,
    NoPE,
    PositionInterpolation,
    RoPE,
    YaRN,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"

LLAMA = json.loads((GOLDENS / "llama" / "config.json").read_text())
QWEN3 = json.loads((GOLDENS / "qwen3" / "config.json").read_text())
ENGINES = {"rope_theta": 100.0, "num_inv_freq": 2, "fope_sep_head": True, "fope_init_factor": 0.3}
SMOLLM3 = json.loads((GOLDENS / "smollm3" / "config.json").read_text())


def older(**changes):
    """Llama's configuration in the spelling of transformers 4."""
    return {key: x for key, x in LLAMA.items() if key != "rope_parameters"} | changes


@pytest.mark.parametrize(
    ("values", "position"),
    [
        (older(), RoPE()),
        (older(rope_theta=5e5, rope_scaling=None), RoPE(5e5)),
        (
            older(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}),
            RoPE(5e5, scaling=(PositionInterpolation(2.0),)),
        ),
        (
            older(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            RoPE(scaling=(DynamicNTK(2.0, 16),)),
        ),
        # Without the trained length it is max_position_embeddings; with another length beside it
        # the factor counts.
        (older(rope_scaling={"rope_type": "yarn", "factor": 4.0}), RoPE(scaling=(YaRN(4.0, 16),))),
        (
            older(
                max_position_embeddings=40_960,
                rope_scaling={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32_768,
                },
            ),
            RoPE(scaling=(YaRN(4.0, 32_768),)),
        ),
        (
            older(
                max_position_embeddings=64,
                original_max_position_embeddings=16,
                rope_scaling={"rope_type": "yarn"},
            ),
            RoPE(scaling=(YaRN(4.0, 16),)),
        ),
        (
            {key: x for key, x in SMOLLM3.items() if key != "rope_parameters"}
            | {"no_rope_layers": None, "no_rope_layer_interval": 2},
            ByLayer((RoPE(2e6), NoPE())),
        ),
        (
            SMOLLM3 | {"no_rope_layers": [0, 1, 1, 0]},
            ByLayer((NoPE(), RoPE(100.0), RoPE(100.0), NoPE())),
        ),
        (SMOLLM3 | {"no_rope_layers": [1, 1, 1, 1]}, RoPE(100.0)),
    ],
    ids=str,
)
def test_positions_of_older_spellings_and_defaults(values, position):
    assert from_config(values).position == position


def test_what_changes_no_number_is_kept():
    changes = {
        "torch_dtype": "bfloat16",
        "_name_or_path": "somewhere",
        "transformers_version": "4.40.0",
        "transformers.js_config": {"dtype": "q4"},
        "is_llama_config": True,
        "sliding_window": None,
        "rope_interleaved": False,
        "quantization_config": None,
        "max_position_embeddings": 99,
    }
    kept = from_config(LLAMA | changes).extra_keys
    assert changes.items() <= kept.items()
    assert not {"vocab_size", "rope_parameters", "model_type"} & kept.keys()
    assert PASSED_THROUGH & LLAMA.keys() <= kept.keys()
    kept = from_config(
        QWEN3 | {"sliding_window": 4096}
    ).extra_keys  # use_sliding_window is False there
    assert kept["sliding_window"] == 4096


# What transformers 4.57.1 writes into every config.json besides a family's own keys, where it
# writes all (use_diff=False); 4.40 and 5.24 write parts of this.
FULL_DUMP = json.loads("""{
    "_attn_implementation_autoset": true, "_name_or_path": "", "add_cross_attention": false,
    "bad_words_ids": null, "begin_suppress_tokens": null, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0,
    "do_sample": false, "early_stopping": false, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": null, "finetuning_task": null,
    "forced_bos_token_id": null, "forced_eos_token_id": null,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": false,
    "is_encoder_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": false,
    "output_hidden_states": false, "output_scores": false, "prefix": null, "pretraining_tp": 1,
    "problem_type": null, "pruned_heads": {}, "remove_invalid_values": false,
    "repetition_penalty": 1.0, "return_dict": true, "return_dict_in_generate": false,
    "sep_token_id": null, "suppress_tokens": null, "task_specific_params": null,
    "temperature": 1.0, "tf_legacy_loss": false, "tie_encoder_decoder": false,
    "tokenizer_class": null, "top_k": 50, "top_p": 1.0, "torch_dtype": null,
    "torchscript": false, "typical_p": 1.0, "use_bfloat16": false, "use_cache": true
}""")
UNSLOTH = {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "unsloth_training": True}


@pytest.mark.parametrize("values", [LLAMA, QWEN3, SMOLLM3], ids=["llama", "qwen3", "smollm3"])
def test_full_dumps_and_notes_of_trainers_are_read_past(values):
    """Generation at other values too: it draws from the same logits."""
    plain = from_config(values)
    notes = UNSLOTH | {"temperature": 0.6, "max_length": 4096, "_commit_hash": "0a1b"}
    full = from_config(values | FULL_DUMP | notes)
    assert full[:2] == plain[:2]
    assert (FULL_DUMP | notes).items() <= full.extra_keys.items()


def test_all_unknown_keys_of_a_file_are_named_at_once_with_their_values():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "alpha": 8, "betas": [1, 2]}
    values = LLAMA | FULL_DUMP | {"logit_scale": 0.5, "mlp_bias": True, "quantization": {"bits": 4}}
    with pytest.raises(ValueError) as caught:
        from_config(values | {"rope_parameters": scaled})
    for named in (
        "'logit_scale' with the value 0.5",
        "mlp_bias=True",
        "'quantization' with the value {'bi",
        "'alpha' of rope_type='linear' with the value 8",
        "'betas' of rope_type='linear' .* [1, 2]",
    ):
        key, _, value = named.partition(" .* ")
        assert key in str(caught.value) and value in str(caught.value)
    assert "chunk_size_feed_forward" not in str(caught.value)


YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
XTUNER = dict.fromkeys(
    (
        "original_max_position_embeddings",
        "factor",
        "beta_fast",
        "beta_slow",
        "short_factor",
        "long_factor",
        "low_freq_factor",
        "high_freq_factor",
        "mscale",
        "mscale_all_dim",
        "mrope_section",
        "fope_init_factor",
        "fope_sep_head",
        "num_inv_freq",
    )
) | {"truncate": False, "partial_rotary_factor": 1.0, "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("rope", "position"),
    [
        ({"rope_parameters": XTUNER | {"rope_type": "default"}}, RoPE(100.0)),
        ({"rope_parameters": XTUNER | {"rope_type": "default", "use_fope": False}}, RoPE(100.0)),
        # Its older form: type, the base outside, a factor of 1 beside the plain type.
        ({"rope_theta": 100.0, "rope_scaling": {"type": "default", "factor": 1.0}}, RoPE(100.0)),
        (
            {"rope_parameters": XTUNER | {"rope_type": "linear", "factor": 2.0}},
            RoPE(100.0, scaling=(PositionInterpolation(2.0),)),
        ),
        (
            {"rope_parameters": XTUNER | YARN_KEYS},
            RoPE(100.0, scaling=(YaRN(4.0, 16, truncate=False),)),
        ),
        (
            {
                "rope_parameters": XTUNER
                | {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 16,
                },
                "max_position_embeddings": 64,
            },
            RoPE(100.0, scaling=(Llama3(8.0, 16, 1.0, 1.0),)),
        ),
        # Nous Research's YaRN of Llama 2, of its own code.
        ({"rope_scaling": YARN_KEYS | {"finetuned": True}}, RoPE(scaling=(YaRN(4.0, 16),))),
        ({"rope_scaling": YARN_KEYS | {"rope_type": "yarn"}}, RoPE(scaling=(YaRN(4.0, 16),))),
        ({"rope_scaling": YARN_KEYS | {"attn_factor": 0.5}}, RoPE(scaling=(YaRN(4.0, 16),))),
        # A fact about the training, beside types that do not read it.
        (
            {
                "rope_scaling": {
                    "type": "linear",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                }
            },
            RoPE(scaling=(PositionInterpolation(2.0),)),
        ),
        (
            {
                "rope_scaling": {"type": "su", "short_factor": [1] * 4, "long_factor": [2] * 4},
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 32,
            },
            RoPE(scaling=(LongRoPE((1,) * 4, (2,) * 4, 8, 4.0),)),
        ),
        # Both names of one thing, and neither of them saying anything.
        (
            {
                "rope_theta": 100.0,
                "rope_scaling": YARN_KEYS,
                "rope_parameters": {**YARN_KEYS, "rope_type": "yarn", "rope_theta": 100.0},
            },
            RoPE(100.0, scaling=(YaRN(4.0, 16),)),
        ),
        ({"rope_scaling": {}, "rope_parameters": None}, RoPE()),
        ({"rope_scaling": {"type": None, "factor": None}}, RoPE()),
    ],
    ids=str,
)
def test_rope_parameters_as_people_have_them(rope, position):
    assert from_config(older(max_position_embeddings=64) | rope).position == position


def test_fope_of_xtuner_is_read_from_its_dump():
    """All fields are there; num_inv_freq is null, so that max_position_embeddings decides."""
    keys = {"rope_type": "default", "fope_init_factor": 0.1, "fope_sep_head": True}
    for name, extra in (("rope_parameters", {}), ("rope_scaling", {"fope_sep_heads": None})):
        position = from_config(older(max_position_embeddings=40, **{name: XTUNER | keys | extra}))
        assert position.position == FoPE(
            40, theta=100.0, sigma=0.1, share_layers=True, outputs="surviving", heads="key_value"
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LLAMA | {"model_type": "phi3"}, "model_type='phi3': expected one of llama, mistral, min"),
        (LLAMA | {"attention_bias": True}, "attention_bias=True: the model here .* False only"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=True: the model"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu': .* with 'silu' or 'swish' only"),
        (LLAMA | {"attention_dropout": 0.1}, "attention_dropout=0.1: .* with 0 only"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window=4096: .* with None only"),
        (LLAMA | {"use_sliding_window": True}, "use_sliding_window=True: .* with False only"),
        (
            LLAMA | {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types holds sliding_attention: only 'full_attention'",
        ),
        (LLAMA | {"logit_scale": 0.5}, "unknown key 'logit_scale' with the value 0.5: it may cha"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "weights are quantised; save them as"),
        (LLAMA | {"chunk_size_feed_forward": 64}, "chunk_size_feed_forward=64: .* with 0 only"),
        (LLAMA | {"pruned_heads": {"1": [0]}}, "pruned_heads={'1': .0.}: the model"),
        (LLAMA | {"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config={'0'"),
        (LLAMA | {"auto_map": {"AutoModel": "a.B"}}, "unknown key 'auto_map' with the value {'Au"),
        (LLAMA | {"transformers_weights": "a.safetensors"}, "unknown key 'transformers_weights'"),
        (LLAMA | {"no_rope_layers": [1, 0]}, "unknown key 'no_rope_layers'"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA | {"hidden_size": None}, "'hidden_size' is missing"),
        (LLAMA | {"max_position_embeddings": None}, "'max_position_embeddings' is missing"),
        (LLAMA | {"max_position_embeddings": 0}, "'max_position_embeddings' is 0: expected 1 to"),
        (LLAMA | {"max_position_embeddings": -5}, "'max_position_embeddings' is -5: expected 1"),
        (LLAMA | {"num_hidden_layers": 0}, "'num_hidden_layers' is 0: expected 1 to"),
        (QWEN3 | {"head_dim": None}, "'head_dim' is missing: Hugging Face takes a default"),
        (LLAMA | {"hidden_size": 24.5}, "'hidden_size' is 24.5: expected a whole number"),
        (LLAMA | {"head_dim": 7}, "head_dim=7"),
        (LLAMA | {"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small': expected a finite number"),
        (LLAMA | {"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'"),
        (LLAMA | {"num_key_value_heads": 3}, "num_kv_heads=3: expected a divisor of num_heads=4"),
        (LLAMA | {"rope_parameters": {"rope_type": "axial"}}, "'rope_type' is 'axial'"),
        (LLAMA | {"rope_theta": 5.0}, "'rope_theta' is 100, rope_theta=5.0: leave one out"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters=.*, rope_scaling=.*: leave one out",
        ),
        (
            older(
                rope_theta=5.0,
                rope_parameters=YARN_KEYS,
                rope_scaling=YARN_KEYS | {"rope_theta": 6.0},
            ),
            "rope_parameters=.*: leave one out",
        ),
        (
            older(rope_scaling={"type": "yarn", "rope_type": "linear", "factor": 4.0}),
            "'rope_type' is 'linear', 'type' is 'yarn': leave one out",
        ),
        (
            older(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
            "'rope_type' is 'mrope'. Known: default",
        ),
        (older(rope_scaling={"factor": 4.0}), "'factor' of rope_type='default' with the value 4"),
        (
            older(
                rope_scaling={
                    "type": "dynamic",
                    "factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
                max_position_embeddings=32,
            ),
            "'original_max_position_embeddings' of rope_type='dynamic' is 8, "
            "'max_position_embeddings' is 32: Hugging Face takes the latter",
        ),
        (older(rope_scaling="linear"), "rope_scaling='linear': expected a mapping of its keys"),
        (
            older(rope_parameters={"full_attention": YARN_KEYS, "sliding_attention": YARN_KEYS}),
            "nested by 'full_attention', 'sliding_attention': ",
        ),
        (
            older(rope_scaling=YARN_KEYS | {"original_max_position_embeddings": 1, "beta_slow": 8}),
            "YaRN interpolates all 4 frequencies, Hugging Face keeps them: change these keys",
        ),
        (
            older(
                rope_theta=2.0,
                rope_scaling=YARN_KEYS
                | {"original_max_position_embeddings": 10**6, "beta_fast": 1.5},
            ),
            "YaRN keeps all 4 frequencies, Hugging Face interpolates them",
        ),
        (older(partial_rotary_factor=0.5), "partial_rotary_factor=0.5: these models rotate the wh"),
        (
            LLAMA | {"partial_rotary_factor": 0.5, "rope_parameters": ENGINES},
            "partial_rotary_factor=0.5: these models",
        ),
        (SMOLLM3 | {"rope_parameters": ENGINES}, r"no_rope_layers=\[1, 1, 1, 0\]: FoPE is in all"),
        (
            SMOLLM3 | {"no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval=0: expected 1 or more",
        ),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]: .* each of 4 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_represented_is_named_with_its_value(values, message):
    with pytest.raises(ValueError, match=message):
        from_config(values)
