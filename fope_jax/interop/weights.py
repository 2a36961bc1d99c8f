"""Weights of Hugging Face checkpoints, safetensors with config.json, to a Transformer and back.

A checkpoint has ``model.safetensors``, or several ``*.safetensors`` with an index; the first wins,
as in transformers. Neither PyTorch nor transformers is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from fope_jax.extras import require
from fope_jax.interop.huggingface import ImportedConfig, from_config, to_config
from fope_jax.interop.serving import (
    COEFFICIENTS,
    PREFIX,
    fope_coefficients_from_serving,
    fope_coefficients_to_serving,
)
from fope_jax.interop.tensor_checks import check_finite, check_tensors, empty_params
from fope_jax.model.config import TransformerConfig
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.transformer import position_variables
from fope_jax.position import FoPE, PositionEmbedding, fingerprint
from fope_jax.storage.content import detect_content, has_gguf_magic, read_head
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import local_path, path_within

log = logging.getLogger(__name__)

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9
_STORED_DTYPES = ("F32", "BF16", "F16")  # safetensors' names
# A buffer in old checkpoints; the frequencies follow from config.json.
_IGNORED = "rotary_emb.inv_freq"
_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
# Other weight formats, in the order of the message.
_OTHER_FORMATS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")
# With one of these, transformers would apply an adapter to the weights.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

# Checkpoint name to (parameter, number of its input axes).
_MATRICES = {
    "self_attn.q_proj": ("query", 1),
    "self_attn.k_proj": ("key", 1),
    "self_attn.v_proj": ("value", 1),
    "self_attn.o_proj": ("out", 2),
    "mlp.gate_proj": ("gate", 1),
    "mlp.up_proj": ("up", 1),
    "mlp.down_proj": ("down", 1),
}
_LAYER_NORMS = {
    "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "post": {
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "mlp_norm",
    },
}
_QKV_BIASES = {
    "self_attn.q_proj": "query_bias",
    "self_attn.k_proj": "key_bias",
    "self_attn.v_proj": "value_bias",
}
_QK_NORMS = {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}


class ImportedModel(NamedTuple):
    """A model from a Hugging Face checkpoint; trees of NumPy arrays as from ``split``."""

    config: TransformerConfig  # float32
    position: PositionEmbedding
    params: dict[str, Any]
    constants: dict[str, Any]  # empty unless the position embedding is FoPE
    extra_keys: dict[str, Any]  # keys of config.json that change no number, for ``export_weights``


def tensor_views(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by name, as views of ``params`` in the checkpoint's layout.

    A checkpoint's matrix is ``[outputs, inputs]``, a parameter ``[L, inputs..., outputs...]``.
    """
    norms = _LAYER_NORMS[config.norm] | (_QK_NORMS if config.qk_norm != "none" else {})
    names = _MATRICES | {name: (field, 0) for name, field in norms.items()}
    views = {_EMBEDDING: params["embedding"]}
    for layer in range(config.num_layers):
        for name, (field, num_inputs) in names.items():
            array = params["layers"][field][layer]
            if num_inputs:
                array = array.reshape(math.prod(array.shape[:num_inputs]), -1).T
            views[f"model.layers.{layer}.{name}.weight"] = array
        for name, field in _QKV_BIASES.items() if config.qkv_bias else ():
            views[f"model.layers.{layer}.{name}.bias"] = params["layers"][field][layer].reshape(-1)
    views["model.norm.weight"] = params["final_norm"]
    if not config.tie_embeddings:
        views[_UNEMBEDDING] = params["unembedding"].T
    return views


# ---------------------------------------------------------------------------- import


def import_weights(directory: str | Path) -> ImportedModel:
    """Reads a checkpoint of one of ``families.FAMILIES``: Llama, Mistral, Qwen, OLMo, SmolLM.

    The arrays stay on the host; ``merge`` with a ``Transformer``'s graph definition makes the
    model. 16-bit tensors become float32, exactly. For an ``export_weights`` directory the
    fingerprint of the position embedding is checked.

    Raises FileNotFoundError if config.json or the weights are missing; ValueError for an
    unsupported key or value, tensors that are missing, unexpected, of another shape or not finite,
    a damaged file, an adapter, or another fingerprint; ImportError without safetensors.
    """
    directory = local_path(directory)
    config, position, extra_keys, exported_fingerprint, _ = import_config(directory)
    params = empty_params(config, position)
    views = tensor_views(config, params)
    has_series = isinstance(position, FoPE) and position.series
    coefficients = [PREFIX + name for name in COEFFICIENTS if has_series]
    stored = _open_tensors(directory)
    if config.tie_embeddings and _EMBEDDING not in stored and _UNEMBEDDING in stored:
        stored[_EMBEDDING] = stored.pop(_UNEMBEDDING)  # still read under its name in the file
    has_tied_copy = config.tie_embeddings and _UNEMBEDDING in stored
    expected = {name: view.shape for name, view in views.items()}
    if has_tied_copy:
        expected[_UNEMBEDDING] = expected[_EMBEDDING]
    shapes = {k: x.shape for k, x in stored.items() if k in expected or not k.endswith(_IGNORED)}
    of_other_dtypes = [
        f"{name} {tensor.dtype}, expected one of {', '.join(_STORED_DTYPES)}"
        for name, tensor in stored.items()
        if (name in expected or name in coefficients) and tensor.dtype not in _STORED_DTYPES
    ]
    problems = {"of another dtype": of_other_dtypes}
    check_tensors(str(directory), CONFIG, shapes, expected, coefficients, problems)

    non_finite: dict[str, int] = {}

    def read(name: str) -> np.ndarray:
        tensor = stored[name].file.get_tensor(stored[name].name)
        non_finite.update(count_non_finite({stored[name].name: tensor}))
        return tensor

    for name, view in views.items():
        view[...] = read(name)
    tied_copy = read(_UNEMBEDDING) if has_tied_copy else params["embedding"]
    tensors = {name: read(name) for name in coefficients if name in stored}
    check_finite(str(directory), non_finite)
    if (tied_copy != params["embedding"]).any():
        raise ValueError(
            f"{directory}: tie_word_embeddings=True, but {_UNEMBEDDING} differs from "
            f"{_EMBEDDING}; set it to false in config.json to import both"
        )
    constants: dict[str, Any] = {}
    if isinstance(position, FoPE) and has_series:
        variables = fope_coefficients_from_serving(position, tensors, config.shape)
        for tree, drawn in (
            (params, variables.layer_params),
            (constants, variables.layer_constants),
        ):
            if drawn:
                tree["position_layers"] = jax.tree.map(np.asarray, drawn)
    computed = fingerprint(position, config.shape, position_variables({}, constants)).hash
    if exported_fingerprint not in (None, computed):
        raise ValueError(
            f"{directory}: the position embedding was exported with fingerprint "
            f"{exported_fingerprint}, but its coefficients and config.json give {computed}"
        )
    return ImportedModel(config, position, params, constants, extra_keys)


def import_config(directory: str | Path) -> ImportedConfig:
    """Reads a checkpoint's config.json, and no tensor; raises like ``import_weights``."""
    directory = local_path(directory)
    path = directory / CONFIG
    if not path.is_file():
        what = "there is no such directory; hf:ORG/NAME takes one from the Hugging Face Hub"
        if directory.exists():
            what = f"no {CONFIG} in it" if directory.is_dir() else "it is a file, no directory"
        if directory.suffix == ".gguf" or has_gguf_magic(directory):
            what += f"; `fope import {directory} --workdir RUN` makes a run of a GGUF file"
        raise FileNotFoundError(f"{directory} is no checkpoint of Hugging Face: {what}")
    values = read_json(path)
    try:
        return from_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _StoredTensor(NamedTuple):
    """A tensor in an open file, with its name there."""

    name: str
    path: Path
    file: Any
    shape: tuple[int, ...]
    dtype: str


def _open_tensors(directory: Path) -> dict[str, _StoredTensor]:
    """The tensors of a directory by name, not read yet."""
    safetensors: Any = require("safetensors", "train")
    tensors: dict[str, _StoredTensor] = {}
    for path in _weight_files(directory):
        try:
            file = safetensors.safe_open(path, framework="np")
        except safetensors.SafetensorError as error:
            if content := detect_content(read_head(path)):  # such as a Git LFS pointer
                raise ValueError(f"{path} is {content.kind}; {content.advice}") from error
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118, it is not a mapping
            if name in tensors:
                raise ValueError(f"{name} is in {tensors[name].path} and in {path}: remove one")
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            tensors[name] = _StoredTensor(name, path, file, shape, dtype)
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers would read; ValueError if there is an adapter."""
    adapter = [name for name in _ADAPTER if (directory / name).is_file()]
    if adapter:
        raise ValueError(
            f"{directory} has {', '.join(adapter)}: an adapter, which changes the model; merge it "
            "into the weights (merge_and_unload of PEFT), or move it elsewhere to do without it"
        )
    index, weights = directory / INDEX, directory / WEIGHTS
    files = sorted(path for path in directory.glob("*.safetensors") if not path.is_dir())
    if weights.is_file():
        chosen = [weights]
    elif index.is_file():
        chosen = _indexed_files(index)
    else:
        other = [path.name for form in _OTHER_FORMATS for path in sorted(directory.glob(form))]
        # Transformers prefers pytorch_model.bin to safetensors files of other names.
        if not files or any(name.startswith("pytorch_model") for name in other):
            hint = f"; {', '.join(other)}: save it as safetensors first" if other else ""
            raise FileNotFoundError(
                f"{directory} has no {WEIGHTS if files else '*.safetensors'}{hint}"
            )
        chosen = files
    ignored = [path.name for path in files if path not in chosen and path.name.startswith("model")]
    if weights.is_file() and index.is_file():
        ignored.insert(0, INDEX)
    if ignored:
        log.warning(
            "%s: read from %s, as transformers does; %s ignored",
            directory,
            ", ".join(path.name for path in chosen),
            ", ".join(ignored),
        )
    return chosen


def _indexed_files(index: Path) -> list[Path]:
    """The files that the index names; ValueError for one outside its directory."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index}: weight_map = {weight_map!r:.80}; accepted: tensor to file name")
    try:
        paths = [path_within(index.parent, name) for name in sorted(set(names))]
    except ValueError as error:
        raise ValueError(f"{index}: weight_map: {error}") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}: there is no such file")
    return paths


# ---------------------------------------------------------------------------- export


def export_weights(
    directory: str | Path,
    config: TransformerConfig,
    position: PositionEmbedding,
    params: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    length: int,
    training_length: int | None = None,
    extra_keys: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint for transformers 5, and for serving engines with FoPE.

    Transformers has no FoPE and would run such a checkpoint as RoPE. vLLM, SGLang and LMDeploy read
    its coefficients. config.json is written last. Its key ``fope_jax`` holds the position embedding
    and the fingerprint that ``import_weights`` compares.

    Args:
      directory: new or empty; FileExistsError otherwise.
      config, position: of the model.
      params, constants: from ``split``.
      length: ``max_position_embeddings``, tokens.
      training_length: of the run in tokens, if it is another.
      extra_keys: from ``import_weights``, if the model was imported.
      dtype: of the tensors, "float32", "bfloat16" or "float16"; None takes that of ``extra_keys``
        or the parameters. FoPE's coefficients are always float32.
      shard_bytes: the largest size of a file, unless one tensor is larger.

    Raises ValueError for an unsupported field, a dtype that is unknown or too narrow for a number,
    and tensors that are not finite, before writing anything; ImportError without safetensors.
    """
    directory, extra_keys = local_path(directory), dict(extra_keys or {})
    spellings = [key for key in ("dtype", "torch_dtype") if extra_keys.get(key)] or ["dtype"]
    dtype = dtype or extra_keys.get(spellings[0]) or config.param_dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    extra_keys |= dict.fromkeys(spellings, dtype)
    identity = fingerprint(position, config.shape, position_variables({}, dict(constants))).hash
    values = to_config(
        config,
        position,
        identity,
        length=length,
        extra_keys=extra_keys,
        training_length=training_length,
    )
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: export into a new directory")
    tensors = tensor_views(config, jax.tree.map(np.asarray, dict(params)))
    dtypes = dict.fromkeys(tensors, DTYPES[dtype])
    if isinstance(position, FoPE) and position.series:
        variables = position_variables(dict(params), dict(constants))
        tensors |= fope_coefficients_to_serving(position, variables, config.shape)

    def cast(name: str) -> np.ndarray:  # called late: all casts together may not fit in memory
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(tensors[name], dtypes.get(name))

    non_finite, too_large = {}, {}
    for name, tensor in tensors.items():
        non_finite |= count_non_finite({name: tensor})
        too_large |= count_non_finite({name: cast(name)})
    if non_finite:
        raise ValueError(f"NaN or infinite, not exported: {describe_non_finite(non_finite)}")
    if too_large:
        raise ValueError(
            f"dtype={dtype!r}: {next(iter(too_large))} has numbers beyond its range; in all: "
            f"{describe_non_finite(too_large)}"
        )
    sizes = {
        name: x.size * np.dtype(dtypes.get(name, x.dtype)).itemsize for name, x in tensors.items()
    }
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    directory.mkdir(parents=True, exist_ok=True)
    save_file = require("safetensors.numpy", "train").save_file
    weight_map = {}
    for file, names in zip(files, shards, strict=True):
        save_file({name: cast(name) for name in names}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})
    write_json(directory / CONFIG, values)
