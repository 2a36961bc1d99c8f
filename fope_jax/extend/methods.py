"""Which position embedding a trained model can continue with at a longer length."""

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
from fope_jax.position.registry import METHODS, SCALINGS, name_of
from fope_jax.position.rope import RoPE
from fope_jax.position.scaling import ClipFloor, RotaryFrequencies, Scaling, scaled_frequencies

SAME = "same"
ALIASES = {"pi": "position_interpolation", "clip": "clip_floor"}

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

    ``target`` is ``same``, the name of a method or scaling, ``pi`` or ``clip``.

    Raises:
      ValueError: an unknown name, or a target that cannot follow the parent; says why.

    >>> [cls.__name__ for cls in target_classes(RoPE(), "pi")]
    ['RoPE', 'PositionInterpolation']
    """
    name, is_rotary = ALIASES.get(target, target), isinstance(parent, (RoPE, FoPE))
    cls = METHODS.get(name)
    if name == SAME or cls is type(parent):
        return type(parent), None
    if cls is None and name not in SCALINGS:
        known = [SAME, *METHODS, *SCALINGS, *ALIASES]
        raise ValueError(f"unknown method {target!r}{nearest(target, known)}")
    if is_rotary and name in SCALINGS:
        return type(parent), SCALINGS[name]
    if is_rotary and cls is NoPE:
        return NoPE, None
    if isinstance(parent, RoPE) and cls is FoPE:
        accepted = {"interleaved": False, "partial_rotary_factor": 1.0, "learnable": False}
        for knob, value in accepted.items():
            if getattr(parent, knob) != value:
                raise ValueError(
                    f"rope to fope: the parent has {knob}={getattr(parent, knob)}, which FoPE does "
                    f"not know; it follows from rope with {knob}={value}"
                )
        return FoPE, None
    if isinstance(parent, FoPE) and name == "rope":
        reason = (
            "its zero-frequency pairs were never trained with rotation; scale what it has "
            "(yarn, pi, ntk, ...) or drop it (nope)"
        )
    else:
        reason = _LACKS[parent.kind]
        if parent.kind == "rotation" and cls is not None and cls.kind != "rotation":
            reason += f", and {name} was never part of what it learned"
        reason += f"; accepted: {SAME}, {name_of(parent)}"
    raise ValueError(f"{name_of(parent)} to {target}: {reason}")


def extend_position(
    parent: PositionEmbedding,
    target: str,
    *,
    from_length: int,
    length: int,
    head_dim: int,
    knobs: Mapping[str, Any] | None = None,
) -> PositionEmbedding:
    """The position embedding with which ``parent`` continues at ``length`` tokens.

    A scaling gets the factor s = length / L, with L the length before any stretch. It replaces an
    earlier stretch and keeps its L: RoPE at 128, then YaRN to 256, then YaRN to 512 gives s = 4.
    ``fope`` and ``clip`` set the floor at the new length. A scaled FoPE has no YaRN temperature, as
    in the released code. ``learned`` makes the table ``length`` long. All other knobs, also those
    of a scaling of the same class, are the parent's.

    Args:
      parent: the method the model was trained with, on ``from_length`` tokens.
      target: see ``target_classes``.
      knobs: override derived knobs, of the scaling if it has the knob, else of the method.

    Raises:
      ValueError: see ``target_classes``; ``length`` is below ``from_length``, or equal to it while
        the target changes the method; a knob is unknown, missing or out of range.

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
    knobs, changes = dict(knobs or {}), {}
    if scaling_cls is not None:
        names = {field.name for field in dataclasses.fields(scaling_cls)}
        stated = {name: knobs.pop(name) for name in list(knobs) if name in names}
        changes["scaling"] = _extend_scaling(
            parent, scaling_cls, from_length, length, head_dim, stated
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
    names, preset = [f.name for f in dataclasses.fields(cls) if f.init], knobs.pop("preset", None)
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
        presets = {None: FoPE, "official": FoPE.official, "equations": FoPE.equations}
        if preset not in presets:
            raise ValueError(f"preset={preset!r}: expected official or equations")
        return presets[preset](**{"theta": parent.theta, "scaling": kept} | changes | knobs)
    return cls(**changes | knobs)


def _extend_scaling(
    parent: Any,
    cls: type[Scaling],
    from_length: int,
    length: int,
    head_dim: int,
    stated: dict[str, Any],
) -> tuple[Scaling, ...]:
    """The parent's scalings, with one of ``cls`` replacing the same class or a stretch."""
    # The length that the unstretched frequencies were trained on, and the factor of the stretch.
    original, stretched = from_length, 1.0
    if (stretch := next((step for step in parent.scaling if step.stretches), None)) is not None:
        stretched = stretch.factor
        original = getattr(stretch, "original_length", None) or from_length / stretched
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
    kept = [f.name for f in fields if previous and f.name not in (*known, *needed)]
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
            raise ValueError(
                f"{cls.__name__} needs the knob {name!r}, which no length gives"
                f"{searched if name == 'long_factor' else ''}: state it, on the command line as "
                f"--config.position.{name}=VALUE"
            )
    if cls.stretches and "factor" not in stated and known["factor"] < stretched:
        raise ValueError(
            f"length={length}: the parent stretches its {round(original)} tokens by {stretched:g} "
            f"already, more than to {length}; give a factor, or keep the scaling with {SAME}"
        )
    others = [
        step
        for step in parent.scaling
        if type(step) is not cls and not (step.stretches and cls.stretches)
    ]
    return (*others, cls(**known))


def _is_identity(parent: PositionEmbedding, child: PositionEmbedding, head_dim: int) -> bool:
    """Whether child and parent are equal up to rounding of frequencies."""
    if not (isinstance(parent, (RoPE, FoPE)) and isinstance(child, (RoPE, FoPE))):
        return parent == child
    changes = frequency_changes(parent, child, head_dim)
    if changes is None or dataclasses.replace(child, scaling=parent.scaling) != parent:
        return False
    before, after = changes.attention_factor
    return changes.kept + changes.still == changes.pairs and before == after


# ---------------------------------------------------------------------------- frequency changes


def pair_frequencies(method: PositionEmbedding, head_dim: int) -> RotaryFrequencies | None:
    """The frequency of each pair of a head (FoPE: its dominant term); None for other methods."""
    if isinstance(method, RoPE):
        return scaled_frequencies(method.rotary_dim(head_dim), method.theta, method.scaling)
    if isinstance(method, FoPE):
        return method.pairs(head_dim)
    if type(method) is NoPE:
        return RotaryFrequencies(np.zeros(head_dim // 2), theta=1.0)
    return None


class FrequencyChanges(NamedTuple):
    """Numbers of pairs of a head by the change of their frequency.

    Attributes:
      kept, changed: above 0 before and after, with the same or another frequency.
      least, most: divisors of the changed frequencies; None if none changed.
      zeroed, new: 0 only after, or only before.
      attention_factor: factor on cosine and sine, before and after.
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
    """How an extension changes the frequencies; None if parent or child has none.

    >>> child = extend_position(RoPE(theta=100.0), "clip", from_length=8, length=16, head_dim=4)
    >>> frequency_changes(RoPE(theta=100.0), child, head_dim=4).text
    'of 2 frequencies 1 kept, 1 zeroed, 0 new'
    """
    one, two = pair_frequencies(parent, head_dim), pair_frequencies(child, head_dim)
    if one is None or two is None:
        return None
    size = max(len(one.inv_freq), len(two.inv_freq))
    old, new = (np.pad(f.inv_freq, (0, size - len(f.inv_freq))) for f in (one, two))
    both = (old > 0) & (new > 0)
    ratio = np.divide(old, new, out=np.ones(size), where=both)
    is_kept = both & (np.abs(ratio - 1) < 1e-12)
    changed = ratio[both & ~is_kept]
    return FrequencyChanges(
        pairs=size,
        kept=int(is_kept.sum()),
        changed=len(changed),
        least=float(changed.min()) if len(changed) else None,
        most=float(changed.max()) if len(changed) else None,
        zeroed=int(((old > 0) & (new == 0)).sum()),
        new=int(((old == 0) & (new > 0)).sum()),
        attention_factor=(float(one.attention_factor), float(two.attention_factor)),
    )
