"""Weights of Hugging Face checkpoints: safetensors and config.json to our model and back.

A directory there holds ``config.json`` and ``model.safetensors``, or several ``*.safetensors`` with
``model.safetensors.index.json``; where both are there the first counts, as in transformers. Nothing
is downloaded, and neither PyTorch nor transformers is needed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from fope_jax.extras import require
from fope_jax.interop.huggingface import ImportedConfig, from_config, to_config
from fope_jax.interop.serving import (
    PREFIX,
    fope_coefficients_from_serving,
    fope_coefficients_to_serving,
)
from fope_jax.model.config import TransformerConfig
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import (
    Fingerprint,
    FoPE,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    fingerprint,
)
from fope_jax.storage.content import detect_content, read_head
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import path_within

log = logging.getLogger(__name__)

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9
_STORED = ("F32", "BF16", "F16")  # how safetensors call them
_SHOWN = 6  # tensors named in an error; the count says how many there are
# Buffers that old checkpoints hold; config.json decides the frequencies.
_IGNORED = "rotary_emb.inv_freq"
_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
# Weights in other formats, in the order in which a message names them.
_OTHER_FORMATS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")
# With these beside the weights transformers computes with an adapter on them.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_COEFFICIENTS = tuple(PREFIX + name for name in ("cos_coef", "sin_coef"))


class ImportedModel(NamedTuple):
    """A model of Hugging Face as one of ours.

    Attributes:
      config: float32, with the defaults of this package for how it is computed.
      position: its position embedding.
      params: NumPy arrays in the tree that ``model.transformer.split`` gives.
      constants: the position constants, likewise; empty unless it is FoPE.
      kept: keys of its config.json that change no number, for ``export_weights``.
    """

    config: TransformerConfig
    position: PositionEmbedding
    params: dict[str, Any]
    constants: dict[str, Any]
    kept: dict[str, Any]


class TensorMap(NamedTuple):
    """Where a tensor of Hugging Face is in our parameters.

    Attributes:
      name: there.
      path: of our array, outermost key first.
      layer: index on its first axis; None where it has no axis of the layers.
      inputs: axes of ours that are summed over, the first ones; there they are the second axis of a
        matrix ``[outputs, inputs]``. 0 where both sides have the same array.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    inputs: int

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of our array of one layer."""
        if not self.inputs:
            return ours
        rows, columns = ours[: self.inputs], ours[self.inputs :]
        return int(np.prod(columns)), int(np.prod(rows))

    def to_ours(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor ``x`` in our layout."""
        return (x.T if self.inputs else x).reshape(shape)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Our array of one layer in the layout there, contiguous as safetensors need it."""
        shape = self.shape(x.shape)
        return np.ascontiguousarray(x.reshape(shape[::-1]).T if self.inputs else x)


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
_QK_NORMS = {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}


def tensor_maps(config: TransformerConfig) -> Iterator[TensorMap]:
    """Every tensor of a model, in the order in which it runs."""
    norms = _LAYER_NORMS[config.norm] | (_QK_NORMS if config.qk_norm != "none" else {})
    yield TensorMap(_EMBEDDING, ("embedding",), None, 0)
    for layer in range(config.num_layers):
        of_layer = _MATRICES | {theirs: (ours, 0) for theirs, ours in norms.items()}
        for theirs, (ours, inputs) in of_layer.items():
            yield TensorMap(
                f"model.layers.{layer}.{theirs}.weight", ("layers", ours), layer, inputs
            )
    yield TensorMap("model.norm.weight", ("final_norm",), None, 0)
    if not config.tie_embeddings:
        yield TensorMap(_UNEMBEDDING, ("unembedding",), None, 1)


# ---------------------------------------------------------------------------- import


def import_weights(directory: str | Path) -> ImportedModel:
    """Reads a checkpoint of Llama, Qwen 3, OLMo 2, SmolLM or SmolLM 3.

    The arrays stay on the host; ``merge`` with the graph definition of a ``Transformer`` of this
    configuration gives the model. Tensors of 16 bits become float32, exactly. Of a directory that
    ``export_weights`` wrote, the position embedding comes back with the fingerprint it had.

    Args:
      directory: with config.json and ``*.safetensors``.

    Returns:
      Configuration, position embedding, parameters, constants and what config.json says besides.

    Raises:
      FileNotFoundError: config.json or the weights are not there.
      ValueError: config.json says what cannot be represented, naming key and value; tensors are
        missing, unexpected, of another shape or hold NaN or an infinity, naming them; a file is
        damaged; an adapter lies beside the weights; or the position embedding is not the one that
        was exported.
      ImportError: safetensors is not installed.
    """
    directory = Path(directory)
    described = import_config(directory)
    config, position = described.config, described.position
    shapes = nnx.eval_shape(lambda: Transformer(config, position, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), split(shapes)[1])
    files = _Files(directory)
    fope = position if isinstance(position, FoPE) and position.series else None
    if config.tie_embeddings:
        files.stand_in(_UNEMBEDDING, _EMBEDDING)
    _check_tensors(directory, files, config, params, _COEFFICIENTS if fope else ())
    for place in tensor_maps(config):
        array = _at(params, place)
        array[...] = place.to_ours(files.read(place.name), array.shape)
    unembedding = files.read(_UNEMBEDDING) if _UNEMBEDDING in files.shapes else None
    tensors = {name: files.read(name) for name in _COEFFICIENTS if name in files.shapes and fope}
    if files.non_finite:
        raise ValueError(
            f"{directory}: NaN or infinite: {describe_non_finite(files.non_finite)}; a model with "
            "such values computes nothing that means anything"
        )
    if config.tie_embeddings and unembedding is not None:
        _check_tied(directory, unembedding, params["embedding"])
    variables = PositionVariables()
    if fope:
        variables = _fope_variables(fope, tensors, config.shape)
        params |= _layers(variables.layer_params)
    constants = _layers(variables.layer_constants)
    if described.fingerprint is not None:
        found = position_fingerprint(config, position, constants).hash
        if found != described.fingerprint:
            raise ValueError(
                f"{directory}: the position embedding was exported with fingerprint "
                f"{described.fingerprint}, but its coefficients and config.json give {found}"
            )
    return ImportedModel(config, position, params, constants, described.kept)


def position_fingerprint(
    config: TransformerConfig, position: PositionEmbedding, constants: Mapping[str, Any]
) -> Fingerprint:
    """The fingerprint of a model's position embedding, as checkpoints have it."""
    variables = PositionVariables(
        model_constants=constants.get("position_model", {}),
        layer_constants=constants.get("position_layers", {}),
    )
    return fingerprint(position, config.shape, variables)


def import_config(directory: str | Path) -> ImportedConfig:
    """What config.json says of a checkpoint; no tensor is read.

    Raises:
      FileNotFoundError, ValueError: see ``import_weights``.
    """
    directory = Path(directory)
    path = directory / CONFIG
    if not path.is_file():
        what = "there is no such directory, and nothing is downloaded: `hf download REPOSITORY"
        what += " --local-dir DIR` makes it"
        if directory.exists():
            what = f"no {CONFIG} in it" if directory.is_dir() else "it is a file, no directory"
        raise FileNotFoundError(f"{directory} is no checkpoint of Hugging Face: {what}")
    values = read_json(path)
    try:
        return from_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _at(tree: dict[str, Any], place: TensorMap) -> Any:
    """The array of one place, of its layer where it has one."""
    array: Any = tree
    for key in place.path:
        array = array[key]
    return array if place.layer is None else array[place.layer]


def _layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """``{"position_layers": ...}`` on the host, or nothing where there is no variable."""
    arrays = {name: np.asarray(value) for name, value in variables.items()}
    return {"position_layers": arrays} if arrays else {}


def _fope_variables(
    method: FoPE, tensors: Mapping[str, Any], shape: ModelShape
) -> PositionVariables:
    """FoPE's variables; a method with one matrix for both gets it where both are equal."""
    apart = dataclasses.replace(method, separate_sine=True)
    variables = fope_coefficients_from_serving(apart, tensors, shape)
    if method.separate_sine:
        return variables
    first, second = (tensors[name] for name in _COEFFICIENTS)
    if (first != second).any():
        raise ValueError(f"separate_sine=False: {_COEFFICIENTS[0]} and {_COEFFICIENTS[1]} differ")
    for owned in (variables.layer_params, variables.layer_constants):
        owned.pop("sin_coef", None)
    return variables


def _check_tied(directory: Path, unembedding: np.ndarray, embedding: np.ndarray) -> None:
    if (unembedding != embedding).any():
        raise ValueError(
            f"{directory}: tie_word_embeddings=True, but lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false in config.json to import both"
        )


class _Files:
    """The tensors of a directory: their shapes, and each read when it is asked for.

    What is read is counted in ``non_finite``, where it holds NaN or an infinity.
    """

    def __init__(self, directory: Path):
        self._safetensors: Any = require("safetensors", "train")
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        self._same: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.non_finite: dict[str, int] = {}
        for path in _weight_files(directory):
            stored = self._of(path)
            for name in stored.keys():  # noqa: SIM118, no mapping
                if name in self._files:
                    raise ValueError(f"{name} is in {self._files[name]} and in {path}: remove one")
                view = stored.get_slice(name)
                self._files[name] = path
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = view.get_dtype()

    def _of(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = self._safetensors.safe_open(path, framework="np")
            except self._safetensors.SafetensorError as error:
                if found := detect_content(read_head(path)):  # of a clone without Git LFS
                    raise ValueError(f"{path} is {found.kind}; {found.advice}") from error
                raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        return self._open[path]

    def stand_in(self, name: str, absent: str) -> None:
        """Lets the tensor ``name`` be the one that is ``absent``, where just that one is."""
        if name in self.shapes and absent not in self.shapes:
            self._same[absent] = name
            self.shapes[absent] = self.shapes.pop(name)
            self.dtypes[absent] = self.dtypes.pop(name)
            self._files[absent] = self._files.pop(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in."""
        stored = self._same.get(name, name)
        tensor = self._of(self._files[name]).get_tensor(stored)
        self.non_finite |= count_non_finite({stored: tensor})
        return tensor


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads, and what it cannot name where it would read none.

    Raises:
      ValueError: an adapter lies beside them.
      FileNotFoundError: there are none.
    """
    adapter = [name for name in _ADAPTER if (directory / name).is_file()]
    if adapter:
        raise ValueError(
            f"{directory} has {', '.join(adapter)}: an adapter, which changes the model; merge it "
            "into the weights (merge_and_unload of PEFT), or move it elsewhere to do without it"
        )
    index, weights = directory / INDEX, directory / WEIGHTS
    found = sorted(path for path in directory.glob("*.safetensors") if not path.is_dir())
    if weights.is_file():
        chosen = [weights]
    elif index.is_file():
        chosen = _indexed_files(directory, read_json(index).get("weight_map"))
    else:
        other = [path.name for form in _OTHER_FORMATS for path in sorted(directory.glob(form))]
        beside = any(name.startswith("pytorch_model") for name in other)
        if not found or beside:  # transformers reads the latter, and not other names
            hint = f"; {', '.join(other)}: save it as safetensors first" if other else ""
            raise FileNotFoundError(
                f"{directory} has no {WEIGHTS if found else '*.safetensors'}{hint}"
            )
        chosen = found
    shards = [path.name for path in found if path not in chosen and path.name.startswith("model")]
    if shards or (weights.is_file() and index.is_file()):
        log.warning(
            "%s: read from %s, as transformers does; %s left aside",
            directory,
            ", ".join(path.name for path in chosen),
            ", ".join([INDEX] * (weights.is_file() and index.is_file()) + shards),
        )
    return chosen


def _indexed_files(directory: Path, weight_map: Any) -> list[Path]:
    """The files that the index names; all of them are in the directory."""
    index = directory / INDEX
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{index}: weight_map = {weight_map!r:.80}; accepted: tensor to file name")
    try:
        paths = [path_within(directory, name) for name in sorted(set(files))]
    except ValueError as error:
        raise ValueError(f"{index}: weight_map: {error}") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}: there is no such file")
    return paths


def _check_tensors(
    directory: Path,
    files: _Files,
    config: TransformerConfig,
    params: dict[str, Any],
    others: tuple[str, ...],
) -> None:
    """Raises ValueError where the tensors are not those of the model, naming them with shapes."""
    wanted = {place.name: place.shape(_at(params, place).shape) for place in tensor_maps(config)}
    known = wanted.keys() | set(others)
    if config.tie_embeddings and _UNEMBEDDING in files.shapes:
        wanted |= {_UNEMBEDDING: wanted[_EMBEDDING]}
        known.add(_UNEMBEDDING)
    missing = [
        f"{name} {list(shape)}" for name, shape in wanted.items() if name not in files.shapes
    ]
    unexpected = [
        f"{name} {list(shape)}"
        for name, shape in files.shapes.items()
        if name not in known and not name.endswith(_IGNORED)
    ]
    others_shape = [
        f"{name} {list(files.shapes[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if files.shapes.get(name, shape) != shape
    ]
    others_dtype = [
        f"{name} {dtype}, expected one of {', '.join(_STORED)}"
        for name, dtype in files.dtypes.items()
        if name in known and dtype not in _STORED
    ]
    findings = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": others_shape,
        "of another dtype": others_dtype,
    }
    lines = [
        f"  {len(names)} {what}: " + "; ".join(names[:_SHOWN] + ["..."] * (len(names) > _SHOWN))
        for what, names in findings.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{directory}: tensors are not those of the model that {CONFIG} describes\n"
            + "\n".join(lines)
        )


# ---------------------------------------------------------------------------- export


def export_weights(
    directory: str | Path,
    config: TransformerConfig,
    position: PositionEmbedding,
    params: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    length: int,
    kept: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint that transformers 5 loads, and that serving engines load with FoPE.

    Transformers itself has no FoPE and would run such a directory as RoPE; vLLM, SGLang and
    LMDeploy read its coefficients. config.json is written last, with the position embedding and its
    fingerprint under the key ``fope_jax``, which ``import_weights`` compares.

    Args:
      directory: made, or empty.
      config: the model.
      position: its position embedding.
      params: what ``split`` gives.
      constants: what ``split`` gives.
      length: tokens that the model is for.
      kept: of ``import_weights``, where the model came from there.
      dtype: of the tensors, "float32", "bfloat16" or "float16"; None takes what ``kept`` says, or
        the dtype of the parameters. FoPE's coefficients are float32 always.
      shard_bytes: a file is at most so large, unless a single tensor is larger.

    Raises:
      ValueError: naming the field that Hugging Face cannot say; a dtype that is not known or too
        narrow for a number; tensors that hold NaN or an infinity. Nothing is written then.
      FileExistsError: the directory holds something already.
      ImportError: safetensors is not installed.
    """
    directory, kept = Path(directory), dict(kept or {})
    spellings = [key for key in ("dtype", "torch_dtype") if kept.get(key)] or ["dtype"]
    dtype = dtype or kept.get(spellings[0]) or config.param_dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    kept |= dict.fromkeys(spellings, dtype)
    identity = position_fingerprint(config, position, constants).hash
    values = to_config(config, position, identity, length=length, kept=kept)
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: export into a new directory")
    _check_finite(_tensors(config, position, params, constants, None), None)
    if dtype != config.param_dtype:
        _check_finite(_tensors(config, position, params, constants, dtype), dtype)
    directory.mkdir(parents=True, exist_ok=True)
    _write_shards(directory, _tensors(config, position, params, constants, dtype), shard_bytes)
    write_json(directory / CONFIG, values)


def _tensors(
    config: TransformerConfig,
    position: PositionEmbedding,
    params: Mapping[str, Any],
    constants: Mapping[str, Any],
    dtype: str | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, made when it is asked for; None leaves the dtype."""
    arrays = jax.tree.map(np.asarray, dict(params))
    for place in tensor_maps(config):
        array = _at(arrays, place)
        with np.errstate(over="ignore"):
            cast = array if dtype is None else array.astype(DTYPES[dtype])
        yield place.name, place.to_theirs(cast)
    if isinstance(position, FoPE) and position.series:
        variables = PositionVariables(
            layer_params=dict(params.get("position_layers", {})),
            layer_constants=dict(constants.get("position_layers", {})),
        )
        yield from fope_coefficients_to_serving(position, variables, config.shape).items()


def _check_finite(tensors: Iterator[tuple[str, np.ndarray]], dtype: str | None) -> None:
    """Raises ValueError with the tensors that are not finite, or not in ``dtype``."""
    counts: dict[str, int] = {}
    for name, tensor in tensors:
        counts |= count_non_finite({name: tensor})
    if not counts:
        return
    listed = describe_non_finite(counts)
    if dtype is None:
        raise ValueError(f"NaN or infinite, not exported: {listed}")
    first = next(iter(counts))
    raise ValueError(f"dtype={dtype!r}: {first} has numbers beyond its range; in all: {listed}")


def _write_shards(
    directory: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """One file, or several and their index; what does not fit goes into the next one."""
    save_file = require("safetensors.numpy", "train").save_file
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > shard_bytes:
            write()
        shard[name] = tensor
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{index}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
