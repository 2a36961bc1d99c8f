"""Windows and positions by layer in config.json: what they mean here, and what must raise."""

import dataclasses
import json
from pathlib import Path

import pytest

from fope_jax.interop.families import FAMILIES, UNSUPPORTED
from fope_jax.interop.huggingface import export_warning, family_of, from_config, to_config
from fope_jax.interop.layer_positions import from_layer_positions, layer_positions
from fope_jax.model.config import TransformerConfig
from fope_jax.position import (
    ALiBi,
    ByLayer,
    FoPE,
    LocalChunks,
    NoPE,
    PositionInterpolation,
    RoPE,
    SlidingWindow,
    YaRN,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")


def golden(name, without=(), **changes):
    values = json.loads((GOLDENS / name / "config.json").read_text())
    return {key: x for key, x in values.items() if key not in without} | changes


def layers_of(values):
    """Method and window of each layer, however they are stored."""
    imported = from_config(values)
    config = imported.config
    return layer_positions(config, imported.position)


def windows_of(values):
    return [layer.window for layer in layers_of(values)]


# ---------------------------------------------------------------------------- as published

# The keys that decide, of the files that their authors publish; sizes are smaller here.
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu"}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.0}
SIZES |= {"initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
OLMO3 = SIZES | {
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "num_hidden_layers": 8,
    "max_position_embeddings": 65_536,
    "attention_bias": False,
    "eos_token_id": 7,
    "pad_token_id": 9,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "rope_theta": 500_000,
    "tie_word_embeddings": False,
}
SMOLLM3 = SIZES | {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "num_hidden_layers": 8,
    "max_position_embeddings": 65_536,
    "attention_bias": False,
    "bos_token_id": None,
    "layer_types": [FULL] * 8,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 2,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 5_000_000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
MISTRAL = SIZES | {
    "model_type": "mistral",
    "num_hidden_layers": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
QWEN2 = SIZES | {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "max_position_embeddings": 32_768,
    "max_window_layers": 3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "sliding_window": 131_072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "use_mrope": False,
}
LOCAL = SlidingWindow(RoPE(500_000), 4096)
LONG = YaRN(8.0, 8192, attention_factor=1.2079441541679836)


@pytest.mark.parametrize(
    ("values", "windows", "position"),
    [
        (OLMO3, (), ByLayer((LOCAL,) * 3 + (RoPE(500_000, scaling=(LONG,)),))),
        # Before its extension, one RoPE serves all layers.
        (OLMO3 | {"rope_scaling": None}, (4096, 4096, 4096, None), RoPE(500_000)),
        (SMOLLM3, (), ByLayer((RoPE(5e6),) * 3 + (NoPE(),))),
        (MISTRAL, (4096,), RoPE()),
        (MISTRAL | {"sliding_window": None, "rope_theta": 1e6}, (), RoPE(1e6)),
        # Transformers takes a mistral with layer_types for a ministral.
        (MISTRAL | {"layer_types": [FULL, SLIDING] * 2}, (None, 4096), RoPE()),
        (QWEN2, (), RoPE(1e6)),
        (QWEN2 | {"use_sliding_window": True}, (None, None, None, 131_072), RoPE(1e6)),
        (
            QWEN2 | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64},
            (64,),
            RoPE(1e6),
        ),
    ],
    ids=str,
)
def test_published_configurations_in_their_one_form(values, windows, position):
    imported = from_config(values)
    assert (imported.config.windows, imported.position) == (windows, position)
    assert imported.config.qkv_bias == (values["model_type"] == "qwen2")


def test_olmo3_has_yarn_in_its_full_layers_alone():
    layers = layers_of(OLMO3)
    for layer, kind in zip(layers, OLMO3["layer_types"], strict=True):
        assert layer.window == (4096 if kind == SLIDING else None)
        assert layer.method.scaling == (() if kind == SLIDING else (LONG,))
    # The newer spelling says the same; an entry of a type that no layer has is not read.
    local = {"rope_type": "default", "rope_theta": 500_000}
    nested = {FULL: local | OLMO3["rope_scaling"], SLIDING: local}
    newer = {key: x for key, x in OLMO3.items() if key not in ("rope_scaling", "rope_theta")}
    assert layers_of(newer | {"rope_parameters": nested}) == layers
    alone = {"rope_parameters": {FULL: nested[FULL], SLIDING: None}, "layer_types": [FULL] * 8}
    assert from_config(newer | alone).position == RoPE(500_000, scaling=(LONG,))


# ---------------------------------------------------------------------------- keys of windows


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (golden("mistral", without=("sliding_window",)), [4096] * 2),  # the default there
        (golden("mistral", sliding_window=None), [None] * 2),  # null is none
        (golden("ministral", layer_types=None), [7] * 2),
        (golden("ministral", layer_types=None, sliding_window=None), [None] * 2),
        (golden("olmo3", layer_types=None), [7, 7, 7, None]),
        (golden("qwen2", layer_types=None), [None, 7]),
        (golden("qwen2", layer_types=[SLIDING, FULL]), [7, None]),  # max_window_layers is not read
        (golden("qwen3_windows", layer_types=None, max_window_layers=None), [None] * 2),
        (golden("qwen3_windows", layer_types=None, sliding_window=None), [None] * 2),
        (golden("qwen3_windows", without=WINDOW_KEYS), [None] * 2),
        (golden("smollm3_windows", layer_types=None), [None, None, None, 7]),
        (golden("smollm3_windows", layer_types=[SLIDING] * 3 + [FULL]), [7, 7, 7, None]),
        (golden("smollm3_windows", without=WINDOW_KEYS), [None] * 4),
    ],
)
def test_the_window_of_each_layer(values, windows):
    """As transformers 5.24 fills in what is not stated; ``weights_parity_test`` asks it."""
    assert windows_of(values) == windows


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (golden("mistral", sliding_window=0), "sliding_window=0: expected 1 token or more"),
        (golden("mistral", sliding_window=2.5), "'sliding_window' is 2.5: expected a whole number"),
        (golden("mistral", use_sliding_window=False), "use_sliding_window=False with sliding_win"),
        (golden("mistral", rope_parameters={FULL: {}, SLIDING: {}}), "nested by 'full_attention'"),
        (golden("ministral", layer_types=[SLIDING]), "layer_types=.*: expected a list with 2 ent"),
        (golden("ministral", layer_types="all"), "layer_types='all': expected a list with 2"),
        (
            golden("ministral", layer_types=[FULL, "chunked_attention"]),
            "layer_types holds chunked_attention: known are full_attention, sliding_attention",
        ),
        (
            golden("ministral", sliding_window=None),
            "holds sliding_attention, but sliding_window is",
        ),
        (
            golden("qwen3_windows", use_sliding_window=False),
            "but use_sliding_window is False: chan",
        ),
        (golden("qwen3_windows", use_sliding_window=1), "'use_sliding_window' is 1: expected True"),
        (golden("qwen2", attention_bias=True), "attention_bias=True: the model here can be built"),
        (golden("olmo3", sliding_window=None, layer_types=None), "but sliding_window is null"),
        (
            golden("olmo3", rope_parameters={"rope_type": "default"}),
            "rope_parameters has rope_type",
        ),
        (
            golden("olmo3", rope_parameters={FULL: 3}),
            "rope_parameters.full_attention=3: expected a",
        ),
        (
            golden("olmo3", rope_parameters={FULL: {"rope_type": "axial"}}),
            "rope_parameters.full_attention: 'rope_type' is 'axial'",
        ),
        (
            golden("olmo3", rope_scaling={"rope_type": "linear", "factor": 2.0}),
            "rope_parameters=.*, rope_scaling=.*: leave one out",
        ),
        (
            golden("olmo3", without=("rope_parameters",), rope_theta=1e4),
            "rope_theta=10000.0: transformers gives it to full layers and 500000 to those with a ",
        ),
        (
            golden("olmo3", original_max_position_embeddings=8),
            "original_max_position_embeddings=8: Hugging Face does not read it here",
        ),
        (
            golden("olmo3", rope_parameters={FULL: {"num_inv_freq": 2}}),
            "rope_parameters.full_attention=.*: FoPE is in all layers or none",
        ),
        (
            golden(
                "mistral",
                rope_parameters={
                    "rope_theta": 100.0,
                    "num_inv_freq": 2,
                    "fope_sep_head": True,
                    "fope_init_factor": 0.3,
                },
            ),
            "sliding_window=7: no engine has it with FoPE",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named_with_its_value(values, message):
    with pytest.raises(ValueError, match=message):
        from_config(values)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_families_that_cannot_be_built_are_named_with_the_reason(name):
    with pytest.raises(ValueError, match=f"model_type='{name}': it has (four|a mix|queries)"):
        from_config(golden("mistral", model_type=name))


# ---------------------------------------------------------------------------- there and back

RUN = {"vocab_size": 40, "d_model": 32, "num_layers": 4, "num_heads": 4, "mlp_dim": 48}
RUN |= {"num_kv_heads": 2, "head_dim": 8}
OLMO = {"norm": "post", "qk_norm": "width"}
BOTH = ByLayer((SlidingWindow(RoPE(), 8), RoPE(scaling=(PositionInterpolation(2.0),))))


@pytest.mark.parametrize(
    ("family", "changes", "position"),
    [
        ("mistral", {"windows": (8,)}, RoPE()),
        ("mistral", {}, SlidingWindow(RoPE(), 8)),
        ("mistral", {"windows": (8, 8)}, RoPE()),
        ("mistral", {}, ByLayer((SlidingWindow(RoPE(), 8),) * 4)),
        ("ministral", {"windows": (8, 8, 8, None)}, RoPE()),
        ("ministral", {"windows": (8, None)}, ByLayer((RoPE(), RoPE()))),
        ("qwen2", {"qkv_bias": True}, RoPE()),
        ("qwen2", {"qkv_bias": True, "windows": (None, 8)}, RoPE()),
        ("qwen3", {"qk_norm": "head", "windows": (8,)}, RoPE()),
        ("qwen3", {"qk_norm": "head"}, ByLayer((RoPE(), SlidingWindow(RoPE(), 8)))),
        ("olmo2", OLMO, ByLayer((RoPE(), RoPE()))),
        ("olmo3", OLMO | {"windows": (8,)}, RoPE()),
        ("olmo3", OLMO | {"windows": (8, None)}, RoPE(scaling=(YaRN(4.0, 16),))),
        ("olmo3", OLMO, BOTH),
        # Global layers without position, local ones with RoPE: SWAN's pattern.
        ("smollm3", {}, ByLayer((NoPE(), *(SlidingWindow(RoPE(), 8),) * 3))),
        ("smollm3", {"windows": (8, None)}, NoPE()),
        ("smollm3", {"windows": (8,)}, ByLayer((RoPE(), NoPE()))),
    ],
    ids=str,
)
def test_layers_go_out_as_the_first_family_that_has_them_and_come_back(family, changes, position):
    config = TransformerConfig(**RUN, **changes)
    values = to_config(config, position, "0a1b", length=24, extra_keys={})
    assert values["model_type"] == family == family_of(config, position)
    assert export_warning(config, position) is None
    back = from_config(json.loads(json.dumps(values)))
    assert back.position == position
    assert dataclasses.replace(back.config, init_std=config.init_std) == config
    # Without what the export adds, the keys say the same of each layer, in one form.
    layers = layer_positions(config, position)
    bare = from_config({key: x for key, x in values.items() if key != "fope_jax"})
    assert layer_positions(bare.config, bare.position) == layers
    assert (bare.config.windows, bare.position) == from_layer_positions(layers)
    again = to_config(bare.config, bare.position, "0a1b", length=24, extra_keys=bare.extra_keys)
    assert from_config(again)[:2] == bare[:2]
    written = {key: x for key, x in values.items() if key not in ("fope_jax", "attention_bias")}
    assert {key: again[key] for key in written} == written


@pytest.mark.parametrize(
    ("changes", "position", "message"),
    [
        ({"windows": (8, 16)}, RoPE(), "windows of 8, 16 tokens: models of Hugging Face have one"),
        (
            {"windows": (8, None)},
            ALiBi(),
            "position.method='alibi': models of Hugging Face have no",
        ),
        ({}, LocalChunks(RoPE(), 8), "'local_chunks': models of Hugging Face have .* chunk"),
        ({}, BOTH, "'by_layer', a window in some layers, another RoPE in layers with a window: no"),
        ({}, ByLayer((RoPE(), RoPE(5e5))), "position.methods=.*: Hugging Face knows layers with"),
        (OLMO | {"windows": (8,)}, ByLayer((RoPE(), NoPE())), "layers without position: no family"),
        ({"qkv_bias": True, "qk_norm": "head"}, RoPE(), "qk_norm='head', qkv_bias=True with posi"),
        (
            {"attention_sinks": True},
            RoPE(),
            "attention_sinks=True: .* gpt-oss has them, with a mix",
        ),
        (
            {"windows": (8,)},
            FoPE(40, share_layers=True, outputs="surviving"),
            "position.method='fope' with a window in all layers: engines have FoPE in",
        ),
        (
            {},
            ByLayer((FoPE(40, share_layers=True, outputs="surviving"),) * 2),
            "position.method='by_layer' of FoPE: engines hold one set of coefficients",
        ),
        ({"windows": (8,)}, BOTH, r"model.windows=\(8,\): position ByLayer has window=8 it"),
        (
            {"windows": (8, None, None)},
            RoPE(),
            "RoPE repeats after 1 layers, with windows of 3 after 3: num_layers=4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_no_family_has_are_named_before_training(changes, position, message):
    config = TransformerConfig(**RUN, **changes)
    with pytest.raises(ValueError, match=message):
        family_of(config, position)
    assert "this run cannot be exported to Hugging Face: " in export_warning(config, position)


def test_windows_that_were_changed_after_an_export_are_refused():
    config = TransformerConfig(**RUN, windows=(8, None))
    values = to_config(config, RoPE(), "0a1b", length=24, extra_keys={})
    with pytest.raises(ValueError, match="'sliding_window': 9.* but fope_jax.position.* 8"):
        from_config(values | {"sliding_window": 9})
    changed = {key: x for key, x in values.items() if key != "fope_jax"} | {"sliding_window": 9}
    assert from_config(changed).config.windows == (9, None)


def test_a_run_keeps_the_window_keys_that_turn_windows_off():
    """And no others: a mistral without windows goes out as a Llama, which knows no such key."""
    kept = from_config(QWEN2).extra_keys
    assert {kept["sliding_window"], kept["use_sliding_window"]} == {131_072, False}
    for values in (MISTRAL | {"sliding_window": None}, OLMO3 | {"layer_types": [FULL] * 8}):
        kept = from_config(values).extra_keys
        assert not {"sliding_window", "layer_types"} & kept.keys()
    # A window that a later training brings overrules what was kept.
    imported = from_config(QWEN2)
    config = dataclasses.replace(imported.config, windows=(64,))
    extra_keys = imported.extra_keys
    values = to_config(config, imported.position, "0a1b", length=8, extra_keys=extra_keys)
    assert windows_of(values) == [64] * 4


def test_families_are_told_apart_by_their_layers():
    """None after the first of a kind is without something of its own."""
    seen = {}
    for name, family in FAMILIES.items():
        kind = family.norm, family.qk_norm, family.qkv_bias
        assert not family.has <= seen.get(kind, frozenset()), name
        seen[kind] = seen.get(kind, frozenset()) | family.has
