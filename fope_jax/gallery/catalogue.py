"""The entries of the table of methods, read from classes and docstrings."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from fope_jax.gallery.examples import SHAPE, examples
from fope_jax.position.base import ModelShape, PositionEmbedding
from fope_jax.position.registry import METHODS, SCALINGS


class Entry(NamedTuple):
    """A method or a scaling in words."""

    name: str  # in METHODS or SCALINGS
    kind: str  # the method's kind, or "scaling"
    knobs: list[str]  # "name=default", or "name" where it is required
    learnable: str  # "no", "always", "with learnable=True" or "as its methods"
    extends: str  # behaviour beyond the training length; empty for a scaling
    about: str  # one sentence
    source: str  # reference


def method_entries() -> list[Entry]:
    """One entry per method, in the order of ``METHODS``.

    >>> {entry.name: entry.learnable for entry in method_entries()}["learned"]
    'always'
    """
    first = {type(method): method for method in reversed(examples().values())}
    entries = []
    for name, cls in METHODS.items():
        trains = learnable(first[cls]) if cls in first else ""
        fields = (cls.kind, knobs(cls), trains, cls.extends, about(cls), source(cls))
        entries.append(Entry(name, *fields))
    return entries


def scaling_entries() -> list[Entry]:
    """One entry per scaling, in the order of ``SCALINGS``.

    >>> {entry.name: entry.knobs for entry in scaling_entries()}["clip_floor"]
    ['training_length', 'ratio=1']
    """
    return [
        Entry(name, "scaling", knobs(cls), "no", "", about(cls), source(cls))
        for name, cls in SCALINGS.items()
    ]


def knobs(cls: Any) -> list[str]:
    """The fields of a dataclass with their defaults.

    >>> from fope_jax.position.xpos import XPos
    >>> knobs(XPos)
    ['theta=10000', 'scale_base=512', 'gamma=0.4', 'interleaved=False']
    """
    shown = []
    for field in dataclasses.fields(cls):
        default = field.default
        value = f"{default:g}" if isinstance(default, float) else repr(default)
        shown.append(field.name if default is dataclasses.MISSING else f"{field.name}={value}")
    return shown


def learnable(method: PositionEmbedding, shape: ModelShape = SHAPE) -> str:
    """Whether ``init`` draws parameters; see ``Entry``.

    >>> learnable(examples()["fope"])
    'with learnable=True'
    """

    def has_parameters(method: PositionEmbedding) -> bool:
        drawn = jax.eval_shape(lambda: method.init(jax.random.key(0), shape))
        return bool(drawn.model_params or drawn.layer_params)

    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    parts = [
        v for value in values.values() for v in (value if isinstance(value, tuple) else [value])
    ]
    holds_methods = any(isinstance(part, PositionEmbedding) for part in parts)
    if method.kind == "composition" and holds_methods:
        return "as its methods"
    if has_parameters(method):
        return "always"
    changed: Any = dataclasses.replace
    if "learnable" in values and has_parameters(changed(method, learnable=True)):
        return "with learnable=True"
    return "no"


def about(cls: type) -> str:
    """The docstring's first paragraph, without the full stop.

    >>> about(METHODS["alibi"])
    'Attention with linear biases: distant keys are penalised, each head at its own rate'
    """
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")


def source(cls: type) -> str:
    """The docstring's reference, or the nearest base class's.

    >>> source(METHODS["alibi"])
    'Press et al. 2022, "Train Short, Test Long", Section 3'
    """
    docstrings = [base.__doc__ or "" for base in cls.__mro__]
    texts = [text.partition("Reference:")[2].partition("\n\n")[0] for text in docstrings]
    return " ".join(next(filter(None, texts), "").split()).removesuffix(".")
