"""METHOD:KNOB=VALUE,.. as a variant of a checkpoint, by the rules of an extension."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fope_jax.config import ConfigError
from fope_jax.evaluate.variants import Variant
from fope_jax.extend.coefficients import carry_variables
from fope_jax.extend.frequencies import frequency_changes
from fope_jax.extend.methods import (
    SAME,
    MissingKnobError,
    extend_position,
    named_module,
    target_classes,
)
from fope_jax.extend.parent import Parent, open_parent
from fope_jax.extend.request import config_knobs, parse_knobs
from fope_jax.position import PositionVariables, import_module
from fope_jax.train.state import init_position_arrays

_OPEN, _CLOSED = "([{", ")]}"


def split_variant(text: str) -> tuple[str, dict[str, str]]:
    """The method of ``METHOD:KNOB=VALUE,KNOB=VALUE``, and the texts of its knobs.

    A comma inside brackets belongs to its value. A method of the user's own is MODULE:CLASS.

    >>> split_variant("longrope:long_factor=(1.0,4.0),factor=4")
    ('longrope', {'long_factor': '(1.0,4.0)', 'factor': '4'})
    >>> split_variant("my_methods:LogDistance:rate=2.0")
    ('my_methods:LogDistance', {'rate': '2.0'})

    Raises:
      ConfigError: a knob without a value or given twice, or no method.
    """
    method, _, rest = text.partition(":")
    name, _, knobs_of_own = rest.partition(":")
    if name.strip().isidentifier() and named_module(f"{method}:{name}"):
        method, rest = f"{method.strip()}:{name.strip()}", knobs_of_own
    if "," in method:
        raise ConfigError(f"--as {text}: one method; give --as once for each of several")
    knobs, part, depth = {}, "", 0
    for character in f"{rest},":
        depth += (character in _OPEN) - (character in _CLOSED)
        if character != "," or depth:
            part += character
            continue
        name, equals, value = part.partition("=")
        if part and not (equals and name.strip() and value.strip()):
            raise ConfigError(f"--as {text}: {part!r} is no KNOB=VALUE, such as yarn:factor=4")
        if name.strip() in knobs:
            raise ConfigError(f"--as {text}: {name.strip()} is given twice; accepted: each once")
        if part:
            knobs[name.strip()] = value.strip()
        part = ""
    if not method.strip() or depth:
        raise ConfigError(f"--as {text}; accepted: METHOD:KNOB=VALUE,.. such as yarn:factor=4")
    return method.strip(), knobs


def make_variants(run: str | Path, step: int | None, texts: Sequence[str]) -> list[Variant]:
    """The variants of a run's checkpoint, see ``make_variant``; ConfigError for one named twice."""
    parent = open_parent(run, step)
    variants = [make_variant(parent, text) for text in texts]
    labels = [variant.label or SAME for variant in variants]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--as {label} is given twice")
    return variants


def make_variant(parent: Parent, text: str) -> Variant:
    """The variant of a checkpoint that ``text`` names, see ``split_variant``.

    What may follow its method is what an extension accepts; lengths are those that the checkpoint
    was trained on, a stretch needs its factor, and dynamic NTK follows each row. ``same`` is the
    run as it is. The module of MODULE:CLASS is imported, since the user names it.

    Raises:
      ConfigError: the text is malformed, or a stretch has no factor.
      ValueError: the method cannot follow the checkpoint's, or a knob is wrong; says why.
    """
    method, texts = split_variant(text)
    before, trained = parent.experiment.position, parent.experiment.train.length
    shape = parent.experiment.model.shape
    if method == SAME and not texts:
        return Variant("", before)
    try:
        if module := named_module(method):
            import_module(module)
        knobs = parse_knobs(before, method, texts)
        _, scaling = target_classes(before, method)
        fields = {field.name for field in dataclasses.fields(scaling)} if scaling else set()
        if scaling and scaling.stretches and "factor" in fields - knobs.keys():
            raise ValueError(f"it needs a factor, how many times longer: {method}:factor=4")
        free = config_knobs(parent.experiment, method, trained)
        free |= {"length": None} if "length" in fields else {}
        position = extend_position(
            before,
            method,
            from_length=trained,
            length=trained,
            head_dim=shape.head_dim,
            knobs=free | knobs,
            allow_shorter=True,
            made_for=parent.made_for,
            positions=parent.experiment.train.trained_positions,
        )
        position.check(shape)
    except MissingKnobError as error:
        stated = [f"{name}={value}" for name, value in texts.items()]
        full = ",".join([*stated, *(f"{name}=VALUE" for name in error.names)])
        raise ConfigError(f"--as {text}: {error.what}: {method}:{full}") from error
    except ValueError as error:
        raise ConfigError(f"--as {text}: {error}") from error
    experiment = dataclasses.replace(parent.experiment, position=position)

    def carry(arrays: PositionVariables) -> PositionVariables:
        drawn, rows = init_position_arrays(experiment), parent.table_rows
        return carry_variables(
            before, arrays, position, drawn, shape.head_dim, from_length=rows
        ).variables

    changes = frequency_changes(before, position, shape.head_dim)
    stated = ",".join(f"{name}={_text(knobs[name])}" for name in sorted(knobs))
    label = f"{method}:{stated}" if stated else method
    return Variant(label, position, carry, changes.text if changes else "")


def _text(value: Any) -> str:
    """A knob's value in a label: the same for ``4`` and ``4.0``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:g}" if is_number else str(value).replace(" ", "")
