"""Builds an `Experiment` from configuration values, and converts it back; needs no device."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from fope_jax import position as positions
from fope_jax.config.evaluate import EvaluateConfig
from fope_jax.config.fields import ConfigError, check_seed, convert, field_types, nearest
from fope_jax.config.random_positions import check_random_positions
from fope_jax.config.train import TrainConfig
from fope_jax.data import DataConfig
from fope_jax.model.config import TransformerConfig
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.model.sharding import MeshConfig
from fope_jax.position.base import PositionEmbedding
from fope_jax.storage.changeable_keys import is_changeable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """Everything that determines a run.

    Attributes:
      name: the run's variant in rows and reports; seeds of one variant share it.
      seed: of initial weights, position coefficients and the order of the data; 0 to 2**32 - 1.
    """

    name: str
    seed: int
    model: TransformerConfig
    position: PositionEmbedding
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


SECTIONS = {
    "model": TransformerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "mesh": MeshConfig,
}
TOP_LEVEL = {"name": str, "seed": int}

# These may change when a run resumes, beside ``CHANGEABLE_KEYS``, as long as no learning rate of a
# finished update does.
SCHEDULE_KEYS = ("train.steps", "train.decay_steps")
_FILLED = {"training_length": "train.length", "num_layers": "model.num_layers"}


def build_experiment(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Builds and cross-checks the objects that ``config`` describes.

    Raises:
      ConfigError: unknown key, wrong type, missing value, or values that contradict each other.
    """
    if not isinstance(config, (ConfigDict, Mapping)):
        raise ConfigError(
            f"config = {config!r:.80}; accepted: a ConfigDict or a dict; load_config reads a file"
        )
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    for key, value in values.items():
        if key not in (*TOP_LEVEL, *SECTIONS, "position"):
            raise unknown_key(key)
        if key not in TOP_LEVEL and not isinstance(value, Mapping):
            raise ConfigError(f"config.{key} = {value!r:.80}; accepted: a mapping of its keys")
    for key in (*TOP_LEVEL, "model", "position", "data", "train"):
        if key not in values:
            raise ConfigError(f"config.{key} is missing")
    top = {key: convert(key, values[key], kind) for key, kind in TOP_LEVEL.items()}
    if not top["name"].strip():
        raise ConfigError(f"config.name = {top['name']!r}; accepted: a name that is not empty")
    sections = {
        name: _build_section(name, cls, values.get(name, {})) for name, cls in SECTIONS.items()
    }
    model, length, evaluate = sections["model"], sections["train"].length, sections["evaluate"]
    if evaluate.scored_tokens is None:
        half = max(1, length // 2)
        sections["evaluate"] = dataclasses.replace(evaluate, scored_tokens=half)
    if (method := values["position"].get("method")) is None:
        raise ConfigError(
            f"config.position.method is missing; one of {', '.join(positions.METHODS)}"
        )
    if not isinstance(method, str):
        raise ConfigError(f"config.position.method = {method!r:.80}; accepted: a name")
    try:
        position = _build_spec("position", values["position"], length, model)
        longest = position.limits.max_length
        if longest is not None and length > longest:
            raise ConfigError(
                f"config.train.length = {length} is beyond the longest sequence of position "
                f"method {positions.name_of(position)!r}, {longest}"
            )
        position.check(model.shape)
        layer_pattern(model, position)
        for scaling in scalings_without_effect(position, model.shape.head_dim):
            name = positions.name_of(scaling)
            _warn_once(f"WARNING: config.position: {name} with factor=1 changes nothing")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error
    try:
        check_random_positions(position, sections["train"], model)
        if evaluate.random_positions and sections["train"].position_range is None:
            raise ValueError(
                "evaluate.random_positions = True, train.position_range = None: the range of a run "
                "is what it was trained with; accepted: False"
            )
        return Experiment(**top, **sections, position=position)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error


def scalings_without_effect(position: PositionEmbedding, head_dim: int) -> list[positions.Scaling]:
    """The scalings by a factor of 1 that leave frequencies and logits as they are.

    >>> rope = positions.RoPE(scaling=(positions.YaRN(1.0, 512),))
    >>> scalings_without_effect(rope, 64) == [*rope.scaling]
    True
    """
    found = []
    for method in dict.fromkeys(layer.method for layer in position.layers()):
        if not isinstance(method, (positions.RoPE, positions.FoPE)):
            continue
        for scaling in method.scaling:
            if getattr(scaling, "factor", None) != 1 or scaling.follows_length:
                continue
            rest = tuple(step for step in method.scaling if step is not scaling)
            plain = dataclasses.replace(method, scaling=rest).frequencies(head_dim)
            scaled = method.frequencies(head_dim)
            is_same = scaled.shape == plain.shape and np.allclose(scaled, plain, 1e-12, 0)
            if is_same and scaling.effective_attention_factor == 1:
                found.append(scaling)
    return found


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)  # a command builds its experiment several times


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """The inverse of `build_experiment`: plain values for config.json, with all defaults."""
    result: dict[str, Any] = {"name": experiment.name, "seed": experiment.seed}
    for name in SECTIONS:
        values = dataclasses.asdict(getattr(experiment, name))
        result[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return result | {"position": positions.to_spec(experiment.position)}


def flat_values(experiment: Experiment) -> dict[str, Any]:
    """All values of an experiment by their keys, such as ``"train.length"``."""
    return flatten_dict(experiment_to_dict(experiment), sep=".")


def differing_values(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Keys by name with two values that differ, None where one lacks the key.

    >>> differing_values({"seed": 0, "name": "rope"}, {"seed": 1, "name": "rope"})
    [('seed', 0, 1)]
    """
    keys = sorted(before.keys() | now.keys())
    both = ((key, before.get(key), now.get(key)) for key in keys)
    return [(key, old, new) for key, old, new in both if old != new]


def incompatible_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences that prevent resuming, one line a key: ``"train.length: 128, now 256"``."""
    before, after = (flatten_dict(dict(values), sep=".") for values in (old, new))
    schedule = SCHEDULE_KEYS if _end_of_decay(before) == _end_of_decay(after) else ()
    return [
        f"{key}: {value!r}, now {other!r}"
        for key, value, other in differing_values(before, after)
        if not is_changeable(key) and key not in schedule
    ]


def _end_of_decay(values: Mapping[str, Any]) -> int | None:
    """The step that learning rates depend on; None for a constant rate."""
    if values.get("train.schedule") == "constant":
        return None
    return values.get("train.decay_steps") or values.get("train.steps")


def check_vocabulary(tokenizer_size: int, model: TransformerConfig) -> None:
    """Raises ConfigError if the tokenizer has more tokens than the embedding."""
    if tokenizer_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size} tokens but config.model.vocab_size ="
            f" {model.vocab_size}; raise model.vocab_size to {tokenizer_size} or more"
            f" (--config.model.vocab_size={tokenizer_size}), or of a trained model take the"
            " tokenizer that it was trained with"
        )


def knob_types(method: Any, preset: Any = None) -> dict[str, Any]:
    """The type of each knob of a named method or its preset; empty for an unknown name."""
    try:
        return _knob_types("method", method, preset)
    except (AttributeError, ValueError):  # `build_experiment` reports it
        return {}


def _knob_types(entry: str, name: str, preset: str | None) -> dict[str, Any]:
    kinds = field_types(positions.find_class(entry, name))
    if preset is not None and (own := positions.preset_knobs(name, preset)):
        hints = typing.get_type_hints(positions.PRESETS[name, preset])
        kinds = {knob: hints[knob] for knob in own}
    return {"preset": str | None} | kinds


def knob_source(name: str, default: Any, metadata: Mapping[str, Any] | None = None) -> str | None:
    """The key that a knob is taken from where a configuration leaves it out; None for its default.

    ``training_length`` and ``num_layers`` are filled in where they have no default or None; another
    knob where its field says so: ``field(default=0.02, metadata={"config": "model.init_std"})``.
    """
    if name in _FILLED and default in (dataclasses.MISSING, inspect.Parameter.empty, None):
        return _FILLED[name]
    return (metadata or {}).get("config")


def knob_sources(entry: str, name: str, preset: str | None) -> dict[str, str]:
    """The knobs of a class or its preset that have a `knob_source`."""
    if preset is not None and positions.preset_knobs(name, preset):
        parameters = inspect.signature(positions.PRESETS[name, preset]).parameters.values()
        sources = {knob.name: knob_source(knob.name, knob.default) for knob in parameters}
    else:
        sources = {
            field.name: knob_source(field.name, field.default, field.metadata)
            for field in dataclasses.fields(positions.find_class(entry, name))
            if field.init and field.default_factory is dataclasses.MISSING
        }
    return {knob: source for knob, source in sources.items() if source is not None}


def unknown_key(key: str) -> ConfigError:
    known = [*TOP_LEVEL, "position.method"]
    known += [f"{name}.{field}" for name, cls in SECTIONS.items() for field in field_types(cls)]
    return ConfigError(f"config.{key} is unknown{nearest(key, known)}")


def _build_section(name: str, cls: type, values: Mapping[str, Any]) -> Any:
    kinds = field_types(cls)
    for key in values:
        if key not in kinds:
            raise unknown_key(f"{name}.{key}")
    values = {key: convert(f"{name}.{key}", value, kinds[key]) for key, value in values.items()}
    for field in dataclasses.fields(cls):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.init and field.name not in values and not has_default:
            raise ConfigError(
                f"config.{name}.{field.name} is missing ({kinds[field.name].__name__})"
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"config.{name}: {error}") from error


def _build_spec(key: str, value: Any, length: int, model: TransformerConfig) -> Any:
    """Methods and scalings from their specifications.

    Knobs that are left out or None and have a `knob_source` take the value of that key.
    """
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return tuple(_build_spec(f"{key}[{i}]", item, length, model) for i, item in items)
    if not isinstance(value, (Mapping, ConfigDict)):
        return value
    knobs = {name: _build_spec(f"{key}.{name}", v, length, model) for name, v in value.items()}
    entry, name, knobs = positions.split_spec(knobs)
    if not isinstance(name, str):
        raise ConfigError(
            f"config.{key} = {dict(value)}: expected a 'method', or a 'scaling' by its name"
        )
    is_scaling = entry == "scaling"
    make = positions.make_scaling if is_scaling else positions.make
    kinds = _knob_types(entry, name, knobs.get("preset"))
    values = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    values["train.length"] = length
    for knob, source in knob_sources(entry, name, knobs.get("preset")).items():
        # LogitScaling's form "yarn" is a temperature and rejects a length.
        rejects = knob == "training_length" and knobs.get("form") == "yarn"
        if knobs.get(knob) is None and not rejects:
            if source not in values:
                raise ConfigError(
                    f"config.{key}.{knob}: its field says {source!r}; accepted: {', '.join(values)}"
                )
            knobs[knob] = values[source]
    return make(name, **{k: convert(f"{key}.{k}", v, kinds.get(k, Any)) for k, v in knobs.items()})
