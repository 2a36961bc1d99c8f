"""Weights against transformers itself: what it saves, what it computes, and what it loads.

Slow, and with two libraries that nothing else needs: pip install '.[parity]'.
"""

import copy
import dataclasses
import itertools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fope_jax.interop.huggingface import from_config
from fope_jax.interop.layer_positions import layer_positions
from fope_jax.interop.weights import export_weights, import_weights
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import (
    ByLayer,
    DynamicNTK,
    Llama3,
    LongRoPE,
    NoPE,
    Proportional,
    RoPE,
    SlidingWindow,
    YaRN,
)
from tests.interop.make_weights_goldens import (
    GOLDENS,
    LENGTHS,
    MODELS,
    build,
    config_of,
    load,
    logits,
    rope_types,
    tokens,
)
from tests.interop.random_rope import ORIGINAL, random_parameters
from tests.interop.weights_runs import logits_of_parts

pytestmark = pytest.mark.slow

# One token; the window, one more; the trained length, one more; and eight times as many.
ALL_LENGTHS = (1, 7, 8, 16, 17, 40, 128)


def assert_parity(parts, model, tolerance):
    for length in ALL_LENGTHS:
        ids = tokens(length, parts[0].vocab_size)
        expected = logits(model, ids)
        assert np.abs(expected).max() > 0.5
        ours = logits_of_parts(parts, ids)
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rope", rope_types(8))
@pytest.mark.parametrize("name", MODELS)
def test_every_family_with_every_rope_type_at_every_length(tmp_path, name, rope):
    model = build(name, rope)
    model.save_pretrained(tmp_path / "theirs")
    imported = import_weights(tmp_path / "theirs")
    assert_parity(imported, model, 1e-4)

    extra_keys = imported.extra_keys
    length = extra_keys["max_position_embeddings"]
    export_weights(tmp_path / "ours", *imported[:4], length=length, extra_keys=extra_keys)
    again = load(tmp_path / "ours")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all((before[key] == after[key]).all() for key in before)
    for length in ALL_LENGTHS:
        ids = tokens(length)
        np.testing.assert_allclose(logits(again, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    # Keys of the configuration that transformers wrote mean the same in ours.
    written, original = again.config.to_dict(), model.config.to_dict()
    ignored = {"_name_or_path", "fope_jax", "head_dim", "rope_parameters"}
    assert {k: written[k] for k in original if k not in ignored} == {
        k: value for k, value in original.items() if k not in ignored
    }
    stated, read = original["rope_parameters"], written["rope_parameters"]
    for one, other in [(stated[kind], read[kind]) for kind in stated if name == "olmo3"] or [
        (stated, read)
    ]:
        assert one.items() <= other.items()


@pytest.mark.parametrize(
    ("position", "changes"),
    [
        (RoPE(theta=100.0), {}),
        (RoPE(theta=100.0), {"tie_embeddings": True, "head_dim": 6}),
        (RoPE(scaling=(YaRN(4.0, 16),)), {"qk_norm": "head", "head_dim": 10}),
        (RoPE(scaling=(DynamicNTK(2.0, 16),)), {"norm": "post", "qk_norm": "width"}),
        (RoPE(scaling=(Llama3(4.0, 16),)), {"norm": "post", "qk_norm": "width", "head_dim": 10}),
        (RoPE(scaling=(Proportional(0.5),)), {"qk_norm": "head", "tie_embeddings": True}),
        (ByLayer((RoPE(), NoPE())), {"head_dim": 10}),
        (NoPE(), {"tie_embeddings": True}),
        (RoPE(theta=100.0), {"windows": (7,)}),
        (RoPE(theta=100.0), {"windows": (7, None), "head_dim": 10}),
        (RoPE(scaling=(YaRN(4.0, 16),)), {"qk_norm": "head", "windows": (None, 7)}),
        (RoPE(scaling=(YaRN(4.0, 16),)), {"qkv_bias": True, "windows": (7,)}),
        (RoPE(theta=100.0), {"qkv_bias": True, "head_dim": 10}),
        (RoPE(theta=100.0), {"norm": "post", "qk_norm": "width", "windows": (7, None)}),
        (
            ByLayer((SlidingWindow(RoPE(50.0), 7), RoPE(scaling=(DynamicNTK(2.0, 16),)))),
            {"norm": "post", "qk_norm": "width", "head_dim": 6},
        ),
        (ByLayer((NoPE(), SlidingWindow(RoPE(theta=100.0), 7))), {}),
        (ByLayer((SlidingWindow(NoPE(), 7), RoPE(theta=100.0))), {"windows": ()}),
    ],
    ids=str,
)
def test_models_of_our_own_load_in_transformers(tmp_path, position, changes):
    sizes = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    config = TransformerConfig(**sizes, mlp_dim=48, init_std=0.3, **changes)
    _, params, constants = split(Transformer(config, position, rngs=nnx.Rngs(2)))
    rng = np.random.default_rng(0)
    for key in [key for key in params["layers"] if key.endswith(("_norm", "_bias"))]:
        shape = params["layers"][key].shape
        params["layers"][key] = jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
    export_weights(tmp_path, config, position, params, constants, length=64)
    assert_parity((config, position, params, constants), load(tmp_path), 1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if "sliding_window" in config_of(name)])
def test_windows_that_are_not_stated_are_those_of_transformers(name):
    """``layer_types`` of all combinations of keys, those that transformers cannot run left out."""
    transformers = pytest.importorskip("transformers")
    model_type = json.loads((GOLDENS / name / "config.json").read_text())["model_type"]
    own = config_of(name)
    count = own["num_hidden_layers"]
    compared = 0
    for window, uses, first, types in itertools.product(
        ("absent", None, 5),
        ("absent", True, False),
        ("absent", 0, 1, count),
        ("absent", None, ["full_attention"] * count, ["sliding_attention"] * count),
    ):
        keys = {"sliding_window": window, "use_sliding_window": uses}
        keys |= {"max_window_layers": first, "layer_types": types}
        if "use_sliding_window" not in own:
            keys |= {"use_sliding_window": "absent"}
        stated = {key: value for key, value in keys.items() if value != "absent"}
        values = {key: x for key, x in own.items() if key not in keys} | stated
        theirs = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(values))
        if name == "mistral":
            if "layer_types" in values:
                continue  # AutoConfig takes a file for a ministral
            expected = [theirs.sliding_window] * count
        else:
            sliding = [kind == "sliding_attention" for kind in theirs.layer_types]
            expected = [theirs.sliding_window if kind else None for kind in sliding]
            uses = getattr(theirs, "use_sliding_window", True)
            if any(sliding) and not (theirs.sliding_window and uses):
                with pytest.raises(ValueError, match="holds sliding_attention, but"):
                    from_config(values | {"model_type": model_type})
                continue
        imported = from_config(values | {"model_type": model_type})
        layers = layer_positions(imported.config, imported.position)
        assert [layer.window for layer in layers] == expected, stated
        compared += 1
    assert compared >= 3


def test_random_rope_parameters_turn_as_in_transformers():
    """Frequencies and attention factor of 400 of them, in both spellings, read from config.json."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rng = np.random.default_rng(1)
    compared = 0
    for number in range(450):
        head_dim, length, keys = random_parameters(rng)
        share = keys.pop("partial_rotary_factor", 1)  # these models turn the whole head
        for name in ("short_factor", "long_factor"):
            if name in keys:
                keys[name] = (keys[name] * round(1 / share))[: head_dim // 2]
        original = keys.get(ORIGINAL, 2048)
        values = {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 2 * head_dim,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": head_dim,
            "max_position_embeddings": original,
        }
        if keys["rope_type"] == "llama3":
            values["max_position_embeddings"] = 16 * original
        if number % 2:
            theta = keys.pop("rope_theta")
            values |= {"rope_scaling": keys, "rope_theta": theta}
        else:
            values["rope_parameters"] = keys
        try:
            method = from_config(values).position
        except ValueError as error:
            assert "Hugging Face" in str(error) and "YaRN" in str(error), keys
            continue
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(values)))
        ids = torch.tensor([[0, length - 1]])
        theirs(torch.zeros(1, 2, head_dim), ids)
        steps = tuple(
            dataclasses.replace(step, length=length)
            if isinstance(step, DynamicNTK | LongRoPE)
            else step
            for step in method.scaling
        )
        ours = dataclasses.replace(method, scaling=steps)
        expected = theirs.inv_freq.numpy()
        np.testing.assert_allclose(
            ours.frequencies(head_dim), expected, rtol=1e-5, err_msg=f"{length} {keys}"
        )
        assert ours.attention_factor(head_dim) == pytest.approx(theirs.attention_scaling), keys
        compared += 1
    assert compared > 400


@pytest.mark.parametrize("case", ["lm_head alone", "index and model.safetensors"])
def test_files_that_disagree_are_read_as_transformers_reads_them(tmp_path, case):
    name = "smollm" if case == "lm_head alone" else "qwen3"
    shutil.copytree(GOLDENS / name, tmp_path, dirs_exist_ok=True)
    stored = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    if name == "smollm":
        stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    else:
        stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"][::-1].copy()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_parity(import_weights(tmp_path), load(tmp_path), 1e-4)


def test_the_goldens_are_what_transformers_computes_now(tmp_path):
    """Their own tolerance and not bits: another build of PyTorch may add up in another order."""
    stored = np.load(GOLDENS / "logits.npz")
    stated = json.loads((GOLDENS / "rope_types.json").read_text())
    for rope in rope_types(8):
        model = build("llama", rope)
        values = config_of("llama", rope)
        assert stated[rope] == {key: values[key] for key in stated[rope]}
        for length in LENGTHS:
            expected = logits(model, tokens(length))
            np.testing.assert_allclose(stored[f"llama/{rope}/{length}"], expected, atol=1e-4)
    for name in MODELS:
        model = load(GOLDENS / name)
        for length in LENGTHS:
            expected = logits(model, tokens(length))
            np.testing.assert_allclose(stored[f"{name}/default/{length}"], expected, atol=1e-4)
