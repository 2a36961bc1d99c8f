"""Tiny GGUF files, written with the library: two layers, random weights, 300 tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fope_jax.data.tokenizers.tokenizer_json import BYTE_ALPHABET

TYPES = gguf.GGMLQuantizationType
VOCAB, LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP = 300, 2, 256, 4, 2, 64, 256
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "Ġ th", "Ġth e", "Ġ Ġ", "1 2", "Ġ 1", "a n", "Ġ an", "an d"]


def vocabulary() -> tuple[list[str], list[int]]:
    """300 tokens and their types: 3 special, 256 bytes, 9 merged, 1 user-defined, 31 unused."""
    tokens = [*CONTROL, *BYTE_ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<think>"]
    types = [3] * 3 + [1] * (256 + len(MERGES)) + [4]
    unused = range(len(tokens), VOCAB)
    return tokens + [f"[PAD{i}]" for i in unused], types + [5] * len(unused)


def metadata(architecture: str = "llama") -> dict[str, Any]:
    """What the converter of llama.cpp writes; a key of the architecture has no prefix here."""
    tokens, types = vocabulary()
    return {
        "context_length": 128,
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50_000.0,
        "rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def random_tensors(
    architecture: str = "llama", tied: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Weights by their names in a GGUF file, ``[outputs, inputs]`` float32."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {} if tied else {"output": (VOCAB, WIDTH)}
    q_width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    norms = {"attn_norm": WIDTH, "ffn_norm": WIDTH}
    if architecture == "qwen3":
        norms |= {"attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}
    if architecture == "olmo2":
        norms = {"post_attention_norm": WIDTH, "post_ffw_norm": WIDTH}
        norms |= {"attn_q_norm": q_width, "attn_k_norm": kv_width}
    for layer in range(LAYERS):
        matrices = {
            "attn_q": (q_width, WIDTH),
            "attn_k": (kv_width, WIDTH),
            "attn_v": (kv_width, WIDTH),
            "attn_output": (WIDTH, q_width),
            "ffn_gate": (MLP, WIDTH),
            "ffn_up": (MLP, WIDTH),
            "ffn_down": (WIDTH, MLP),
        }
        every = matrices | {name: (size,) for name, size in norms.items()}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in every.items()}
    if architecture == "qwen2":
        sizes = {"q": q_width, "k": kv_width, "v": kv_width}
        for layer, part in itertools.product(range(LAYERS), sizes):
            shapes[f"blk.{layer}.attn_{part}.bias"] = (sizes[part],)
    return {
        name if name.endswith(".bias") else f"{name}.weight": (
            1 + 0.1 * rng.standard_normal(shape)
            if len(shape) == 1
            else rng.standard_normal(shape) / 16
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def quantised(array: np.ndarray, kind: gguf.GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """The bytes of a tensor. The library writes no K-quants: random ones, with sane scales."""
    if kind not in (TYPES.Q4_K, TYPES.Q6_K):
        return gguf.quants.quantize(array, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (array.size // elements, size), np.uint8)
    scale = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    for start in (0, 2) if kind == TYPES.Q4_K else (208,):  # d and dmin first; d last
        blocks[:, start : start + 2] = scale
    return blocks.reshape(array.shape[0], -1)


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    architecture: str = "llama",
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    values: Mapping[str, Any] | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Writes a file; ``values`` replace those of `metadata`, None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for key, value in (metadata(architecture) | dict(values or {})).items():
        name = key if key.startswith(("tokenizer.", "general.", "split.")) else None
        _add(writer, name or f"{architecture}.{key}", value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name, TYPES.F32)
        writer.add_tensor(name, quantised(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    for kind, add in (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ):
        if isinstance(value, kind):
            add(key, value)
            return
    raise TypeError(f"{key}: {value!r}")
