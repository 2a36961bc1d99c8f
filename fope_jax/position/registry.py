"""The registry: names of methods and scalings, and their specifications in configs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fope_jax.logs import users_line
from fope_jax.position import scaling as scalings
from fope_jax.position.absolute import Learned, Sinusoidal
from fope_jax.position.alibi import ALiBi
from fope_jax.position.base import NoPE, PositionEmbedding
from fope_jax.position.checks import OTHER_NAMES, find, nearest
from fope_jax.position.contextual import CoPE
from fope_jax.position.dape import DAPE
from fope_jax.position.drope import DroPE
from fope_jax.position.fope import FoPE
from fope_jax.position.forgetting import Cable, FoX
from fope_jax.position.layer_patterns import LAYER_PATTERNS
from fope_jax.position.logit_scaling import LogitScaling
from fope_jax.position.mixing import ByLayer, ByShare
from fope_jax.position.pope import PoPE
from fope_jax.position.relative_bias import FIRE, Kerple, T5Bias
from fope_jax.position.rope import RoPE
from fope_jax.position.sandwich import Sandwich
from fope_jax.position.scaling import Scaling
from fope_jax.position.self_extend import ReRoPE, SelfExtend
from fope_jax.position.windows import LocalChunks, SlidingWindow
from fope_jax.position.xpos import XPos

METHODS: dict[str, type[PositionEmbedding]] = {
    "nope": NoPE,
    "drope": DroPE,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rope": RoPE,
    "xpos": XPos,
    "fope": FoPE,
    "alibi": ALiBi,
    "t5": T5Bias,
    "kerple": Kerple,
    "fire": FIRE,
    "sandwich": Sandwich,
    "cope": CoPE,
    "dape": DAPE,
    "pope": PoPE,
    "fox": FoX,
    "cable": Cable,
    "by_layer": ByLayer,
    "by_share": ByShare,
    "logit_scaling": LogitScaling,
    "sliding_window": SlidingWindow,
    "local_chunks": LocalChunks,
    "self_extend": SelfExtend,
    "rerope": ReRoPE,
}

# A preset's function takes knobs of the method, or its own.
PRESETS: dict[tuple[str, str], Callable[..., PositionEmbedding]] = {
    ("fope", "official"): FoPE.official,
    ("fope", "equations"): FoPE.equations,
    **{("by_layer", name): pattern for name, pattern in LAYER_PATTERNS.items()},
}

SCALINGS: dict[str, type[Scaling]] = {
    "position_interpolation": scalings.PositionInterpolation,
    "ntk": scalings.NTKAware,
    "dynamic_ntk": scalings.DynamicNTK,
    "yarn": scalings.YaRN,
    "llama3": scalings.Llama3,
    "longrope": scalings.LongRoPE,
    "proportional": scalings.Proportional,
    "adjusted_base": scalings.AdjustedBase,
    "clip_floor": scalings.ClipFloor,
    "snap_to_cycles": scalings.SnapToCycles,
    "p_rope": scalings.PRoPE,
}

# Values of knobs that hold methods, for the error where one is missing.
EXAMPLES = {"inner": {"method": "rope"}, "methods": [{"method": "rope"}, {"method": "nope"}]}

_REGISTRIES: dict[str, dict[str, type]] = {"method": METHODS, "scaling": SCALINGS}
_BASES: dict[str, type] = {"method": PositionEmbedding, "scaling": Scaling}


def register(name: str) -> Callable[[type], type]:
    """A decorator that names a user's method or scaling for configurations.

    The name, such as ``"my_rope"``, must be a free identifier, else ValueError; the class a frozen
    dataclass derived from ``PositionEmbedding`` or ``Scaling``, else TypeError. A name is known
    once its module is imported; a run stores the class as ``module:Class``.
    """

    def decorate(cls: type) -> type:
        key = "scaling" if isinstance(cls, type) and issubclass(cls, Scaling) else "method"
        _check_class(name, cls, key)
        known = _REGISTRIES[key]
        if not name.isidentifier():
            raise ValueError(f"{key} {name!r}: expected letters, digits and underscores")
        taken = known.get(name, cls)
        if spec_name(taken) != spec_name(cls):  # a reloaded module registers again
            raise ValueError(f"{key} {name!r} is taken by {spec_name(taken)}; choose another name")
        known[name] = cls
        return cls

    return decorate


def find_class(key: str, name: str, allow: Collection[str] | None = ()) -> type:
    """The class of a method or a scaling, registered or named ``their_package.module:Class``.

    ``key`` is ``method`` or ``scaling``. Only modules in ``allow``, with their submodules, are
    imported (None: any); modules imported earlier need no permission. Raises ValueError for an
    unknown name (with the nearest known one), a forbidden or failing import, or a missing class.
    """
    if not isinstance(name, str):
        example = {"method": "rope", "scaling": "yarn"}[key]
        raise ValueError(f"{key} = {name!r}; accepted: a name such as {example!r}")
    module, colon, path = name.partition(":")
    scaling = name if name in SCALINGS else OTHER_NAMES.get(name)
    if key == "method" and name not in METHODS and scaling in SCALINGS:
        knobs = "".join(f", {knob!r}: .." for knob in required_knobs(SCALINGS[scaling]))
        raise ValueError(
            f"{name!r} is a scaling of the frequencies of a method such as 'rope', whose knob "
            f"scaling takes it: [{{'scaling': {scaling!r}{knobs}}}]"
        )
    if not colon:
        kind = {"method": "position embedding", "scaling": "scaling"}[key]
        return find(kind, name, _REGISTRIES[key])
    if module not in sys.modules:
        within = (module == allowed or module.startswith(f"{allowed}.") for allowed in allow or ())
        if allow is not None and not any(within):
            raise ValueError(
                f"{key} {name!r} is in the Python module {module!r}, whose code would run when it "
                f"is imported; allow it with --allow-module {module} if you trust it"
                f" (in Python: import {module})"
            )
        import_module(module)
    cls: Any = sys.modules[module]
    for name_in_module in path.split("."):
        cls = getattr(cls, name_in_module, None)
    if cls is None:
        raise ValueError(f"{key} {name!r}: the module {module!r} has no {path!r}")
    try:
        _check_class(name, cls, key)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return cls


def import_module(module: str) -> None:
    """Imports a module with methods; ValueError if it is not found or raises."""
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        advice = "; install it, or put its directory on PYTHONPATH"
        if not isinstance(error, ModuleNotFoundError):
            advice = users_line(error)
        raise ValueError(
            f"the Python module {module!r} cannot be imported: {reason}{advice}"
        ) from error


def import_modules(spec: Any) -> None:
    """Imports the modules that a trusted specification names; raises as ``import_module``.

    >>> import_modules({"method": "fope_jax.position.rope:RoPE"})
    """
    for module in named_modules(spec):
        import_module(module)


def named_modules(spec: Any) -> list[str]:
    """The modules that a specification names, outermost first.

    >>> named_modules({"method": "by_layer", "methods": [{"method": "a.b:C"}, {"method": "rope"}]})
    ['a.b']
    """
    if isinstance(spec, (list, tuple)):
        return [module for item in spec for module in named_modules(item)]
    if not isinstance(spec, Mapping):
        return []
    _, name, knobs = split_spec(spec)
    module, colon, _ = str(name).partition(":")
    return [module] * bool(colon) + named_modules(list(knobs.values()))


def _check_class(name: str, cls: Any, key: str) -> None:
    base = _BASES[key]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{key} {name!r}: {cls!r} is no class of {base.__name__}")
    # vars: an undecorated subclass inherits the parameters, and its new fields would be no knobs.
    if "__dataclass_params__" not in vars(cls) or cls.__hash__ is None:
        raise TypeError(f"{key} {name!r}: {cls.__name__} is no @dataclass(frozen=True)")
    # The last two are arguments of ``make``, beside the knobs.
    for taken in ("method", "preset" if key == "method" else "scaling", "name", "allow"):
        if taken in field_knobs(cls):
            raise TypeError(
                f"{key} {name!r}: {cls.__name__} has a knob {taken!r}, which is a specification's "
                "own word; call it otherwise"
            )


def make(
    name: str, *, preset: str | None = None, allow: Collection[str] | None = (), **knobs: Any
) -> PositionEmbedding:
    """Builds a method from its name and knobs, as configs do.

    Args:
      name: a key of ``METHODS``, or ``their_package.module:Class``.
      preset: a named set of knobs (FoPE: ``official``, ``equations``) or pattern of layers
        (``layer_patterns``), which has knobs of its own; None takes the defaults.
      allow: see ``find_class``.
      **knobs: override the preset; nested methods and scalings may be specifications.

    Raises ValueError for an unknown name, preset or knob (with the nearest known one), a missing
    knob, or a value out of range.

    >>> make("rope", theta=500_000.0).theta
    500000.0
    >>> make("rope", scaling=[{"scaling": "position_interpolation", "factor": 2.0}]).scaling
    (PositionInterpolation(factor=2.0),)
    >>> len(make("by_layer", preset="gemma3", num_layers=26).methods)
    26
    """
    cls = find_class("method", name, allow)
    if preset is None:
        return cls(**_build_knobs(name, field_knobs(cls), knobs, allow))
    owner = f"{name} with preset {preset!r}" if preset_knobs(name, preset) else name
    known = preset_knobs(name, preset) or field_knobs(cls)
    return PRESETS[name, preset](**_build_knobs(owner, known, knobs, allow))


def preset_knobs(name: str, preset: str) -> dict[str, bool]:
    """The knobs of a preset's own, and whether each is required; empty if it has the method's.

    Raises ValueError for an unknown preset, with the nearest known one.

    >>> preset_knobs("by_layer", "smollm3")
    {'num_layers': False, 'theta': False}
    """
    presets = [known for owner, known in PRESETS if owner == name]
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r} of {name}{nearest(preset, presets)}")
    parameters = inspect.signature(PRESETS[name, preset]).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {}
    return {knob.name: knob.default is knob.empty for knob in parameters}


def make_scaling(name: str, *, allow: Collection[str] | None = (), **knobs: Any) -> Scaling:
    """Builds a scaling from its name and knobs; raises as ``make``.

    >>> make_scaling("ntk", factor=4.0)
    NTKAware(factor=4.0)
    """
    cls = find_class("scaling", name, allow)
    return cls(**_build_knobs(name, field_knobs(cls), knobs, allow))


def _build_knobs(
    name: str, known: Mapping[str, bool], knobs: Mapping[str, Any], allow: Collection[str] | None
) -> dict[str, Any]:
    """Checks the names of the knobs against those known and builds nested specifications."""
    for knob in knobs:
        if knob not in known:
            raise ValueError(f"unknown knob {knob!r} of {name}{nearest(knob, known)}")
    for knob, is_required in known.items():
        if is_required and knob not in knobs:
            example = f", such as {EXAMPLES[knob]}" if knob in EXAMPLES else ""
            raise ValueError(f"{name} needs the knob {knob!r}{example}")
    return {knob: from_spec(value, allow) for knob, value in knobs.items()}


def required_knobs(cls: Any) -> list[str]:
    """The fields without a default."""
    return [name for name, is_required in field_knobs(cls).items() if is_required]


def field_knobs(cls: Any) -> dict[str, bool]:
    """The fields of a method or scaling, and whether each is required.

    >>> field_knobs(ByLayer)
    {'methods': True}
    """
    return {
        field.name: field.default is field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(cls)
        if field.init
    }


def from_spec(value: Any, allow: Collection[str] | None = ()) -> Any:
    """Builds the methods and scalings in a configuration's values; inverts ``to_spec``.

    A mapping with ``method`` becomes a method, one with a ``scaling`` name a scaling, a list a
    tuple; other values are kept. For ``allow`` see ``find_class``.

    >>> from_spec({"method": "by_layer", "methods": [{"method": "rope"}, {"method": "nope"}]})
    ... # doctest: +ELLIPSIS
    ByLayer(methods=(RoPE(...), NoPE()))
    """
    if isinstance(value, Mapping):
        key, name, knobs = split_spec(value)
        if name is None:
            raise ValueError(
                f"{dict(value)}: expected 'method', or 'scaling' with the name of a scaling"
            )
        return (make if key == "method" else make_scaling)(name, allow=allow, **knobs)
    if isinstance(value, (list, tuple)):
        return tuple(from_spec(item, allow) for item in value)
    return value


def split_spec(spec: Any) -> tuple[str, Any, dict[str, Any]]:
    """``method`` or ``scaling``, its name (None if absent) and the knobs.

    >>> split_spec({"scaling": "ntk", "factor": 4.0})
    ('scaling', 'ntk', {'factor': 4.0})
    """
    knobs = dict(spec)
    # A method also has a knob ``scaling``, a list.
    scaling = "method" not in knobs and isinstance(knobs.get("scaling"), str)
    key = "scaling" if scaling else "method"
    return key, knobs.pop(key, None), knobs


def to_spec(value: Any) -> Any:
    """The inverse of ``from_spec``, in JSON types only.

    >>> to_spec(RoPE(scaling=(scalings.PositionInterpolation(2.0),)))["scaling"]
    [{'scaling': 'position_interpolation', 'factor': 2.0}]
    """
    if isinstance(value, (PositionEmbedding, Scaling)):
        key = "scaling" if isinstance(value, Scaling) else "method"
        fields: Any = dataclasses.fields(value)  # type: ignore[arg-type]
        knobs = {f.name: to_spec(getattr(value, f.name)) for f in fields if f.init}
        return {key: spec_name(type(value))} | knobs
    if isinstance(value, (list, tuple)):
        return [to_spec(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value  # NumPy and JAX


def spec_name(cls: type) -> str:
    """The name of a class in a specification: registered if ours, else ``module:Class``."""
    is_ours = cls.__module__.startswith("fope_jax.")
    return (_registered_name(cls) if is_ours else None) or f"{cls.__module__}:{cls.__qualname__}"


def _registered_name(cls: type) -> str | None:
    named = (pair for known in _REGISTRIES.values() for pair in known.items())
    return next((name for name, known in named if known is cls), None)


def name_of(method: PositionEmbedding | Scaling) -> str:
    """The registered name of a method's class, else ``module:Class``.

    >>> name_of(RoPE())
    'rope'
    """
    return _registered_name(type(method)) or spec_name(type(method))
