"""From a position embedding to the one that a trained model goes on with at a longer length.

Which changes make sense is decided here: a model can be told other frequencies for the phases its
attention knows, and a bias goes on as it is, but attention that was trained with biases has never
seen a phase. What becomes of the arrays is in ``transplant.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fope_jax.position.absolute import Learned
from fope_jax.position.base import NoPE, PositionEmbedding
from fope_jax.position.checks import nearest
from fope_jax.position.fope import FoPE
from fope_jax.position.rope import RoPE
from fope_jax.position.scaling import ClipFloor, RotaryFrequencies, Scaling, scaled_frequencies
from fope_jax.position.table import METHODS, SCALINGS, make_scaling, name_of

SAME = "same"
ALIASES = {"pi": "position_interpolation", "clip": "clip_floor"}

# Why a model of one kind cannot go on with a method of another.
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
    """The classes that ``target`` stands for, seen from ``parent``.

    Args:
      parent: what the model was trained with.
      target: ``same``, the name of a method, the name of a scaling, ``pi`` or ``clip``.

    Returns:
      The method's class, and the scaling's that it gets in addition, or None.

    Raises:
      ValueError: no such name (with the nearest), or a pair that makes no sense, with the reason.

    >>> [cls.__name__ for cls in target_classes(RoPE(), "pi")]
    ['RoPE', 'PositionInterpolation']
    """
    name = ALIASES.get(target, target)
    own = type(parent)
    if name == SAME or METHODS.get(name) is own:
        return own, None
    if name in SCALINGS:
        if isinstance(parent, (RoPE, FoPE)):
            return own, SCALINGS[name]
    elif name in METHODS:
        if isinstance(parent, RoPE) and METHODS[name] is FoPE:
            _check_rope_to_fope(parent)
            return FoPE, None
        if isinstance(parent, (RoPE, FoPE)) and METHODS[name] is NoPE:
            return NoPE, None
    else:
        known = [SAME, *METHODS, *SCALINGS, *ALIASES]
        raise ValueError(f"unknown method {target!r}{nearest(target, known)}")
    raise ValueError(f"{name_of(parent)} to {target}: {_reason(parent, name)}")


def _check_rope_to_fope(parent: RoPE) -> None:
    for knob, accepted in (
        ("interleaved", False),
        ("partial_rotary_factor", 1.0),
        ("learnable", False),
    ):
        value = getattr(parent, knob)
        if value != accepted:
            raise ValueError(
                f"rope to fope: the parent has {knob}={value}, which FoPE does not know; it "
                f"follows from rope with {knob}={accepted}"
            )


def _reason(parent: PositionEmbedding, name: str) -> str:
    if isinstance(parent, FoPE) and name == "rope":
        return (
            "its zero-frequency pairs were never trained with rotation; scale what it has "
            "(yarn, pi, ntk, ...) or drop it (nope)"
        )
    to_rotation = name in SCALINGS or METHODS[name].kind == "rotation"
    if parent.kind != "rotation" or to_rotation:
        why = _LACKS[parent.kind]
    else:
        why = f"{_LACKS['rotation']}, and {name} was never part of what it learned"
    return f"{why}; accepted: {SAME}, {name_of(parent)}"


def extend_position(
    parent: PositionEmbedding,
    target: str,
    *,
    from_length: int,
    length: int,
    head_dim: int,
    knobs: Mapping[str, Any] | None = None,
) -> PositionEmbedding:
    """The position embedding with which a model of ``parent`` goes on at ``length`` tokens.

    A scaling joins the frequencies: of ``factor`` s = length / L, with L the length that the
    frequencies without any stretch were trained on. It takes the place of a stretch that is there
    already, whose L it keeps: RoPE at 128, then YaRN to 256, then YaRN to 512 ends with s = 4. A
    scaling of the same class keeps the parent's other knobs, such as YaRN's ramp and a temperature
    left out; an ``attention_factor`` that states what the factor implies goes on to do so.
    ``fope`` puts the floor at the new length, as ``clip`` does; a scaled FoPE leaves YaRN's
    temperature out, as the released code does. ``learned`` makes the table ``length`` long.
    Everything else keeps the parent's knobs.

    Args:
      parent: what the model was trained with.
      target: see ``target_classes``.
      from_length: tokens the parent was trained on.
      length: tokens the model is to be trained on.
      head_dim: H.
      knobs: in place of those that follow from the lengths; of the scaling where it has the knob,
        else of the method.

    Raises:
      ValueError: see ``target_classes``; ``length`` is below ``from_length``, or equal to it for a
        change that is not none; a knob is unknown, missing or out of range.

    >>> extend_position(RoPE(), "ntk", from_length=128, length=512, head_dim=64).scaling
    (NTKAware(factor=4.0),)
    >>> extend_position(FoPE(128), "fope", from_length=128, length=512, head_dim=64).training_length
    512

    Reference: Hua et al. 2025 (FoPE), Section 5.3, for FoPE after RoPE, FoPE after FoPE and YaRN.
    """
    if length < from_length:
        raise ValueError(
            f"length={length}: shorter than the {from_length} tokens the parent was trained on"
        )
    cls, scaling_cls = target_classes(parent, target)
    knobs = dict(knobs or {})
    changes: dict[str, Any] = {}
    if scaling_cls is not None:
        own = {field.name for field in dataclasses.fields(scaling_cls)}
        given = {name: knobs.pop(name) for name in list(knobs) if name in own}
        changes["scaling"] = _with_scaling(
            parent, scaling_cls, from_length, length, head_dim, given
        )
    if target != SAME and cls is FoPE:
        changes["training_length"] = length
    if target != SAME and cls is Learned and length > from_length:
        changes["table_length"] = length
    child = _build(parent, cls, changes, knobs)
    longest = child.limits.max_length
    if longest is not None and longest < length:
        raise ValueError(
            f"table_length={longest}: the learned table ends before length={length}; "
            f"method 'learned' without the knob interpolates it to {length} positions"
        )
    if length == from_length and not _is_identity(parent, child, head_dim):
        raise ValueError(
            f"length={length}: not longer than the {from_length} tokens the parent was trained on, "
            f"and {target} would change its position embedding from {parent} to {child}; only a "
            f"change that is none, such as {SAME}, keeps the length"
        )
    return child


def _build(
    parent: PositionEmbedding, cls: type, changes: dict[str, Any], knobs: dict[str, Any]
) -> PositionEmbedding:
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    preset = knobs.pop("preset", None)
    for knob in knobs:
        if knob not in names:
            raise ValueError(f"unknown knob {knob!r} of {cls.__name__}{nearest(knob, names)}")
    if cls is type(parent):
        if preset is not None:
            raise ValueError(
                f"preset={preset!r}: the parent's {cls.__name__} has its knobs already"
            )
        return dataclasses.replace(parent, **changes | knobs)
    if isinstance(parent, RoPE) and cls is FoPE:
        kept = tuple(step for step in parent.scaling if not isinstance(step, ClipFloor))
        changes = {"theta": parent.theta, "scaling": kept} | changes
        presets = {None: FoPE, "official": FoPE.official, "equations": FoPE.equations}
        if preset not in presets:
            raise ValueError(f"preset={preset!r}: expected official or equations")
        return presets[preset](**changes | knobs)
    return cls(**changes | knobs)


def _with_scaling(
    parent: Any,
    cls: type[Scaling],
    from_length: int,
    length: int,
    head_dim: int,
    given: dict[str, Any],
) -> tuple[Scaling, ...]:
    original, before = _original_length(parent, from_length)
    rotary_dim = parent.rotary_dim(head_dim) if isinstance(parent, RoPE) else head_dim
    names = [field.name for field in dataclasses.fields(cls)]
    follows = {
        "factor": length / original,
        "original_length": round(original),
        "training_length": length,
        "length": length,
        "short_factor": (1.0,) * (rotary_dim // 2),
    }
    if isinstance(parent, FoPE):
        follows["attention_factor"] = 1.0
    kept_knobs = _same_class_knobs(parent, cls, {*follows} - {"attention_factor"})
    known = {name: value for name, value in follows.items() if name in names} | kept_knobs | given
    needed = [
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in known]
    if missing:
        searched = (
            f" (a divisor for each of the {rotary_dim // 2} frequencies, found by search; a "
            "checkpoint of Hugging Face has them in its rope_parameters)"
        )
        raise ValueError(
            f"{cls.__name__} needs the knob {missing[0]!r}, which no length gives"
            f"{searched if missing[0] == 'long_factor' else ''}: state it, on the command line as "
            f"--config.position.{missing[0]}=VALUE"
        )
    if cls.stretches and "factor" not in given and known["factor"] < before:
        raise ValueError(
            f"length={length}: the parent stretches its {round(original)} tokens by {before:g} "
            f"already, more than to {length}; give a factor, or keep the scaling with {SAME}"
        )
    step = make_scaling(next(n for n, known_cls in SCALINGS.items() if known_cls is cls), **known)
    kept = tuple(
        old for old in parent.scaling if not (type(old) is cls or (old.stretches and cls.stretches))
    )
    return (*kept, step)


def _same_class_knobs(parent: Any, cls: type[Scaling], follows: set[str]) -> dict[str, Any]:
    """The optional knobs of the parent's own ``cls``, but for those that follow from lengths."""
    step: Any = next((step for step in parent.scaling if type(step) is cls), None)
    if step is None:
        return {}
    optional = [f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
    knobs = {name: getattr(step, name) for name in optional if name not in follows}
    if knobs.get("attention_factor") is not None:
        implied = dataclasses.replace(step, attention_factor=None).effective_attention_factor
        if math.isclose(step.attention_factor, implied, rel_tol=1e-6):
            knobs["attention_factor"] = None  # the new factor implies another
    return knobs


def _original_length(parent: Any, from_length: int) -> tuple[float, float]:
    """The length that the frequencies without their stretch belong to, and the stretch's factor."""
    for step in parent.scaling:
        if step.stretches:
            return getattr(step, "original_length", None) or from_length / step.factor, step.factor
    return from_length, 1.0


def _is_identity(parent: PositionEmbedding, child: PositionEmbedding, head_dim: int) -> bool:
    """Whether the child does what the parent does, up to the rounding of frequencies."""
    if not (isinstance(parent, (RoPE, FoPE)) and isinstance(child, (RoPE, FoPE))):
        return parent == child
    if dataclasses.replace(child, scaling=parent.scaling) != parent:
        return False
    changes = frequency_changes(parent, child, head_dim)
    assert changes is not None
    before, after = changes.attention_factor
    return changes.kept + changes.still == changes.pairs and before == after


# ---------------------------------------------------------------------------- what it changes


def pair_frequencies(method: PositionEmbedding, head_dim: int) -> RotaryFrequencies | None:
    """The frequency of each pair of a head that rotates; None where a method has no such thing.

    For FoPE that of the pair's dominant term. NoPE's are zero.
    """
    if isinstance(method, RoPE):
        return scaled_frequencies(method.rotary_dim(head_dim), method.theta, method.scaling)
    if isinstance(method, FoPE):
        return method.pairs(head_dim)
    if type(method) is NoPE:
        return RotaryFrequencies(np.zeros(head_dim // 2), theta=1.0)
    return None


class FrequencyChanges(NamedTuple):
    """Pairs of a head by what happens to their frequency.

    Attributes:
      pairs: all that rotate before or after.
      kept: the same before and after.
      changed: another one, above 0 before and after.
      least, most: of the changed, by how much the frequency is divided; None where none is.
      zeroed: above 0 before, 0 after.
      new: 0 before, above 0 after.
      attention_factor: on cosine and sine, before and after.
    """

    pairs: int
    kept: int
    changed: int
    least: float | None
    most: float | None
    zeroed: int
    new: int
    attention_factor: tuple[float, float]

    @property
    def still(self) -> int:
        """Pairs of frequency 0 before and after."""
        return self.pairs - self.kept - self.changed - self.zeroed - self.new

    @property
    def text(self) -> str:
        """One line for people."""
        parts = [f"{self.kept} kept"]
        if self.changed:
            least, most = f"{self.least:.4g}", f"{self.most:.4g}"
            factors = least if least == most else f"{least} to {most}"
            parts.append(f"{self.changed} divided by {factors}")
        parts += [f"{self.zeroed} zeroed", f"{self.new} new"]
        if self.still:
            parts.append(f"{self.still} zero before and after")
        before, after = self.attention_factor
        temperature = f"; cosine and sine times {after / before:.4g}" if before != after else ""
        return f"of {self.pairs} frequencies {', '.join(parts)}{temperature}"


def frequency_changes(
    parent: PositionEmbedding, child: PositionEmbedding, head_dim: int
) -> FrequencyChanges | None:
    """What an extension does to the frequencies; None where parent or child has none.

    >>> child = extend_position(RoPE(theta=100.0), "clip", from_length=8, length=16, head_dim=4)
    >>> frequency_changes(RoPE(theta=100.0), child, head_dim=4).text
    'of 2 frequencies 1 kept, 1 zeroed, 0 new'
    """
    one, two = pair_frequencies(parent, head_dim), pair_frequencies(child, head_dim)
    if one is None or two is None:
        return None
    size = max(len(one.inv_freq), len(two.inv_freq))
    old, new = (
        np.resize(f.inv_freq, size) * (np.arange(size) < len(f.inv_freq)) for f in (one, two)
    )
    both = (old > 0) & (new > 0)
    ratio = np.divide(old, new, out=np.ones(size), where=both)
    same = both & (np.abs(ratio - 1) < 1e-12)
    changed = ratio[both & ~same]
    return FrequencyChanges(
        pairs=size,
        kept=int(same.sum()),
        changed=len(changed),
        least=float(changed.min()) if len(changed) else None,
        most=float(changed.max()) if len(changed) else None,
        zeroed=int(((old > 0) & (new == 0)).sum()),
        new=int(((old == 0) & (new > 0)).sum()),
        attention_factor=(float(one.attention_factor), float(two.attention_factor)),
    )
