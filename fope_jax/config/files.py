"""Reads a configuration file with its argument and overrides into a ConfigDict.

``ml_collections.config_flags`` cannot be used: it takes types from the values in the file, so it
can set neither a field that the file omits, nor None to a number, nor knobs of another method.
"""

from __future__ import annotations

import ast
import logging
import re
import runpy
import traceback
from collections.abc import Iterable, Mapping
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
from fope_jax.position.registry import import_module, import_modules
from fope_jax.storage.files import read_json
from fope_jax.storage.paths import expand_home
from fope_jax.storage.run_paths import CONFIG, is_of_weights

logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parents[1]
_SPEC = re.compile(r"(.*?\.(?:py|json))(?::(.*))?", re.DOTALL)
# A wheel holds the configurations inside the package, a checkout beside it.
SHIPPED = next(filter(Path.is_dir, [_PACKAGE / "configs"]), _PACKAGE.parent / "configs")


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Reads a configuration file, applies overrides and checks that the result can be built.

    Args:
      spec: ``"path.py"`` or ``"path.py:arg"`` for ``get_config(arg)``, or a run's ``config.json``.
        What is no file here may be one that comes with fope_jax, by name: ``"quickstart"``,
        ``"paper/c4_books"`` or ``"configs/quickstart.py"``.
      overrides: ``"train.steps=100"``, parsed by the type of the field; ``--config.`` may precede.

    Raises:
      ConfigError: a missing file or get_config, an unknown key, or a wrong type.
    """
    name, arg = split_spec(spec)
    path = _find_file(name)
    if not path.endswith(".json"):
        config = call_in_file("configuration", path, "get_config", arg)
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"get_config of {path!r} returns {type(config).__name__}; accepted: ConfigDict"
            )
        _import_modules(config.get("position"))
        _import_tracker(config.get("train"))
        return apply_overrides(config, overrides)
    _check_file("configuration", path)
    try:
        values = read_json(Path(path))
    except ValueError as error:
        raise ConfigError(f"configuration file {error}") from error
    if is_of_weights(values):
        raise ConfigError(
            f"configuration file {path} is that of a Hugging Face checkpoint; "
            "`fope import DIR --workdir RUN` makes a run of one"
        )
    try:
        return apply_overrides(ConfigDict(values), overrides)
    except (ValueError, KeyError, AttributeError) as error:  # also keys that ConfigDict refuses
        raise ConfigError(f"configuration file {path}: {error}") from error


def _find_file(name: str) -> str:
    """The path of a configuration file; of one that fope_jax brings, where there is none here."""
    name = expand_home(name)
    path = SHIPPED / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    if Path(name).exists() or path not in SHIPPED.rglob("*.py"):
        return name
    logger.info("configuration file %s, which comes with fope_jax", path)
    return str(path)


def _import_modules(position: Any) -> None:
    """Imports the modules that a position specification of the user names."""
    try:
        import_modules(position.to_dict() if isinstance(position, ConfigDict) else position)
    except ValueError as error:
        raise ConfigError(f"config.position: {error}") from error


def _import_tracker(train: Any) -> None:
    """Imports the module of the tracker that the section ``train`` of the user names."""
    name = train.get("tracker") if hasattr(train, "get") else None
    if isinstance(name, str) and all(name.partition(":")):
        try:
            import_module(name.partition(":")[0])
        except ValueError as error:
            raise ConfigError(f"config.train.tracker: {error}") from error


def split_spec(spec: str) -> tuple[str, str]:
    """The path and the argument of ``path.py:arg``; a directory may have colons in its name.

    >>> split_spec("sweep.py:seeds=3"), split_spec("a:b/config.json"), split_spec("recall:seed=1")
    (('sweep.py', 'seeds=3'), ('a:b/config.json', ''), ('recall', 'seed=1'))
    """
    found = _SPEC.fullmatch(spec)
    path, _, arg = (found.group(1), "", found.group(2)) if found else spec.partition(":")
    return path, arg or ""


def call_in_file(kind: str, path: str, function: str, arg: str) -> Any:
    """Calls ``function(arg)`` in a user's file; raises ConfigError with the line that failed."""
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
        stored = Path(path, CONFIG)
        form = f"that of this run is {stored}" if stored.is_file() else "form: path.py:arg"
        raise ConfigError(f"{kind} file {path!r} {problem} ({form})")


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses the ``arg`` of a configuration file; a bare name means True.

    >>> parse_arg("position=rope,smoke", position="fope", seed=0, smoke=False).to_dict()
    {'position': 'rope', 'seed': 0, 'smoke': True}
    """
    values = dict(defaults)
    for item in filter(None, map(str.strip, arg.split(","))):
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
    """Applies overrides to ``config`` in place; checks and raises as `load_config`."""
    if isinstance(overrides, (str, Mapping)):
        raise ConfigError(
            f"overrides = {overrides!r:.80}; accepted: a list such as ['train.steps=3']"
        )
    for override in overrides:
        key, text = split_override(override)
        section, _, field = key.partition(".")
        values: Any = config.get(section) if field else config
        if field and values is not None and not hasattr(values, "get"):
            raise ConfigError(f"config.{section} = {values!r:.80}; accepted: a mapping")
        if section == "position" and field:
            kinds = knob_types(*(values.get(k) if values else None for k in ("method", "preset")))
            value = parse_knob(key, text, str if field == "method" else kinds.get(field, Any))
            _import_modules({"method": value} if field == "method" else value)
        else:
            kinds = field_types(SECTIONS[section]) if section in SECTIONS else TOP_LEVEL
            kind = kinds.get(field if section in SECTIONS else key)
            if kind is None and key in (*SECTIONS, "position"):
                example = "method" if key == "position" else next(iter(field_types(SECTIONS[key])))
                raise ConfigError(
                    f"config.{key} is a section; accepted: one of its keys, as "
                    f"--config.{key}.{example}=VALUE"
                )
            if kind is None:
                raise unknown_key(key)
            value = parse_value(key, text, kind)
            if key == "train.tracker":
                _import_tracker({"tracker": value})
        # ConfigDict would check the type against the old value, not against the field.
        with config.ignore_type():
            if values is None:
                config[section] = {field: value}
            else:
                values[field or key] = value
    build_experiment(config)
    return config


def split_override(override: str) -> tuple[str, str]:
    """Key and text of an override; the prefix ``--config.`` is optional.

    >>> split_override("--config.train.steps=100")
    ('train.steps', '100')
    """
    override = override.removeprefix("--").removeprefix("config.")
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no value (form: --config.train.steps=100)")
    return key, text


def parse_knob(key: str, text: str, kind: Any) -> Any:
    """A knob's value: a literal list or dict of specifications, or a value of type ``kind``."""
    if not text.startswith(("[", "{")):
        return parse_value(key, text, kind)
    try:
        return ast.literal_eval(text)  # `build_experiment` checks it
    except NOT_LITERAL as error:
        raise ConfigError(
            f"config.{key} = {text!r} is no Python literal; write for example"
            ' \'[{"scaling": "ntk", "factor": 4.0}]\''
        ) from error
