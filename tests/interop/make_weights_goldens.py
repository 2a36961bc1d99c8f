"""Tiny models of Hugging Face transformers with random weights, and the goldens made of them.

Needs PyTorch and transformers, which the fast tests do not:

    pip install '.[parity]'
    python -m tests.interop.make_weights_goldens [MODEL ...]

writes ``tests/goldens/weights``: for each model a checkpoint as transformers saves it, and in
``logits.npz`` what it computes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.extras import require

GOLDENS = Path(__file__).parents[1] / "goldens" / "weights"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    # Larger than in training, so that attention is far from uniform and differences show.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention"]
_QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
# Heads of 8 dimensions where the family has a width of its own for them, 6 otherwise.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 8, "rms_norm_eps": 1e-5}),
    "smollm": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "olmo2": ("Olmo2", {}),
    # At 0.3 four layers make 1e-4 of the rounding of frequencies to float32, which is theirs.
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "initializer_range": 0.2}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 7}),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 7, "layer_types": _ALTERNATING}),
    "qwen2": ("Qwen2", _QWEN_WINDOWS | {"initializer_range": 0.2}),
    "qwen3_windows": ("Qwen3", _QWEN_WINDOWS | {"head_dim": 8}),
    "olmo3": (
        "Olmo3",
        {"num_hidden_layers": 4, "sliding_window": 7, "initializer_range": 0.2, "pad_token_id": 0},
    ),
    "smollm3_windows": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "initializer_range": 0.2,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
}
LENGTHS = (12, 40)  # within 16 positions and beyond; position by position also below the window


def rope_types(head_dim: int) -> dict[str, dict[str, Any]]:
    """``rope_parameters`` of every type these models have, for 16 trained positions."""
    pairs = head_dim // 2
    base = {"rope_theta": 100.0}
    original = {"original_max_position_embeddings": 16}
    return {
        "default": {"rope_type": "default", **base},
        "linear": {"rope_type": "linear", "factor": 4.0, **base},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0, **base},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, **original, **base},
        "longrope": {
            "rope_type": "longrope",
            "short_factor": np.linspace(1.0, 1.5, pairs).tolist(),
            "long_factor": np.linspace(1.5, 4.0, pairs).tolist(),
            "factor": 4.0,
            **original,
            **base,
        },
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **original,
            **base,
        },
        "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, **base},
    }


def config_of(name: str, rope: str = "default") -> dict[str, Any]:
    """Arguments of the configuration of one of ``MODELS``."""
    values = SIZES | MODELS[name][1]
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values["rope_parameters"] = rope_types(head_dim)[rope]
    if name == "olmo3":  # as published: the type is that of the full layers
        local = {"rope_type": "default", "rope_theta": 50.0}
        types = {"full_attention": values["rope_parameters"], "sliding_attention": local}
        values["rope_parameters"] = types
    if rope in ("yarn", "longrope", "llama3"):
        values["max_position_embeddings"] = 64  # the length extended to
    return values


def build(name: str, rope: str = "default", **changes: Any) -> Any:
    """A model of PyTorch with random weights, scales of norms included."""
    torch, transformers = require("torch", "parity"), require("transformers", "parity")
    kind = MODELS[name][0]
    config = getattr(transformers, f"{kind}Config")(**(config_of(name, rope) | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # ones and zeros would hide a norm or a bias that is left out
        for key, value in model.named_parameters():
            if key.endswith("norm.weight"):
                value.uniform_(0.5, 1.5)
            if key.endswith("proj.bias"):
                value.uniform_(-1.0, 1.0)
    return model


def tokens(length: int, vocab_size: int = SIZES["vocab_size"]) -> np.ndarray:
    """``[1, T]``, the same ones at every call."""
    return np.random.default_rng(length).integers(0, vocab_size, (1, length)).astype(np.int32)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """What the model of PyTorch computes, ``[B, T, V]`` float32."""
    torch = require("torch", "parity")
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def load(directory: Path) -> Any:
    """The model of PyTorch in a directory, in float32.

    Not ``model.float()`` after ``.to(bfloat16)``, which would round its frequencies too.
    """
    torch, transformers = require("torch", "parity"), require("transformers", "parity")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def main(names: list[str]) -> None:
    """Writes those of the given names, beside what is there; all of them where none is given."""
    torch = require("torch", "parity")
    if not names:
        shutil.rmtree(GOLDENS, ignore_errors=True)
    arrays = dict(np.load(GOLDENS / "logits.npz")) if names else {}
    for name in names or MODELS:
        model = build(name)
        options: dict[str, Any] = {}
        if name == "qwen3":
            options["max_shard_size"] = "20KB"
        if name == "smollm":
            model = model.to(torch.bfloat16)
        model.save_pretrained(GOLDENS / name, **options)
        (GOLDENS / name / "generation_config.json").unlink(missing_ok=True)
        model = load(GOLDENS / name)
        for length in LENGTHS:
            arrays[f"{name}/default/{length}"] = logits(model, tokens(length))
    if names:
        np.savez_compressed(GOLDENS / "logits.npz", **arrays)
        return
    ropes = {}
    for rope in rope_types(8):
        model = build("llama", rope)
        ropes[rope] = config_of("llama", rope)
        for length in LENGTHS:
            arrays[f"llama/{rope}/{length}"] = logits(model, tokens(length))
    for length in LENGTHS:
        arrays[f"tokens/{length}"] = tokens(length)
    np.savez_compressed(GOLDENS / "logits.npz", **arrays)
    keys = ("rope_parameters", "max_position_embeddings")
    stated = {rope: {key: values[key] for key in keys} for rope, values in ropes.items()}
    (GOLDENS / "rope_types.json").write_text(json.dumps(stated, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
