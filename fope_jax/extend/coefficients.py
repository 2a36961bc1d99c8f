"""Carries position arrays from a parent's position embedding to its child's."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fope_jax.extend.frequencies import unwrapped
from fope_jax.position.absolute import Learned
from fope_jax.position.base import GROUPS, PositionEmbedding, PositionVariables, Variables
from fope_jax.position.checks import check_choice
from fope_jax.position.fope import FoPE
from fope_jax.typing import Array

MATCHES = ("frequency", "index")


def match_frequencies(old: Array, new: Array, *, by: str = "frequency") -> np.ndarray:
    """The index of each new frequency among the old ones.

        rows[i] = j   where |new_i - old_j| <= 1e-6 new_i      by frequency
        rows[i] = i   where i < len(old)                       by index
        rows[i] = -1  otherwise: the frequency is new

    Args:
      old, new: ``[D]`` and ``[D']`` radians per token; old ones differ by more than 1e-6.
      by: ``frequency``, or ``index`` as in the released code of FoPE.

    >>> match_frequencies(np.array([1.0, 0.1]), np.array([1.0, 0.3, 0.1, 0.03])).tolist()
    [0, -1, 1, -1]
    >>> match_frequencies(np.array([1.0, 0.1]), np.array([1.0, 0.3, 0.1]), by="index").tolist()
    [0, 1, -1]
    """
    check_choice("match", by, MATCHES)
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    if by == "index":
        rows = np.arange(len(new))
        return np.where(rows < len(old), rows, -1)
    distance = np.abs(new[:, None] - old[None, :])
    nearest = distance.argmin(axis=1)
    is_known = distance[np.arange(len(new)), nearest] <= 1e-6 * new
    return np.where(is_known, nearest, -1)


def carry_coefficients(
    old: Array,
    drawn: Array,
    rows: np.ndarray,
    old_dominant: np.ndarray,
    new_dominant: np.ndarray,
    *,
    by: str = "frequency",
) -> np.ndarray:
    """FoPE's coefficients ``[..., D', d']`` for a new set of frequencies, float32.

        new[i, m] = old[rows_i, m]                 if frequency i is known
        new[i, m] = drawn[i, m] - dominant[i, m]   if it is new: pair m has a dominant term already
        new[:, m] = drawn[:, m]                    if pair m is new, or lost its dominant frequency

    By index, ``old`` replaces the upper left corner of ``drawn``, as in the released code. If d
    does not divide D', some pairs then get a second dominant term.

    Args:
      old, drawn: ``[..., D, d]`` and ``[..., D', d']``, with their dominant terms.
      rows: ``[D']``, from ``match_frequencies`` with the same ``by``.
      old_dominant, new_dominant: ``[D, d]`` and ``[D', d']``, see ``FoPE.dominant_terms``.

    Raises:
      ValueError: the leading axes differ.

    >>> old, drawn = np.array([[1.0], [0.5]]), np.array([[1.25], [0.25], [0.75]])
    >>> terms = np.array([[1.0], [0.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> carry_coefficients(old, drawn, np.array([0, -1, 1]), *terms).tolist()
    [[1.0], [0.25], [0.5]]

    Reference: Hua et al. 2025 (FoPE), the released code's expansion of coefficients at loading.
    """
    old, carried = np.asarray(old), np.array(drawn)
    if old.shape[:-2] != carried.shape[:-2]:
        raise ValueError(
            f"coefficients {old.shape} of the parent do not fit {carried.shape}: layers and heads "
            "must stay as they are"
        )
    columns = min(old.shape[-1], carried.shape[-1])
    if by == "index":
        height = min(old.shape[-2], carried.shape[-2])
        carried[..., :height, :columns] = old[..., :height, :columns]
        return carried
    is_known = rows >= 0
    is_lost = old_dominant[:, :columns].astype(bool)
    is_lost[rows[is_known]] = False
    kept = np.flatnonzero(~is_lost.any(axis=0))
    carried[..., kept] = np.where(
        is_known[:, None],
        old[..., np.maximum(rows, 0), :][..., kept],
        (carried - new_dominant)[..., kept],
    )
    return carried


def check_table_length(length: int, trained: int) -> None:
    """Raises ValueError for a learned table with fewer rows than the ``trained`` ones."""
    if length < trained:
        raise ValueError(
            f"table_length={length}: the parent has {trained} trained positions, and a shorter "
            f"table would give its tokens those of others; expected {trained} or more"
        )


def interpolate_table(table: Array, trained: int, length: int) -> np.ndarray:
    """A learned table interpolated to ``[length, D]``, with the dtype of ``table``.

        new[p] = (1 - w) old[floor(x)] + w old[floor(x) + 1],  x = p (trained - 1) / (length - 1)

    with w = x - floor(x), so the first and the last row are kept.

    Args:
      table: ``[P, D]``.
      trained: number of trained rows, up to P; later rows are dropped.
      length: rows of the result, ``trained`` or more.

    Raises:
      ValueError: fewer rows than the trained ones, which would move every position.

    >>> interpolate_table(np.array([[0.0], [2.0], [9.0]]), trained=2, length=3).tolist()
    [[0.0], [1.0], [2.0]]

    Reference: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", Section 3.2, in one
    dimension.
    """
    check_table_length(length, trained)
    table = np.asarray(table)[:trained]
    x = np.arange(length) * (len(table) - 1) / max(1, length - 1)
    low = np.floor(x).astype(int)
    high = np.minimum(low + 1, len(table) - 1)
    weight = (x - low)[:, None].astype(table.dtype)
    return (1 - weight) * table[low] + weight * table[high]


class CarriedArrays(NamedTuple):
    """A child's arrays, the names of those with the parent's bits, and a line for the log."""

    variables: PositionVariables
    names: frozenset[str]
    text: str


def carry_variables(
    parent: PositionEmbedding,
    trained: PositionVariables,
    child: PositionEmbedding,
    drawn: PositionVariables,
    head_dim: int,
    *,
    from_length: int,
    match: str = "frequency",
) -> CarriedArrays:
    """The position arrays of a ``child`` that continues from ``parent``.

    FoPE's coefficients stay with their unscaled frequency, see ``carry_coefficients``. A learned
    table is interpolated. Other arrays of the same method are copied; the rest is as drawn.

    Args:
      parent, trained: the trained method and its arrays.
      child, drawn: the new method, and the arrays that its ``init`` draws.
      from_length: tokens that the parent's table was trained on, or stretched to.
      match: how frequencies of two FoPEs are matched, see ``match_frequencies``.

    Raises:
      ValueError: an array of the parent does not fit the child; the message names it.
    """
    check_choice("match", match, MATCHES)
    parent, child = unwrapped(parent), unwrapped(child)  # wrappers share the arrays of their inner
    old, new = (
        {name: x for group in GROUPS for name, x in getattr(arrays, group).items()}
        for arrays in (trained, drawn)
    )
    chosen, text = dict(new), ""
    if type(parent) is type(child):
        changed: Variables = {}
        if isinstance(parent, FoPE) and isinstance(child, FoPE) and parent.series and child.series:
            changed, text = _carry_series(parent, old, child, new, head_dim, match)
        elif isinstance(parent, Learned) and isinstance(child, Learned) and parent != child:
            changed = {"table": interpolate_table(old["table"], from_length, child.table_length)}
            text = f"table of {from_length} trained positions stretched to {child.table_length}"
        for name, array in new.items():
            if name not in changed and (name not in old or old[name].shape != array.shape):
                there = old[name].shape if name in old else "nothing"
                raise ValueError(
                    f"position array {name!r}: the parent has {there}, the child needs "
                    f"{array.shape}; the knobs that shape it must stay as they are"
                )
            chosen[name] = jnp.asarray(changed.get(name, old.get(name)), array.dtype)
    carried = {name for name, x in chosen.items() if name in old and np.array_equal(old[name], x)}
    if not text:
        lists = {"kept": sorted(carried), "drawn": sorted(chosen.keys() - carried)}
        text = "; ".join(f"{', '.join(names)} {verb}" for verb, names in lists.items() if names)
    groups = {group: {name: chosen[name] for name in getattr(drawn, group)} for group in GROUPS}
    return CarriedArrays(PositionVariables(**groups), frozenset(carried), text)


def _carry_series(
    parent: FoPE, old: Variables, child: FoPE, drawn: Variables, head_dim: int, match: str
) -> tuple[Variables, str]:
    """The changed arrays of a FoPE series, and a line for the log."""
    if old.keys() != drawn.keys():
        raise ValueError(
            f"the parent's series has {', '.join(sorted(old))}, the child's "
            f"{', '.join(sorted(drawn))}; frequencies_from and separate_sine must stay as they are"
        )
    before, after = parent.origins(head_dim), child.origins(head_dim)
    changed: Variables = {}
    if "extra_frequencies" in drawn:
        extra, fresh = np.asarray(old["extra_frequencies"]), np.asarray(drawn["extra_frequencies"])
        changed["extra_frequencies"] = np.concatenate([extra[: len(fresh)], fresh[len(extra) :]])
        before, after = np.append(before, extra), np.append(after, changed["extra_frequencies"])
    rows = match_frequencies(before, after, by=match)
    terms = parent.dominant_terms(head_dim), child.dominant_terms(head_dim)
    for name in ("cos_coef", "sin_coef"):
        if name in drawn:
            changed[name] = carry_coefficients(old[name], drawn[name], rows, *terms, by=match)
    kept = int((rows >= 0).sum())
    pairs = terms[0].shape[1], terms[1].shape[1]
    return changed, (
        f"series of {len(before)} frequencies into {len(after)}: coefficients of {kept} kept (by "
        f"{match}), of {len(after) - kept} drawn; {pairs[0]} pairs with a series before, "
        f"{pairs[1]} after"
    )
