"""Values of configuration fields: their types, how text becomes one, and the nearest name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union

from fope_jax.spelling import likely


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names key, value and what is accepted."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def parse_value(text: str, kind: Any) -> Any:
    """The value that ``text`` stands for in a field of type ``kind``; checked by the caller."""
    options = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if any(typing.get_origin(option) is tuple for option in options):
        items = [item.strip() for item in text.strip("()[] ").split(",")]
        return tuple(_literal(item) for item in items if item)
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except NOT_LITERAL:
        return text


# What `ast.literal_eval` raises, for text that is nested too deeply or hashes a list too.
NOT_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


_UNIONS = (Union, types.UnionType)


def convert(key: str, value: Any, kind: Any) -> Any:
    """Returns ``value`` as ``kind``: a list becomes a tuple, an int may stand for a float."""
    accepted, result = _convert(value, kind)
    if not accepted:
        name = getattr(kind, "__name__", "") if isinstance(kind, type) else ""
        text = name or str(kind).replace("typing.", "").replace("NoneType", "None")
        raise ConfigError(f"config.{key} = {value!r} is {type(value).__name__}; accepted: {text}")
    return result


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, value
    if origin in _UNIONS:
        tried = [_convert(value, option) for option in args]
        return next((result for result in tried if result[0]), (False, value))
    if origin is Literal:
        return value in args, value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False, value
        items = [_convert(item, args[0] if args else Any) for item in value]
        return all(ok for ok, _ in items), tuple(item for _, item in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return True, float(value)
        except OverflowError:  # an integer of more than 308 digits
            return False, value
    if kind is int and isinstance(value, bool):
        return False, value
    plain = origin or kind
    return (not isinstance(plain, type) or isinstance(value, plain)), value


def check_value(name: str, value: Any, condition: bool, accepted: str) -> None:
    """Raises ValueError "name = value; accepted: ..." where ``condition`` does not hold."""
    if not condition:
        raise ValueError(f"{name} = {value!r}; accepted: {accepted}")


def nearest(key: str, known: Iterable[str]) -> str:
    """`` (nearest: KEY)``, or nothing: the key of this name in another section, or a likely one.

    Where several sections have the name, none of them is nearer than the others.
    """
    known, leaf = list(known), key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    found = (same[0] if len(same) == 1 else None) if same else likely(key, known)
    return f" (nearest: {found})" if found else ""
