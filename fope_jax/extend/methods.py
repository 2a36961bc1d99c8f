"""Which position embedding a trained model can continue with, and which not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fope_jax.extend.coefficients import check_table_length
from fope_jax.extend.frequencies import frequency_changes, unwrapped
from fope_jax.position.absolute import Learned
from fope_jax.position.base import NoPE, PositionEmbedding
from fope_jax.position.checks import nearest
from fope_jax.position.drope import DroPE
from fope_jax.position.fope import FoPE
from fope_jax.position.logit_scaling import LogitScaling
from fope_jax.position.mixing import Wrapper
from fope_jax.position.registry import (
    METHODS,
    SCALINGS,
    field_knobs,
    find_class,
    name_of,
    required_knobs,
)
from fope_jax.position.rope import RoPE
from fope_jax.position.scaling import ClipFloor, PRoPE, Proportional, Scaling
from fope_jax.position.xpos import XPos

SAME, INNER = "same", "inner"
ALIASES = {"pi": "position_interpolation", "clip": "clip_floor"}

# FoPE after RoPE without a preset. On SmolLM2-135M the released form raises the loss of the first
# 2,048 tokens from 3.61 to 6.45 nats before any update, this one to 3.77.
LEAST_CHANGE = {"zero_sine": 0.0, "outputs": "surviving"}

# Knobs of a scaling that a length gives, and the factors that a search found for one length.
_OF_LENGTH = ("factor", "original_length", "training_length", "length", "long_factor")

# Why a model of one kind cannot continue with a method of another kind.
_LACKS = {
    "none": "attention was never trained with rotation: its queries and keys hold no phase",
    "rotation": "attention was trained with rotation: its queries and keys hold phases",
    "bias": "attention was never trained with rotation: a bias ordered its scores",
    "contextual": "attention was never trained with rotation: it counts positions from its scores",
    "absolute": "positions stand in the token embeddings, which attention learned to read",
    "composition": "it is made of several methods: extend it as it is",
}


def target_classes(
    parent: PositionEmbedding, target: str
) -> tuple[type[PositionEmbedding], type[Scaling] | None]:
    """The method class that ``target`` means for ``parent``, and the scaling class it adds, if any.

    ``target`` is ``same``, the name of a method or scaling, ``MODULE:CLASS`` of an imported module,
    ``pi``, ``clip`` or ``inner``:

    | parent | target |
    |---|---|
    | any | ``same``; a wrapper, such as ``sliding_window``, if it can hold the parent |
    | any | a method that is not of this package and has the parent's ``kind`` |
    | RoPE, FoPE | a scaling, ``nope``, ``drope``; RoPE also ``fope`` |
    | NoPE, DroPE | each other |
    | a wrapper | ``inner``: without it; any other target changes what is inside |

    Raises:
      ValueError: an unknown name, or a target that cannot follow the parent; says why.

    >>> [cls.__name__ for cls in target_classes(RoPE(), "pi")]
    ['RoPE', 'PositionInterpolation']
    """
    name = ALIASES.get(target, target)
    if name not in (known := _known_names()) and not named_module(name):
        method, colon, _ = name.partition(":")
        if colon and method in known:
            raise ValueError(f"method {target!r}: give knobs as --config.position.KNOB=VALUE")
        raise ValueError(f"unknown method {target!r}{nearest(target, known)}")
    classes = _find_classes(parent, name)
    if classes is None:
        raise ValueError(f"{name_of(unwrapped(parent))} to {target}: {_refusal(parent, name)}")
    return classes


def named_module(target: str) -> str:
    """The module of a target ``MODULE:CLASS``; "" for other targets.

    >>> named_module("my_methods:LogDistance"), named_module("yarn"), named_module("yarn:factor=4")
    ('my_methods', '', '')
    """
    module, _, name = target.partition(":")
    is_class = name and "=" not in name and module not in _known_names()
    return module if is_class else ""


def is_own(cls: type) -> bool:
    """Whether a method or scaling is the user's own; only it knows what it does to a model."""
    return not cls.__module__.startswith("fope_jax.")


def _known_names() -> list[str]:
    return [SAME, INNER, *METHODS, *SCALINGS, *ALIASES]


def _named_classes(name: str) -> tuple[type[PositionEmbedding] | None, type[Scaling] | None]:
    """The method class or the scaling class of a name; none for ``same`` and ``inner``."""
    if not named_module(name):
        return METHODS.get(name), SCALINGS.get(name)
    try:
        return find_class("method", name), None
    except ValueError as error:
        try:
            return None, find_class("scaling", name)
        except ValueError:
            raise error from None


def _find_classes(
    parent: PositionEmbedding, name: str
) -> tuple[type[PositionEmbedding], type[Scaling] | None] | None:
    """`target_classes` of a known name; None where it cannot follow."""
    (cls, scaling), is_rotary = _named_classes(name), isinstance(parent, (RoPE, FoPE))
    if name == SAME or cls is type(parent):
        return type(parent), None
    if cls is not None and issubclass(cls, Wrapper):
        return cls, None
    if isinstance(parent, Wrapper):
        return (type(parent.inner), None) if name == INNER else _find_classes(parent.inner, name)
    if is_rotary and scaling is not None:
        return type(parent), scaling
    if cls is not None and is_own(cls) and cls.kind == parent.kind:
        return cls, None
    if cls in (NoPE, DroPE) and (is_rotary or type(parent) in (NoPE, DroPE)):
        return cls, None
    if isinstance(parent, RoPE) and cls is FoPE and not _unknown_to_fope(parent):
        return FoPE, None
    return None


def _unknown_to_fope(parent: RoPE) -> str:
    """What of the parent FoPE cannot go on with, in words; "" if there is nothing."""
    if type(parent).frequencies is not RoPE.frequencies:
        return (
            f"{type(parent).__name__} has frequencies of its own, in place of which FoPE would mix "
            "those of rope"
        )
    known = {"interleaved": False, "partial_rotary_factor": 1.0, "learnable": False}
    for knob, value in known.items():
        if (given := getattr(parent, knob)) != value:
            return (
                f"the parent has {knob}={given}, which FoPE does not know; it follows from rope "
                f"with {knob}={value}"
            )
    return ""


def _refusal(parent: PositionEmbedding, name: str) -> str:
    """Why what ``name`` means cannot follow the parent, and what can."""
    parent, (cls, _) = unwrapped(parent), _named_classes(name)
    if isinstance(parent, RoPE) and cls is FoPE:
        return _unknown_to_fope(parent)
    if name == INNER:
        reason = "nothing stands inside it, as in a sliding window or logit scaling"
    elif isinstance(parent, FoPE) and name == "rope":
        reason = (
            "its zero-frequency pairs were never trained with rotation; scale what it has "
            "(yarn, pi, ntk, ...) or drop it (nope, drope)"
        )
    else:
        reason = _LACKS[parent.kind]
        if parent.kind == "rotation" and cls is not None and cls.kind != "rotation":
            reason += f", and {name} was never part of what it learned"
        if cls is not None and is_own(cls):
            kinds = f"{parent.kind!r}, that of {name} {cls.kind!r}"
            reason += f"; a method of your own follows one of its kind: the parent's is {kinds}"
    follows = [x for x in (*METHODS, *SCALINGS) if _find_classes(parent, x) is not None]
    around = [x for x in follows if x in METHODS and issubclass(METHODS[x], Wrapper)]
    accepted = [SAME, *(x for x in follows if x not in around)]
    return f"{reason}; accepted: {', '.join(accepted)}; around it, if it fits, {', '.join(around)}"


class MissingKnobError(ValueError):
    """Knobs that no length gives were not stated.

    Attributes:
      what: the message without how to state them.
      names: of the knobs.
    """

    def __init__(self, what: str, names: Sequence[str]):
        flags = " ".join(f"--config.position.{name}=VALUE" for name in names)
        super().__init__(f"{what}: {flags}")
        self.what, self.names = what, names


def check_knobs(parent: PositionEmbedding, target: str, names: Iterable[str]) -> None:
    """Raises ValueError for a knob that neither the scaling nor the method of ``target`` has."""
    cls, scaling = target_classes(parent, target)
    known = [] if scaling is None else list(field_knobs(scaling))
    known += [name for name in field_knobs(cls) if name not in known]
    for name in names:
        if name not in known and name != "preset":
            owner = cls.__name__ if target in (SAME, INNER) else target
            raise ValueError(f"unknown knob {name!r} of {owner}{nearest(name, known)}")


def extend_position(
    parent: PositionEmbedding,
    target: str,
    *,
    from_length: int,
    length: int,
    head_dim: int,
    knobs: Mapping[str, Any] | None = None,
    allow_shorter: bool = False,
    made_for: int | None = None,
    positions: int | None = None,
) -> PositionEmbedding:
    """The position embedding with which ``parent`` continues at ``length`` tokens.

    A scaling gets the factor s = length / L, with L the ``positions`` before any stretch. It
    replaces an earlier stretch and keeps its L: RoPE at 128, then YaRN to 256, then YaRN to 512
    gives s = 4. ``fope`` and ``clip`` set the floor at the new length; FoPE after RoPE has
    ``LEAST_CHANGE``, or the knob ``preset``. A scaled FoPE has no YaRN temperature, as in the
    released code. ``learned`` makes the table ``length`` long. ``drope`` and ``logit_scaling`` act
    beyond ``from_length``. All other knobs, also those of a scaling of the same class, are the
    parent's; a method that is not of this package has those of the same names.

    Args:
      parent: the method the model was trained with, on ``from_length`` tokens.
      target: see ``target_classes``.
      knobs: override derived knobs, of the scaling if it has the knob, else of the method.
      allow_shorter: for a length below ``from_length``, or a change at that length.
      made_for: the length of the parent's own stretch, where it was not trained on that; None means
        ``positions``.
      positions: those that the parent was trained at, where they were drawn from a longer range
        (``train.position_range``); None means ``from_length``.

    Raises:
      ValueError: see ``target_classes``; ``length`` is below ``from_length``, or equal to it while
        the target changes the method (except ``drope``), without ``allow_shorter``; a knob is
        unknown, missing or out of range.

    >>> extend_position(RoPE(), "ntk", from_length=128, length=512, head_dim=64).scaling
    (NTKAware(factor=4.0),)
    >>> extend_position(FoPE(128), "fope", from_length=128, length=512, head_dim=64).training_length
    512

    Reference: Hua et al. 2025 (FoPE), Section 5.3, for FoPE after RoPE, FoPE after FoPE and YaRN.
    """
    if length < from_length and not allow_shorter:
        raise ValueError(
            f"length={length}: shorter than the {from_length} tokens the parent was trained on; "
            "where that is meant: --allow-shorter"
        )
    check_knobs(parent, target, knobs or {})
    positions = positions or from_length
    lengths = _Lengths(from_length, positions, made_for or positions, length)
    child = _continue(parent, target, lengths, head_dim, dict(knobs or {}))
    before, after = unwrapped(parent), unwrapped(child)
    if isinstance(before, Learned) and isinstance(after, Learned):
        check_table_length(after.table_length, min(lengths.table, before.table_length))
    _check_limit(child, length)
    may_change = allow_shorter or length > from_length or target == "drope"
    if not may_change and not _is_identity(parent, child, head_dim):
        raise ValueError(
            f"length={length}: not longer than the {from_length} tokens the parent was trained on, "
            f"and {target} would change its position embedding from {parent} to {child}; only a "
            f"change that is none, such as {SAME}, keeps the length. Where it is meant: "
            "--allow-shorter, or --no-train to measure it without training"
        )
    return child


def _check_limit(child: PositionEmbedding, length: int) -> None:
    """Raises ValueError, with the knob that moves the limit, for more tokens than it holds."""
    longest, method = child.limits.max_length, unwrapped(child)
    if longest is None or length <= longest:
        return
    if isinstance(method, Learned):
        raise ValueError(
            f"table_length={longest}: the learned table ends before length={length}; "
            f"method 'learned' without the knob interpolates it to {length} positions"
        )
    if isinstance(method, XPos):
        enough = math.ceil(method.scale_base * length / longest)
        raise ValueError(
            f"scale_base={method.scale_base:g}: float32 holds xPos to {longest} tokens, which end "
            f"before length={length}; a slower decay, --config.position.scale_base={enough} or "
            "more, moves the end and changes what the model learned"
        )
    raise ValueError(
        f"length={length}: {name_of(child)} is defined for at most {longest} tokens; accepted: a "
        "length up to there"
    )


class _Lengths(NamedTuple):
    """Tokens and positions trained on, tokens that a stretch is made for, and the child's."""

    trained: int
    positions: int
    made_for: int
    new: int

    @property
    def table(self) -> int:
        """Rows of a learned table that are trained, or lie between such."""
        return max(self.positions, self.made_for)


def _continue(
    parent: PositionEmbedding, target: str, lengths: _Lengths, head_dim: int, knobs: dict[str, Any]
) -> PositionEmbedding:
    cls, scaling_cls = target_classes(parent, target)
    is_kept = target == SAME or _named_classes(target)[0] is type(parent)
    if isinstance(parent, Wrapper) and not is_kept:
        if target == INNER:
            return _build(parent.inner, cls, {}, knobs)
        if not issubclass(cls, Wrapper):
            inner = _continue(parent.inner, target, lengths, head_dim, knobs)
            return dataclasses.replace(parent, inner=inner)
    changes: dict[str, Any] = {}
    if scaling_cls is not None:
        names = {field.name for field in dataclasses.fields(scaling_cls)}
        stated = {name: knobs.pop(name) for name in list(knobs) if name in names}
        changes["scaling"] = _extend_scaling(parent, scaling_cls, lengths, head_dim, stated)
    if target != SAME and cls is FoPE:
        changes["training_length"] = lengths.new
    if target != SAME and cls is Learned and lengths.new > lengths.table:
        changes["table_length"] = lengths.new
    is_new = cls is not type(parent)
    if is_new and (cls is DroPE or (cls is LogitScaling and knobs.get("form") != "yarn")):
        changes["training_length"] = lengths.trained
    if is_new and issubclass(cls, Wrapper):
        changes["inner"] = parent
    elif is_new and is_own(cls):
        shared = [name for name in field_knobs(cls) if name in field_knobs(type(parent))]
        changes |= {name: getattr(parent, name) for name in shared}
    missing = [name for name in required_knobs(cls) if name not in changes | knobs]
    if is_new and missing and (is_own(cls) or issubclass(cls, Wrapper)):
        what = f"{target} needs {', '.join(missing)}, which no length gives"
        raise MissingKnobError(what, missing)
    return _build(parent, cls, changes, knobs)


def _build(
    parent: PositionEmbedding, cls: type, changes: dict[str, Any], knobs: dict[str, Any]
) -> PositionEmbedding:
    preset = knobs.pop("preset", None)
    if cls is type(parent):
        if preset is not None:
            raise ValueError(
                f"preset={preset!r}: the parent's {cls.__name__} has its knobs already"
            )
        return dataclasses.replace(parent, **changes | knobs)
    if isinstance(parent, RoPE) and cls is FoPE:
        kept = tuple(step for step in parent.scaling if not isinstance(step, ClipFloor))
        presets = {"official": FoPE.official, "equations": FoPE.equations}
        if preset is not None and preset not in presets:
            raise ValueError(f"preset={preset!r}: expected official or equations")
        form = LEAST_CHANGE if preset is None else {}
        given = {"theta": parent.theta, "scaling": kept} | form | changes | knobs
        make = FoPE if preset is None else presets[preset]
        return make(**given)
    if preset is not None:
        raise ValueError(f"preset={preset!r}: {cls.__name__} after {name_of(parent)} has none")
    return cls(**changes | knobs)


def _extend_scaling(
    parent: Any, cls: type[Scaling], lengths: _Lengths, head_dim: int, stated: dict[str, Any]
) -> tuple[Scaling, ...]:
    """The parent's scalings, with one of ``cls``; see ``_with_step``."""
    # The length that the unstretched frequencies were trained on, and the factor of the stretch.
    length, original, stretched = lengths.new, lengths.positions, 1.0
    if (stretch := next((step for step in parent.scaling if step.stretches), None)) is not None:
        stretched = getattr(stretch, "factor", 1.0)
        original = getattr(stretch, "original_length", None) or lengths.made_for / stretched
    num_pairs = (parent.rotary_dim(head_dim) if isinstance(parent, RoPE) else head_dim) // 2
    fields = dataclasses.fields(cls)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    known: dict[str, Any] = {
        "factor": length / original,
        "original_length": round(original),
        "training_length": length,
        "length": length,
        "short_factor": (1.0,) * num_pairs,
    }
    previous: Any = next((step for step in parent.scaling if type(step) is cls), None)
    kept = [f.name for f in fields if previous and f.name not in _OF_LENGTH]
    if isinstance(parent, FoPE):
        known["attention_factor"] = 1.0
    known |= {name: getattr(previous, name) for name in kept}
    if previous and known.get("attention_factor") is not None and "attention_factor" in kept:
        implied = dataclasses.replace(previous, attention_factor=None).effective_attention_factor
        if math.isclose(previous.attention_factor, implied, rel_tol=1e-6):
            known["attention_factor"] = None  # follows from the new factor
    known = {field.name: known[field.name] for field in fields if field.name in known} | stated
    for name in needed:
        if name not in known:
            searched = (
                f" (a divisor for each of the {num_pairs} frequencies, found by search; a "
                "checkpoint of Hugging Face has them in its rope_parameters)"
            )
            raise MissingKnobError(
                f"{cls.__name__} needs the knob {name!r}, which no length gives"
                f"{searched if name == 'long_factor' else ''}",
                [name],
            )
    stretches = cls.stretches and "factor" in known and "factor" not in stated
    if stretches and known["factor"] < 1:
        raise ValueError(
            f"length={length}: shorter than the {round(original)} tokens before any stretch, so it "
            "says nothing of one; state it: --config.position.factor=2"
        )
    if stretches and known["factor"] < stretched:
        raise ValueError(
            f"length={length}: the parent stretches its {round(original)} tokens by {stretched:g} "
            f"already, more than to {length}; give a factor, or keep the scaling with {SAME}"
        )
    return _with_step(parent.scaling, cls(**known))


def _with_step(chain: tuple[Scaling, ...], new: Scaling) -> tuple[Scaling, ...]:
    """The chain with ``new`` in place of its class or of an earlier stretch, else at its end.

    Order matters: a floor zeroes the frequencies as they are where it stands. A stretch with p-RoPE
    in it leaves that behind, because its pairs were never trained with rotation.
    """
    steps: list[Scaling] = []
    for step in chain:
        if type(step) is not type(new) and not (step.stretches and new.stretches):
            steps.append(step)
            continue
        if isinstance(step, Proportional) and not isinstance(new, Proportional):
            steps.append(PRoPE(step.share))
        steps.append(new)
    return tuple(steps) if new in steps else (*steps, new)


def _is_identity(parent: PositionEmbedding, child: PositionEmbedding, head_dim: int) -> bool:
    """Whether child and parent are equal up to rounding of frequencies."""
    if not (isinstance(parent, (RoPE, FoPE)) and isinstance(child, (RoPE, FoPE))):
        return parent == child
    changes = frequency_changes(parent, child, head_dim)
    if changes is None or dataclasses.replace(child, scaling=parent.scaling) != parent:
        return False
    before, after = changes.attention_factor
    return changes.kept + changes.still == changes.pairs and before == after


def fope_form(parent: PositionEmbedding, child: PositionEmbedding) -> str:
    """Which FoPE follows RoPE, for the log; "" where the change is another."""
    parent, child = unwrapped(parent), unwrapped(child)
    if not (isinstance(parent, RoPE) and isinstance(child, FoPE)):
        return ""
    knobs = ", ".join(f"{name}={getattr(child, name)!r}" for name in LEAST_CHANGE)
    if any(getattr(child, name) != value for name, value in LEAST_CHANGE.items()):
        return f"FoPE with {knobs}, as stated"
    return (
        f"FoPE in the form that changes the parent least: {knobs}. As the released code has it: "
        "--config.position.preset=official"
    )
