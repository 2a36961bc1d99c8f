"""From a configuration file, its argument and overrides to a ConfigDict. Touches no device.

The parsing is our own, since ``ml_collections.config_flags`` knows the type of a value only from
the value in the file: it cannot change a field that the file leaves to its default, nor turn a
default of None into a number, and a knob of another method is unknown to it.
"""

from __future__ import annotations

import ast
import runpy
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fope_jax.config.experiment import (
    SECTIONS,
    TOP_LEVEL,
    build_experiment,
    knob_types,
    unknown_key,
)
from fope_jax.config.fields import (
    NOT_LITERAL,
    ConfigError,
    convert,
    field_types,
    nearest,
    parse_value,
)
from fope_jax.position.registry import import_modules
from fope_jax.storage.files import read_json


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
    if not path.endswith(".json"):
        config = call_in_file("configuration", path, "get_config", arg)
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"get_config of {path!r} returns {type(config).__name__}; accepted: ConfigDict"
            )
        _import_modules(config.get("position"))
        return apply_overrides(config, overrides)
    _check_file("configuration", path)
    try:
        values = read_json(Path(path))
    except ValueError as error:
        raise ConfigError(f"configuration file {error}") from error
    if "model_type" in values:
        raise ConfigError(
            f"configuration file {path} is that of a Hugging Face checkpoint; "
            "`fope import --from DIR --workdir RUN` makes a run of one"
        )
    try:
        return apply_overrides(ConfigDict(values), overrides)
    except (ValueError, KeyError, AttributeError) as error:  # also keys that ConfigDict refuses
        raise ConfigError(f"configuration file {path}: {error}") from error


def _import_modules(position: Any) -> None:
    """Imports the modules with position embeddings that the user's own words name."""
    try:
        import_modules(position.to_dict() if isinstance(position, ConfigDict) else position)
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error


def call_in_file(kind: str, path: str, function: str, arg: str) -> Any:
    """What ``function(arg)`` of a Python file of the user returns.

    Raises:
      ConfigError: there is no such file or function, or the file raises something; the message
        names the file, its line and the error.
    """
    _check_file(kind, path)
    try:
        called = runpy.run_path(path).get(function)
        if called is not None:
            return called(arg)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"line {frame.lineno}: " for frame in frames if frame.filename == path]
        where, reason = lines[-1] if lines else "", " ".join(str(error).split())
        raise ConfigError(
            f"{kind} file {path!r}: {where}{type(error).__name__}: {reason}"
        ) from error
    raise ConfigError(f"{kind} file {path!r} defines no {function}(arg)")


def _check_file(kind: str, path: str) -> None:
    if not Path(path).is_file():
        problem = "is no file" if Path(path).exists() else "does not exist"
        raise ConfigError(f"{kind} file {path!r} {problem} (form: path.py:arg)")


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Reads the ``arg`` of a configuration file, ``"position=rope,smoke"``; a bare name is True.

    >>> parse_arg("position=rope,smoke", position="fope", seed=0, smoke=False).to_dict()
    {'position': 'rope', 'seed': 0, 'smoke': True}
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(
                f"config argument {key!r} is unknown{nearest(key, defaults)};"
                f" accepted: {', '.join(defaults)}"
            )
        name, kind = f"argument {key}", type(defaults[key])
        values[key] = parse_value(name, text, kind) if equals else convert(name, True, kind)
    return ConfigDict(values)


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """``config`` with the overrides of `load_config` in it, after a check that it can be built.

    Raises:
      ConfigError: see `load_config`.
    """
    for override in overrides:
        key, text = split_override(override)
        section, _, field = key.partition(".")
        values: Any = config.get(section) if field else config
        if field and values is not None and not hasattr(values, "get"):
            raise ConfigError(f"config.{section} = {values!r:.80}; accepted: a mapping")
        if section == "position" and field:
            kinds = knob_types(values.get("method") if values else None)
            value = parse_knob(key, text, str if field == "method" else kinds.get(field, Any))
            _import_modules({"method": value} if field == "method" else value)
        else:
            kinds = field_types(SECTIONS[section]) if section in SECTIONS else TOP_LEVEL
            kind = kinds.get(field if section in SECTIONS else key)
            if kind is None:
                raise unknown_key(key)
            value = parse_value(key, text, kind)
        # The type is checked against the field; ConfigDict would check it against the old value.
        with config.ignore_type():
            if values is None:
                config[section] = {field: value}
            else:
                values[field or key] = value
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
    """A knob's value: a literal list or mapping of specifications, or a value of type ``kind``."""
    if not text.startswith(("[", "{")):
        return parse_value(key, text, kind)
    try:
        return ast.literal_eval(text)  # checked when it is built
    except NOT_LITERAL as error:
        raise ConfigError(
            f"config.{key} = {text!r} is no Python literal; write for example"
            ' \'[{"scaling": "ntk", "factor": 4.0}]\''
        ) from error
