"""Parses and checks values of configuration fields, and suggests the nearest field name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Union

import numpy as np

from fope_jax.spelling import likely

_UNIONS = (Union, types.UnionType)
# How values of these types are written in a configuration.
_SPECIFICATIONS = {
    "PositionEmbedding": "{'method': 'rope'}",
    "Scaling": "{'scaling': 'ntk', 'factor': 4.0}",
}
# Errors of `ast.literal_eval`, also for text that is nested too deeply or has a list as a key.
NOT_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


class ConfigError(ValueError):
    """An invalid configuration; the message has the key, the value and what is accepted."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def parse_value(key: str, text: str, kind: Any) -> Any:
    """Parses ``text`` as a value of type ``kind`` and checks it with `convert`."""
    return convert(key, _parse(text, kind), kind)


def _parse(text: str, kind: Any) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    origins, word = [typing.get_origin(option) for option in options], text.lower()
    choices = [choice for option in options for choice in typing.get_args(option)]
    has_number = int in options or float in options
    is_text = str in options or (Literal in origins and (text in choices or not has_number))
    if word == "none" and type(None) in options:
        return None
    if word in ("true", "false") and (bool in options or not is_text):
        return word == "true"
    if is_text:
        return text
    if tuple in origins:
        text = text.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        items = [item.strip() for item in text.split(",")]
        return tuple(_parse_item(item, choices) for item in items if item)
    return _literal(text)


def _parse_item(text: str, kinds: Sequence[Any]) -> Any:
    """An item of a list of ``kinds``; one of texts is a number or none only without them."""
    if str in kinds and text[0] not in "\"'":
        return text
    return None if text.lower() == "none" else _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except NOT_LITERAL:
        return text


def convert(key: str, value: Any, kind: Any) -> Any:
    """Converts list to tuple and int to float; raises ConfigError if the type is not ``kind``."""
    is_accepted, result = _convert(value, kind)
    if not is_accepted:
        accepted = "True or False" if kind is bool else type_text(kind)
        for name, spec in _SPECIFICATIONS.items():
            if name in accepted:
                accepted += f", as [{spec}]" if "list of" in accepted else f", as {spec}"
        raise ConfigError(f"config.{key} = {value!r}{_found(value, kind)}; accepted: {accepted}")
    return result


def type_text(kind: Any) -> str:
    """A type as a user reads it.

    >>> [type_text(kind) for kind in (int | None, tuple[str, ...], Literal["a", "b"])]
    ['int or none', 'list of str', 'a or b']
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return " or ".join(map(type_text, args))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _found(value: Any, kind: Any) -> str:
    """What is wrong with a value of another kind: its type, or its first item of another kind."""
    if typing.get_origin(kind) is Literal and isinstance(value, str):
        return nearest(value, map(str, typing.get_args(kind)))
    if isinstance(value, (list, tuple)) and typing.get_origin(kind) is tuple:
        (accepted, *_) = typing.get_args(kind)
        wrong = next(item for item in value if not _convert(item, accepted)[0])
        return f": {wrong!r}{_found(wrong, accepted)}"
    return f" is {'no finite number' if _is_not_finite(value) else type(value).__name__}"


def _is_not_finite(value: Any) -> bool:
    """Whether a value is the text of NaN or infinity, which is no literal.

    >>> [_is_not_finite(text) for text in ("nan", "-inf", "1e5", "x", None)]
    [True, True, False, False, False]
    """
    try:
        return isinstance(value, str) and not math.isfinite(float(value))
    except ValueError:
        return False


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, np.generic):
        value = value.item()
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
    if isinstance(value, bool) and kind in (int, float):
        return False, value
    if kind is float and isinstance(value, int):
        try:
            return True, float(value)
        except OverflowError:  # an integer of more than 308 digits
            return False, value
    plain = origin or kind
    return (not isinstance(plain, type) or isinstance(value, plain)), value


def check_value(name: str, value: Any, is_accepted: bool, accepted: str) -> None:
    """Raises ValueError "name = value; accepted: ..." if the value is not accepted."""
    if not is_accepted:
        raise ValueError(f"{name} = {value!r}; accepted: {accepted}")


def check_seed(name: str, value: int) -> None:
    """Raises ValueError for a seed that a random key does not hold.

    A key has 32 bits of it: 2**32 would draw as 0 does, and -1 as 2**32 - 1.
    """
    check_value(name, value, 0 <= value < 2**32, f"0 to {2**32 - 1}")


def check_fields(config: Any, *rules: tuple[str, Callable[[Any], bool], str]) -> None:
    """Raises ValueError for the first field of a dataclass that breaks a rule or its ``Literal``.

    A rule is (names of fields, is accepted, what is accepted in words).
    """
    for name, kind in field_types(type(config)).items():
        if typing.get_origin(kind) is Literal:
            values, value = typing.get_args(kind), getattr(config, name)
            check_value(name, value, value in values, f"one of {values}")
    for names, is_accepted, accepted in rules:
        for name in names.split():
            value = getattr(config, name)
            check_value(name, value, is_accepted(value), accepted)


def nearest(key: str, known: Iterable[str]) -> str:
    """`` (nearest: KEY)`` or "": a likely key, or the only one of this name in another section."""
    known, leaf = list(known), key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    found = likely(key, known) or (same[0] if len(same) == 1 else None)
    return f" (nearest: {found})" if found else ""
