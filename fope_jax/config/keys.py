"""Every key of a configuration: type, default, meaning, and whether it may change on resuming.

Read from the dataclasses and their docstrings, for `fope config --keys` and the documentation.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fope_jax.config.experiment import SCHEDULE_KEYS, SECTIONS, TOP_LEVEL, Experiment, knob_source
from fope_jax.config.fields import ConfigError, field_types, nearest, type_text
from fope_jax.position.registry import METHODS, PRESETS, SCALINGS
from fope_jax.report.markdown import markdown_table
from fope_jax.storage.changeable_keys import is_changeable

POSITION = "position"
WIDTH = 96  # characters of a line in the terminal
_SECTION = re.compile(r"(Attributes|Knobs)\b.*:")
_ENTRY = re.compile(r"  (\w+(?:, \w+)*): (.*)")
_SENTENCE_END = re.compile(r"(?<!\bEq)\. ")


class Key(NamedTuple):
    """One key, in words; ``default`` is None where a value is required."""

    name: str
    type: str
    default: str | None
    on_resume: str  # "yes", "no" or the condition
    meaning: str

    @property
    def summary(self) -> str:
        """The first sentence of the meaning."""
        return _SENTENCE_END.split(self.meaning)[0].rstrip(".")


def find_keys(prefix: str = "") -> list[Key]:
    """The keys that ``prefix`` names.

    Args:
      prefix: nothing for all keys; a section (``"train"``), a key (``"train.steps"``), or a method
        or scaling for its knobs (``"position.fope"``, ``"position.yarn"``).

    Raises:
      ConfigError: no key begins so; names the nearest.

    >>> [(key.name, key.type, key.default) for key in find_keys("train.log_every")]
    [('train.log_every', 'int', '10')]
    >>> [key.name for key in find_keys("position.alibi")]
    ['position.slopes']
    """
    section, _, name = prefix.partition(".")
    if section == POSITION and name in (known := METHODS | SCALINGS):
        return class_keys(POSITION, known[name])
    keys = all_keys()
    found = [key for key in keys if key.name == prefix or key.name.startswith(f"{prefix}.")]
    if prefix and not found:
        names = [key.name for key in keys] + [f"{POSITION}.{name}" for name in METHODS | SCALINGS]
        raise ConfigError(f"no key of a configuration is {prefix!r}{nearest(prefix, names)}")
    return found if prefix else keys


def all_keys() -> list[Key]:
    """The keys of all sections, in their order; of ``position`` those that every method has."""
    texts = field_texts(Experiment)
    keys = [_make_key(name, kind, None, texts[name]) for name, kind in TOP_LEVEL.items()]
    keys += [key for section, cls in SECTIONS.items() for key in class_keys(section, cls)]
    names = ", ".join(METHODS)
    method = f"one of {names}, or MODULE:CLASS. `fope config --keys position.NAME` has its knobs."
    presets = ", ".join(f"{preset} of {name}" for name, preset in PRESETS)
    preset = f"a named set of knobs that others override: {presets}."
    keys.append(_make_key(f"{POSITION}.method", str, None, method))
    keys.append(_make_key(f"{POSITION}.preset", str | None, "none", preset))
    return keys


def class_keys(section: str, cls: Any) -> list[Key]:
    """The fields of a dataclass, each with its text in the docstring."""
    kinds, texts = field_types(cls), field_texts(cls)
    return [
        _make_key(
            f"{section}.{field.name}",
            kinds[field.name],
            _default(field, section == POSITION),
            texts[field.name],
        )
        for field in dataclasses.fields(cls)
        if field.init
    ]


def field_texts(cls: type) -> dict[str, str]:
    """The entries of a docstring's section ``Attributes:`` or ``Knobs:``, by field.

    >>> field_texts(METHODS["alibi"])["slopes"]
    'one per query head, logits per token; None takes `alibi_slopes(N)`, all zero is NoPE.'
    """
    texts: dict[str, str] = {}
    names, is_inside = [], False
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if not line.startswith(" "):
            is_inside = bool(_SECTION.fullmatch(line)) or (is_inside and not line)
        elif is_inside and (entry := _ENTRY.fullmatch(line)):
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        elif is_inside:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return {name: text.replace("``", "`") for name, text in texts.items()}


def _make_key(name: str, kind: Any, default: str | None, meaning: str) -> Key:
    if name in SCHEDULE_KEYS:
        on_resume = "where the learning rates so far stay the same"
    else:
        on_resume = "yes" if is_changeable(name) else "no"
    return Key(name, type_text(kind), default, on_resume, meaning)


def _default(field: dataclasses.Field, is_knob: bool) -> str | None:
    default = field.default
    if is_knob:
        default = knob_source(field.name, default, field.metadata) or default
    if default is dataclasses.MISSING:
        return None
    if isinstance(default, tuple):
        return ", ".join(map(str, default)) or "empty"
    return "none" if default is None else str(default) or "empty"


# ---------------------------------------------------------------------------- shown


def keys_text(keys: Sequence[Key]) -> str:
    """Two lines a key for the terminal; a single key with its whole meaning."""
    lines = []
    for key in keys:
        value = f" = {key.default}" if key.default is not None else ""
        facts = [key.type] + ([] if value else ["required"])
        if key.on_resume != "no":
            may = "may change on resuming"
            facts.append(may if key.on_resume == "yes" else f"{may} {key.on_resume}")
        lines += textwrap.wrap(f"{key.name}{value}  ({', '.join(facts)})", WIDTH)
        meaning = key.meaning if len(keys) == 1 else key.summary
        lines += textwrap.wrap(meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def keys_markdown(keys: Iterable[Key]) -> str:
    """A table of keys with their whole meanings."""
    rows = []
    for key in keys:
        default = "required" if key.default is None else f"`{key.default}`"
        rows.append((f"`{key.name}`", key.type, default, key.on_resume, key.meaning))
    return markdown_table(["key", "type", "default", "may change on resuming", "meaning"], rows)
