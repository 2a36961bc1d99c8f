"""Checks of knobs: each raises a ValueError that names the knob, its value and what is accepted."""

from __future__ import annotations

import math


def check_at_least(name: str, value: float, least: float, meaning: str) -> None:
    """Raises ValueError unless ``value`` is finite and ``least`` or more."""
    if not least <= value < math.inf:
        raise ValueError(f"{name}={value}: {meaning} must be {least:g} or more")


def check_above_zero(name: str, value: float, meaning: str) -> None:
    """Raises ValueError unless ``value`` is finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: {meaning} must be above 0")


def check_factor(factor: float) -> None:
    """Raises ValueError unless ``factor`` can be the new length over the trained one."""
    check_at_least("factor", factor, 1, "the new length over the trained one")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
