"""What an extension changes in the frequencies of a head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fope_jax.position.base import NoPE, PositionEmbedding
from fope_jax.position.drope import DroPE
from fope_jax.position.fope import FoPE
from fope_jax.position.mixing import Wrapper
from fope_jax.position.rope import RoPE
from fope_jax.position.scaling import RotaryFrequencies, scaled_frequencies


def unwrapped(method: PositionEmbedding) -> PositionEmbedding:
    """What stands inside all wrappers, such as a sliding window; its arrays are theirs.

    >>> from fope_jax.position import LogitScaling, SlidingWindow
    >>> type(unwrapped(SlidingWindow(LogitScaling(NoPE(), training_length=8), 4))).__name__
    'NoPE'
    """
    while isinstance(method, Wrapper):
        method = method.inner
    return method


def pair_frequencies(method: PositionEmbedding, head_dim: int) -> RotaryFrequencies | None:
    """The frequency of each pair of a head (FoPE: its dominant term); None for other methods."""
    method = unwrapped(method)
    if isinstance(method, RoPE):
        scaled = scaled_frequencies(method.rotary_dim(head_dim), method.theta, method.scaling)
        return scaled._replace(inv_freq=method.frequencies(head_dim))
    if isinstance(method, FoPE):
        return method.pairs(head_dim)
    if type(method) in (NoPE, DroPE):
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

    >>> from fope_jax.position import ClipFloor
    >>> child = RoPE(theta=100.0, scaling=(ClipFloor(16),))
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
