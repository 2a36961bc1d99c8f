"""Configurations and their values as Python gives them: objects in place of a command line."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fope_jax import position as positions
from fope_jax.config.evaluate import EvaluateConfig
from fope_jax.config.experiment import SECTIONS, TOP_LEVEL, Experiment, experiment_to_dict
from fope_jax.config.fields import ConfigError, field_types, nearest
from fope_jax.config.files import apply_overrides, load_config
from fope_jax.position import PositionEmbedding

Config = str | Path | ConfigDict | Experiment | Mapping[str, Any]


def config_of(
    config: Config,
    position: str | Mapping[str, Any] | PositionEmbedding | None,
    overrides: Sequence[str],
) -> ConfigDict:
    """A copy of a configuration, with another position embedding and overrides.

    A name that is that of the method changes with it. Overrides of ``position`` are of the other
    one. Raises ConfigError for an object of another kind, and as `load_config`.
    """
    knobs = [text for text in overrides if position is not None and text.startswith("position.")]
    others = [text for text in overrides if text not in knobs]
    if not isinstance(config, (str, Path, Experiment, Mapping, ConfigDict)):
        raise ConfigError(
            f"config = {config!r:.80}; accepted: a file's name, a dict, a ConfigDict or an "
            "Experiment, such as a run's: run.experiment"
        )
    if isinstance(config, (str, Path)):
        result = load_config(str(config), others)
    else:
        values = experiment_to_dict(config) if isinstance(config, Experiment) else config
        result = copy.deepcopy(values if isinstance(values, ConfigDict) else ConfigDict(values))
        apply_overrides(result, others)
    if position is None:
        return result
    spec = _position_spec(position)
    before: Any = result.get("position") or {}
    is_name_given = any(text.startswith("name=") for text in others)
    if result.get("name") == before.get("method") and not is_name_given:
        result.name = spec["method"]
    result.position = ConfigDict(spec)
    return apply_overrides(result, knobs)


def _position_spec(position: str | Mapping[str, Any] | PositionEmbedding) -> dict[str, Any]:
    if isinstance(position, PositionEmbedding):
        return positions.to_spec(position)
    if isinstance(position, str):
        return {"method": position}
    if not isinstance(position, Mapping) or not isinstance(position.get("method"), str):
        raise ConfigError(
            f"position = {position!r}; accepted: a name such as 'rope', a dict with 'method', or "
            "a method such as fope_jax.position.RoPE()"
        )
    return dict(position)


def overrides_of(overrides: Mapping[str, Any] | None, values: Mapping[str, Any]) -> list[str]:
    """Overrides as the command line writes them, of values by key and by argument.

    Raises ConfigError for one that is given twice, and an argument that is no key's.

    >>> overrides_of({"data.tasks": ("recall=0.5", "copy=0.5")}, {"train_steps": 500})
    ['train.steps=500', 'data.tasks=recall=0.5,copy=0.5']
    """
    named = [(_key_of(name), value) for name, value in values.items()]
    keys = _each_once([*named, *(overrides or {}).items()])
    return [f"{key}={_override_text(key, value)}" for key, value in keys.items()]


def evaluate_overrides(given: Iterable[tuple[str, Any]], arguments: Sequence[str]) -> list[str]:
    """Overrides of fields of the section evaluate, which may stand before their names.

    Raises ConfigError for one that is given twice, and for other names, with the nearest of these
    fields and of ``arguments``.

    >>> evaluate_overrides([("num_windows", 8), ("evaluate_stride", 16)], ["protocols"])
    ['evaluate.num_windows=8', 'evaluate.stride=16']
    """
    values = _each_once([(name.removeprefix("evaluate_"), value) for name, value in given])
    keys = {name: f"evaluate.{name}" for name in field_types(EvaluateConfig)}
    keys["data_cache_dir"] = "data.cache_dir"
    for name in values:
        if name not in keys:
            raise ConfigError(
                f"evaluate has no field {name!r}{nearest(name, [*keys, *arguments])}; accepted: a "
                "field of the section evaluate such as num_windows=64, or data_cache_dir"
            )
    return [f"{keys[name]}={_override_text(name, value)}" for name, value in values.items()]


def _each_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"{key} is given twice: {values[key]!r} and {value!r}")
        values[key] = value
    return values


def _key_of(name: str) -> str:
    """The key of an argument, such as ``train.steps`` of ``train_steps``."""
    section, _, field = name.partition("_")
    if name in TOP_LEVEL:
        return name
    if field and section in (*SECTIONS, "position"):
        return f"{section}.{field}"
    known = [
        f"{section}_{field}" for section, cls in SECTIONS.items() for field in field_types(cls)
    ]
    fields = [key for key in known if key.partition("_")[2] == name]
    hint = f" (nearest: {fields[0]})" if fields else nearest(name, [*TOP_LEVEL, *known])
    raise ConfigError(
        f"{name!r} is no value of a configuration{hint}; accepted: SECTION_FIELD such as "
        "train_steps=500, and position_KNOB for a knob of the position embedding"
    )


def _override_text(key: str, value: Any) -> str:
    """A value as text that `parse_value` reads."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return repr(dict(value))
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value)
    if any(isinstance(item, Mapping) for item in value):
        return repr([dict(item) for item in value])
    texts = [str(item) for item in value]
    if any("," in text for text in texts):
        raise ConfigError(f"{key} = {value!r}; accepted: values without a comma")
    return ",".join(texts)
