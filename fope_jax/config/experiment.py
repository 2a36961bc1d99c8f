"""A configuration file and overrides to one `Experiment`, and back. Touches no device."""

from __future__ import annotations

import ast
import dataclasses
import runpy
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fope_jax import position as positions
from fope_jax.config.evaluate import EvaluateConfig
from fope_jax.config.fields import (
    NOT_LITERAL,
    ConfigError,
    convert,
    field_types,
    nearest,
    parse_value,
)
from fope_jax.config.train import TrainConfig
from fope_jax.data import DataConfig
from fope_jax.model.sharding import MeshConfig
from fope_jax.model.transformer import TransformerConfig
from fope_jax.position.base import PositionEmbedding
from fope_jax.position.table import pieces_for_key
from fope_jax.storage.files import read_json


@dataclass(frozen=True)
class Experiment:
    """One run: everything that training and evaluation are a function of.

    ``name`` is the variant in every row and report; ``seed`` draws parameters and data order.
    """

    name: str
    seed: int
    model: TransformerConfig
    position: PositionEmbedding
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    mesh: MeshConfig = MeshConfig()


SECTIONS = {
    "model": TransformerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "mesh": MeshConfig,
}
_TOP = {"name": str, "seed": int}


# ---------------------------------------------------------------------------- from a file


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Reads a configuration file and applies overrides; fails on anything it cannot build.

    Args:
      spec: ``"path.py"`` or ``"path.py:arg"``; ``arg`` goes to the file's ``get_config``. Or the
        ``config.json`` of a run.
      overrides: ``"train.steps=100"``, with or without a leading ``--config.``. Values are parsed
        by the type of the field they go to.

    Returns:
      The ConfigDict of the file, field references intact, with the overrides in it.

    Raises:
      ConfigError: a file that is not there or has no get_config, an unknown key, a wrong type.
    """
    path, _, arg = spec.partition(":")
    if path.endswith(".json"):
        _check_file("configuration", path)
        config = _read_json(Path(path))
        try:
            return apply_overrides(config, overrides)
        except ConfigError as error:  # what is wrong may be as old as the file
            raise ConfigError(f"configuration file {path}: {error}") from error
    else:
        config = call_in_file("configuration", path, "get_config", arg)
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"get_config of {path!r} returns {type(config).__name__}; accepted: ConfigDict"
            )
    return apply_overrides(config, overrides)


def call_in_file(kind: str, path: str, function: str, arg: str) -> Any:
    """What ``function(arg)`` of a Python file of the user returns.

    Raises:
      ConfigError: there is no such file or function, or the file raises something; the message
        names the file, its line and the error.
    """
    _check_file(kind, path)
    try:
        found = runpy.run_path(path).get(function)
        if found is not None:
            return found(arg)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        lines = [
            f"line {own.lineno}: "
            for own in traceback.extract_tb(error.__traceback__)
            if own.filename == path
        ]
        where = lines[-1] if lines else ""
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{kind} file {path!r}: {where}{type(error).__name__}: {reason}"
        ) from error
    raise ConfigError(f"{kind} file {path!r} defines no {function}(arg)")


def _check_file(kind: str, path: str) -> None:
    if not Path(path).is_file():
        what = "is no file" if Path(path).exists() else "does not exist"
        raise ConfigError(f"{kind} file {path!r} {what} (form: path.py:arg)")


def _read_json(path: Path) -> ConfigDict:
    try:
        values = read_json(path)
    except ValueError as error:
        raise ConfigError(f"configuration file {error}") from error
    if "model_type" in values:
        raise ConfigError(
            f"configuration file {path} is that of a Hugging Face checkpoint; "
            "`fope import --from DIR --workdir RUN` makes a run of one"
        )
    try:
        return ConfigDict(values)
    except (ValueError, KeyError, AttributeError) as error:  # keys that ConfigDict does not take
        raise ConfigError(f"configuration file {path}: {error}") from error


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """``config`` with the overrides of `load_config` in it, checked that it can be built.

    Raises:
      ConfigError: see `load_config`.
    """
    for override in overrides:
        _override(config, override)
    build_experiment(config)
    return config


def split_override(override: str) -> tuple[str, str]:
    """Key and text of an override, ``"--config.train.steps=100"`` or without what comes first.

    >>> split_override("--config.train.steps=100")
    ('train.steps', '100')
    """
    override = override.removeprefix("--").removeprefix("config.")
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no value (form: --config.train.steps=100)")
    return key, text


def parse_knob(key: str, text: str, kind: Any) -> Any:
    """A knob's value: a literal list or mapping of specifications, or what ``kind`` makes of it."""
    return _literal_spec(key, text) if text.startswith(("[", "{")) else _value(key, text, kind)


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Reads the ``arg`` of a configuration file, ``"position=rope,smoke"``; a bare name is True.

    >>> parse_arg("position=rope,smoke", position="fope", seed=0, smoke=False).to_dict()
    {'position': 'rope', 'seed': 0, 'smoke': True}
    """
    values = dict(defaults)
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise ConfigError(
                f"config argument {key!r} is unknown{nearest(key, defaults)};"
                f" accepted: {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        values[key] = convert(f"argument {key}", parse_value(text, kind) if equals else True, kind)
    return ConfigDict(values)


def _override(config: ConfigDict, override: str) -> None:
    key, text = split_override(override)
    section, _, field = key.partition(".")
    values: Any = config.get(section) if field else config
    if field and values is not None and not hasattr(values, "get"):
        raise ConfigError(f"config.{section} = {values!r:.80}; accepted: a mapping")
    if section == "position" and field:
        method = values.get("method") if values else None
        kind = str if field == "method" else _position_types(method).get(field, Any)
    elif section in SECTIONS and field:
        kind = field_types(SECTIONS[section]).get(field)
    else:
        kind = _TOP.get(key)
    if kind is None:
        raise _unknown_key(key)
    value = (parse_knob if section == "position" else _value)(key, text, kind)
    # The type is checked against the field; ConfigDict would check it against the old value.
    with config.ignore_type():
        if values is None:
            config[section] = {field: value}
        else:
            values[field or key] = value


def _value(key: str, text: str, kind: Any) -> Any:
    return convert(key, parse_value(text, kind), kind)


def _literal_spec(key: str, text: str) -> Any:
    """The list or mapping of specifications that ``text`` writes; checked when it is built."""
    try:
        return ast.literal_eval(text)
    except NOT_LITERAL as error:
        raise ConfigError(
            f"config.{key} = {text!r} is no Python literal; write for example"
            ' \'[{"scaling": "ntk", "factor": 4.0}]\''
        ) from error


# ---------------------------------------------------------------------------- to objects and back


def build_experiment(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Builds and cross-checks the objects that ``config`` describes.

    Raises:
      ConfigError: unknown key (with the nearest one), wrong type (with both), missing value, or
        two values that do not go together.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    for key in values:
        if key not in (*_TOP, *SECTIONS, "position"):
            raise _unknown_key(key)
    for key in (*_TOP, "model", "position", "data", "train"):
        if key not in values:
            raise ConfigError(f"config.{key} is missing")
    for key in (*SECTIONS, "position"):
        if not isinstance(values.get(key, {}), Mapping):
            raise ConfigError(
                f"config.{key} = {values[key]!r:.80}; accepted: a mapping of its keys"
            )
    top = {key: convert(key, values[key], kind) for key, kind in _TOP.items()}
    parts = {name: _build(name, cls, values.get(name, {})) for name, cls in SECTIONS.items()}
    train, evaluate = parts["train"], parts["evaluate"]
    if evaluate.scored_tokens is None:
        scored = max(1, train.length // 2)
        parts["evaluate"] = dataclasses.replace(evaluate, scored_tokens=scored)
    position = _build_position(values["position"], train.length, parts["model"].init_std)
    experiment = Experiment(**top, **parts, position=position)
    _cross_check(experiment)
    return experiment


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """The inverse of `build_experiment`: plain values for config.json, nothing left implicit."""
    result = {"name": experiment.name, "seed": experiment.seed}
    for name in SECTIONS:
        result[name] = _fields(getattr(experiment, name))
    return result | {"position": positions.to_spec(experiment.position)}


def flat_values(experiment: Experiment) -> dict[str, Any]:
    """Every value of an experiment by its key, ``"train.length"``."""
    return _flat(experiment_to_dict(experiment))


# Values that change what is reported, kept or stored, never the numbers a run computes; and what
# becomes of a bad step, or a run that one has stopped could not go on.
CHANGEABLE_SECTIONS = ("evaluate.", "mesh.")
CHANGEABLE_KEYS = (
    "name",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.evaluate_every",
    "train.on_save_error",
    "train.on_bad_step",
    "train.max_skipped",
    "train.spike_factor",
    "data.cache_dir",
    "data.max_bad_documents",
    "data.max_damaged_files",
)


def incompatible_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which values that decide a run's numbers differ between two config.json dicts.

    Returns:
      One line a key, ``"train.length: 128, now 256"``; empty where a run may go on.
    """
    before, after = _flat(old), _flat(new)
    free: set[str] = set(CHANGEABLE_KEYS)
    if before.get("train.schedule") == after.get("train.schedule") == "constant":
        free.add("train.steps")  # a constant rate does not know where the run ends
    return [
        f"{key}: {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in free
        and not key.startswith(CHANGEABLE_SECTIONS)
    ]


def check_vocabulary(tokenizer_size: int, model: TransformerConfig) -> None:
    """Raises ConfigError where a token could fall outside the embedding."""
    if tokenizer_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size} tokens but config.model.vocab_size ="
            f" {model.vocab_size}; raise model.vocab_size to {tokenizer_size} or more, or of a"
            " trained model take the tokenizer that it was trained with"
        )


def _cross_check(experiment: Experiment) -> None:
    longest, length = experiment.position.limits.max_length, experiment.train.length
    if longest is not None and length > longest:
        raise ConfigError(
            f"config.train.length = {length} is beyond the longest sequence of position method"
            f" {positions.name_of(experiment.position)!r}, {longest}"
        )
    try:
        experiment.position.check(experiment.model.shape)
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error


def _build(name: str, cls: type, values: Mapping[str, Any]) -> Any:
    kinds = field_types(cls)
    for key in values:
        if key not in kinds:
            raise _unknown_key(f"{name}.{key}")
    values = {key: convert(f"{name}.{key}", value, kinds[key]) for key, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"config.{name}.{missing[0]} is missing ({kinds[missing[0]].__name__})")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"config.{name}: {error}") from error


def _build_position(values: Mapping[str, Any], length: int, init_std: float) -> PositionEmbedding:
    method = values.get("method")
    if method is None:
        raise ConfigError(
            f"config.position.method is missing; one of {', '.join(positions.METHODS)}"
        )
    if not isinstance(method, str):
        raise ConfigError(f"config.position.method = {method!r:.80}; accepted: a name")
    try:
        return _build_spec("position", values, length, init_std)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error


def _build_spec(key: str, value: Any, length: int, init_std: float) -> Any:
    """Methods and scalings from their specifications, each knob checked against its type.

    What has a training length and is given none takes the training's; sinusoids without an
    amplitude take that of the embeddings they are added to, at the start.
    """
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return tuple(_build_spec(f"{key}[{i}]", item, length, init_std) for i, item in items)
    if not isinstance(value, (Mapping, ConfigDict)):
        return value
    knobs = {name: _build_spec(f"{key}.{name}", v, length, init_std) for name, v in value.items()}
    entry, name, knobs = pieces_for_key(knobs)
    if not isinstance(name, str):
        raise ConfigError(
            f"config.{key} = {dict(value)}: expected a 'method', or a 'scaling' by its name"
        )
    known, make = {
        "method": (positions.METHODS, positions.make),
        "scaling": (positions.SCALINGS, positions.make_scaling),
    }[entry]
    kinds = _knob_types(known.get(name))
    if "training_length" in kinds:
        temperature = knobs.get("form") == "yarn"  # LogitScaling's form without a length
        if knobs.get("training_length") is None and not temperature:
            knobs["training_length"] = length
    if "amplitude" in kinds:
        knobs.setdefault("amplitude", init_std)
    knobs = {k: convert(f"{key}.{k}", v, kinds.get(k, Any)) for k, v in knobs.items()}
    return make(name, **knobs)


def _position_types(method: Any) -> dict[str, Any]:
    return _knob_types(positions.METHODS.get(method) if isinstance(method, str) else None)


def _knob_types(cls: type | None) -> dict[str, Any]:
    return {"preset": str | None} | field_types(cls) if cls else {}


def _fields(part: Any) -> dict[str, Any]:
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _unknown_key(key: str) -> ConfigError:
    known = [*_TOP, "position.method"]
    known += [f"{name}.{field}" for name, cls in SECTIONS.items() for field in field_types(cls)]
    return ConfigError(f"config.{key} is unknown{nearest(key, known)}")
