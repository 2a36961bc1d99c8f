"""GGUF files of llama.cpp: metadata to a model's configuration, tensors to its parameters.

Read with the package ``gguf``, whose ``dequantize`` gives the float32 numbers of every
quantisation. Metadata becomes the config.json that ``huggingface.from_config`` reads.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fope_jax.extras import require
from fope_jax.interop.huggingface import MAX_POSITIONS, ImportedConfig, from_config
from fope_jax.interop.rope_parameters import ORIGINAL, THETA, from_rope_parameters
from fope_jax.interop.tensor_checks import check_finite, check_tensors, empty_params
from fope_jax.interop.weights import ImportedModel, tensor_views
from fope_jax.model.finite import count_non_finite
from fope_jax.position import RoPE
from fope_jax.storage.content import GGUF_MAGIC, detect_content, has_gguf_magic, read_head

SUFFIX = ".gguf"
EXTRA = "gguf"
ARCHITECTURE = "general.architecture"
ROPE_FREQS = "rope_freqs.weight"
TOKENIZER = "tokenizer.ggml."
_LLAMA3_LENGTH = 8192  # tokens, of each model of Meta that has ``rope_freqs.weight``
_HEADS = "num_attention_heads"
_SIZES = {
    "context_length": MAX_POSITIONS,
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": _HEADS,
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_REQUIRED = ("context_length", "block_count", "embedding_length", "feed_forward_length")
_REQUIRED += ("attention.head_count", "attention.layer_norm_rms_epsilon")
_SCALING = "rope.scaling."
_SCALING_KEYS = {
    "type",
    "factor",
    "original_context_length",
    "finetuned",  # changes no number
    "yarn_beta_fast",
    "yarn_beta_slow",
}
_KEYS = {*_SIZES, "attention.value_length", "rope.dimension_count", "rope.freq_base"}
_KEYS |= {"rope.scale_linear"} | {_SCALING + key for key in _SCALING_KEYS}
# Keys that are accepted with these values only.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}


class Architecture(NamedTuple):
    """The ``model_type`` with the same layers; whether q and k hold rotated pairs side by side."""

    model_type: str
    permuted: bool


# llama.cpp rotates pairs (2 i, 2 i + 1) in some architectures, for which its converter reorders the
# rows of q and k, and pairs (i, i + H/2), as here, in the others.
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "smollm3": Architecture("smollm3", permuted=True),
    "qwen2": Architecture("qwen2", permuted=False),
    "qwen3": Architecture("qwen3", permuted=False),
    "olmo2": Architecture("olmo2", permuted=False),
}


class GGUFFile(NamedTuple):
    """An open file: its metadata by key, and its tensors by name, not dequantised yet."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]  # ``gguf.ReaderTensor``

    @property
    def quantisations(self) -> str:
        """The types of the tensors and how many there are of each, the most frequent first."""
        counts = Counter(tensor.tensor_type.name for tensor in self.tensors.values())
        return ", ".join(f"{name} {count}" for name, count in counts.most_common())


# ---------------------------------------------------------------------------- the file


def is_gguf(source: str | Path) -> bool:
    """Whether a path is named as a GGUF file is, or begins as one.

    >>> is_gguf("models/SmolLM2-135M.Q4_1.gguf"), is_gguf("models/SmolLM2-135M")
    (True, False)
    """
    return Path(source).suffix.lower() == SUFFIX or has_gguf_magic(Path(source))


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens a file and reads its metadata.

    Raises FileNotFoundError if it is missing or a directory; ValueError if it is damaged, cut off,
    no GGUF file, one of several parts, or has a quantisation that is unknown; ImportError without
    the package gguf.
    """
    path, gguf = Path(path), require("gguf", EXTRA)
    if not path.is_file():
        what = "there is no such file"
        if path.is_dir():
            files = ", ".join(str(file) for file in sorted(path.glob(f"*{SUFFIX}"))) or "none"
            what = f"it is a directory; name a file (those in it that end in {SUFFIX}: {files})"
        raise FileNotFoundError(f"{path} is no GGUF file: {what}")
    head = read_head(path)
    if not head.startswith(GGUF_MAGIC):
        found = detect_content(head)
        what = f"it is {found.kind}; {found.advice}" if found else "it does not begin with 'GGUF'"
        raise ValueError(f"{path} is no GGUF file: {what}")
    try:
        reader = _reader_class(gguf)(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except _CutOffError as error:
        raise ValueError(f"{path} is cut off: {error}; fetch it again") from error
    except _QuantisationError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # the library raises many kinds, without the file's name
        raise ValueError(f"{path} cannot be read: {str(error) or repr(error)}") from error
    if reader.byte_order != "I":
        raise ValueError(f"{path} has the byte order of another machine: convert it first")
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"{path}: general.type={metadata['general.type']!r}: expected 'model'")
    if metadata.get("split.count", 0) > 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts; join them first, with "
            "`llama-gguf-split --merge` of llama.cpp"
        )
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


class _CutOffError(ValueError):
    """The file ends before what it announces."""


class _QuantisationError(ValueError):
    """A tensor is of a type that is not known, or cannot be dequantised."""


def _reader_class(gguf: Any) -> Any:
    """The library's reader, which takes what lies beyond the end of a file for empty and does not
    name the tensor of an unknown type."""
    accepted = {kind.value: kind.name for kind in _dequantisable(gguf)}

    class Reader(gguf.GGUFReader):
        def _check_end(self, end):
            if end > len(self.data):
                raise _CutOffError(f"it has {len(self.data):,} bytes and announces {end:,} or more")

        def _get(self, offset, dtype, count=1, override_order=None):
            self._check_end(int(offset) + int(count) * np.dtype(dtype).itemsize)
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == gguf.GGUFValueType.ARRAY:  # each value is read before the end shows
                count = int(self._get(orig_offs + 4, np.uint64)[0])
                kind = self.gguf_scalar_to_np.get(
                    int(self._get(orig_offs, np.uint32)[0]), np.uint64
                )
                self._check_end(orig_offs + 12 + count * np.dtype(kind).itemsize)
            return super()._get_field_parts(orig_offs, raw_type)

        def _get_tensor_info_field(self, orig_offs):
            field = super()._get_tensor_info_field(orig_offs)
            kind = int(field.parts[4][0])
            if kind not in accepted:
                names = {known.value: known.name for known in gguf.GGMLQuantizationType}
                raise _QuantisationError(
                    f"{field.name} has the quantisation {names.get(kind, kind)}; accepted: "
                    f"{', '.join(accepted.values())}"
                )
            return field

    return Reader


def _dequantisable(gguf: Any) -> list[Any]:
    """The types that the library dequantises."""
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        with contextlib.suppress(NotImplementedError):
            block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
            gguf.quants.dequantize(block, kind)
            kinds.append(kind)
    return kinds


# ---------------------------------------------------------------------------- configuration


def import_gguf_config(file: GGUFFile) -> ImportedConfig:
    """The configuration and position embedding that a file's metadata describe; reads no weights.

    Raises ValueError with the keys and values that are not supported.
    """
    try:
        return from_config(config_values(file))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def config_values(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the same model; ValueError for an architecture or key that has no form."""
    name = file.metadata.get(ARCHITECTURE)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{ARCHITECTURE}={name!r}: expected one of {', '.join(map(repr, ARCHITECTURES))}"
        )
    prefix = f"{name}."
    stated = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    problems = [f"{prefix}{key} is missing" for key in _REQUIRED if key not in stated]
    for key, value in stated.items():
        accepted = _ACCEPTED.get(key)
        if accepted is not None and value not in accepted:
            expected = " or ".join(map(repr, accepted))
            problems.append(
                f"{prefix}{key}={value!r:.80}: the model here can be built with {expected} only"
            )
        elif accepted is None and key not in _KEYS:
            problems.append(
                f"{prefix}{key}={value!r:.80}: not a key that is read here; it may change numbers"
            )
    if problems:
        raise ValueError("\n  ".join(problems))
    values = {config: stated[key] for key, config in _SIZES.items() if key in stated}
    values.setdefault("head_dim", stated.get("rope.dimension_count"))
    head_dim = values["head_dim"]
    for key in ("rope.dimension_count", "attention.value_length"):
        if stated.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{prefix}{key}={stated[key]}: expected the size of a head, {head_dim}"
            )
    tokens = file.metadata.get(f"{TOKENIZER}tokens", [])
    values.setdefault("vocab_size", len(tokens))
    ids = {
        config: file.metadata.get(TOKENIZER + key)
        for key, config in _TOKEN_IDS.items()
        if TOKENIZER + key in file.metadata
    }
    return {
        "model_type": ARCHITECTURES[name].model_type,
        **values,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, stated, prefix, head_dim),
        **ids,
    }


def _shortest(value: Any) -> Any:
    """A float as the shortest decimal with the same float32, which all floats of a file are.

    >>> _shortest(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_parameters(
    file: GGUFFile, stated: Mapping[str, Any], prefix: str, head_dim: int | None
) -> dict[str, Any]:
    """``rope_parameters`` of Hugging Face; llama.cpp scales linearly where no type is stated."""
    scaling = {
        key.removeprefix(_SCALING): value
        for key, value in stated.items()
        if key.startswith(_SCALING)
    }
    kind = scaling.get("type", "linear")
    factor = scaling.get("factor", stated.get("rope.scale_linear", 1.0)) or 1.0
    base = {THETA: stated.get("rope.freq_base", 10_000.0)}
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{prefix}{_SCALING}type={kind!r}: expected 'none', 'linear' or 'yarn'; Llama 3's "
            f"frequencies are read from {ROPE_FREQS}"
        )
    is_scaled = kind != "none" and factor != 1
    if ROPE_FREQS in file.tensors:
        if is_scaled:
            raise ValueError(
                f"{ROPE_FREQS} and {prefix}{_SCALING}factor={factor:g}: one of them is expected"
            )
        factors = _dequantised(file, ROPE_FREQS).reshape(-1)
        return base | _llama3_parameters(factors, base[THETA], scaling, head_dim)
    if not is_scaled:
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    original = scaling.get("original_context_length", stated["context_length"])
    betas = {
        key: scaling[f"yarn_{key}"]
        for key in ("beta_fast", "beta_slow")
        if f"yarn_{key}" in scaling
    }
    return base | {"rope_type": "yarn", "factor": factor, ORIGINAL: original} | betas


def _llama3_parameters(
    factors: np.ndarray, theta: float, scaling: Mapping[str, Any], head_dim: int | None
) -> dict[str, Any]:
    """The Llama 3 scaling with the divisors ``factors [H/2]`` of the frequencies, or ValueError.

    A file holds the divisors alone. The released models differ in the largest and share the rest.
    """
    if (factors == 1).all():
        return {"rope_type": "default"}
    parameters = {
        "rope_type": "llama3",
        "factor": _shortest(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        ORIGINAL: scaling.get("original_context_length", _LLAMA3_LENGTH),
    }
    head_dim = head_dim or 2 * factors.size
    method = from_rope_parameters(parameters | {THETA: theta}, head_dim=head_dim)
    expected = RoPE(theta=theta).frequencies(head_dim) / method.frequencies(head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5, atol=0):
        raise ValueError(
            f"{ROPE_FREQS} divides the frequencies by {factors.min():g} to {factors.max():g}: not "
            f"as Llama 3's scaling does with {parameters}"
        )
    return parameters


# ---------------------------------------------------------------------------- weights


def import_gguf_weights(file: GGUFFile) -> ImportedModel:
    """The model of a file, dequantised to float32 on the host, as from ``import_weights``.

    Raises ValueError as ``import_gguf_config`` does, and for tensors that are missing, unexpected,
    of another shape or not finite.
    """
    config, position, extra_keys, _, _ = import_gguf_config(file)
    params = empty_params(config, position)
    views = tensor_views(config, params)
    names = _tensor_names(file, views, config.num_layers)
    stored = {name: _shape(tensor) for name, tensor in file.tensors.items() if name != ROPE_FREQS}
    expected = {names[name]: view.shape for name, view in views.items()}
    check_tensors(str(file.path), "its metadata", stored, expected)
    architecture = ARCHITECTURES[file.metadata[ARCHITECTURE]]
    heads = {"q_proj": config.shape.num_heads, "k_proj": config.shape.num_kv_heads}
    non_finite: dict[str, int] = {}
    for name, view in views.items():
        array = _dequantised(file, names[name])
        non_finite |= count_non_finite({names[name]: array})
        count = heads.get(name.split(".")[-2])
        view[...] = unpermute(array, count) if count and architecture.permuted else array
    check_finite(str(file.path), non_finite)
    return ImportedModel(config, position, params, {}, extra_keys)


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows ``[N H, ...]`` with pairs side by side, (2 i, 2 i + 1), to pairs (i, i + H/2).

    >>> unpermute(np.arange(8), num_heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantised(file: GGUFFile, name: str) -> np.ndarray:
    """One tensor as float32, in the shape of Hugging Face, ``[outputs, inputs]``."""
    tensor = file.tensors[name]
    array = require("gguf", EXTRA).quants.dequantize(tensor.data, tensor.tensor_type)
    return array.reshape(_shape(tensor))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape.tolist()))


def _tensor_names(file: GGUFFile, views: Mapping[str, Any], num_layers: int) -> dict[str, str]:
    """Names of Hugging Face to those in the file, by the library's table of the architecture."""
    gguf: Any = require("gguf", EXTRA)
    name = file.metadata[ARCHITECTURE]
    architecture = next(x for x, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    table = gguf.get_tensor_name_map(architecture, num_layers)
    return {view: table.get_name(view, try_suffixes=(".weight", ".bias")) for view in views}
