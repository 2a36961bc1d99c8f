"""FoPE: Fourier position embedding, with the knobs of the paper and of its code."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import ModelShape, PositionEmbedding, PositionVariables, Variables
from fope_jax.position.checks import (
    check_above_zero,
    check_choice,
    check_finite,
    check_spread,
    check_switches,
    check_whole,
)
from fope_jax.position.fourier import (
    SIGMA_CONVENTIONS,
    fourier_coefficients,
    mix_tables,
    normalise_columns,
    own_identity,
    step_identity,
)
from fope_jax.position.rotation import (
    angles,
    check_head_dim,
    check_theta,
    inverse_frequencies,
    rotate,
)
from fope_jax.position.scaling import (
    ClipFloor,
    RotaryFrequencies,
    Scaling,
    check_chain,
    floor_frequency,
    scaled_frequencies,
)
from fope_jax.typing import Array

_CHOICES = {
    "sigma_convention": SIGMA_CONVENTIONS,
    "frequencies_from": ("rope", "grid", "uniform"),
    "heads": ("query", "key_value", "shared"),
    "outputs": ("official", "surviving", "quarter"),
    "identity": ("step", "own"),
    "scaling_order": ("before_clip", "after_clip"),
}


@dataclass(frozen=True)
class FoPE(PositionEmbedding):
    """Fourier position embedding: a Fourier series per dimension, no undertrained frequency.

        h_m(p) = e^{i w_m p} + sum_w a_w e^{i w p}   where w_m >= 2 pi / L
        h_m(p) = 1 + i zero_sine                     where w_m <  2 pi / L

    With ``separate_sine`` the real and the imaginary part have an a_w each. The defaults are the
    preset ``official``, which reproduces the released code; ``equations`` reproduces Eq. 11-13. The
    two learn different functions. With random coefficients neither is a rotation, so q.k depends on
    absolute positions as well.

    Knobs (paper: the text of ICML 2025; code: the released one):
      training_length: L, tokens; sets the floor, which does not move when evaluating longer.
      theta: base of RoPE's frequencies; 10,000 in both.
      floor_ratio: periods within L that a frequency needs to be kept; 1 in both.
      clip: zero the frequencies below the floor ("CF"). False keeps only the series ("FS").
      series: mix frequencies ("FS"). False keeps only the clipped RoPE ("CF"); zero frequencies
        have sine 0.
      sigma: strength of the noise; paper 0.3, 0.4, 0.6 for 60M, 180M, 1.2B.
      sigma_convention: ``xavier`` (code) or ``normal`` (paper), see ``coefficient_std``.
      frequencies_from: what is mixed. ``rope``: RoPE's frequencies (code as released). ``grid``: a
        finer RoPE grid (code with ``fourier_dim``). ``uniform``: RoPE's above the floor and others
        drawn from [0, pi] (paper).
      num_frequencies: ``grid``: frequencies before clipping, half of ``fourier_dim``; ``uniform``:
        D in total. None takes head_dim, as in the paper's table.
      separate_sine: separate coefficients for sine and cosine; True in both.
      heads: one matrix per ``query`` head, per ``key_value`` head (its query heads share it), or
        one ``shared``. With grouped queries ``query`` repeats keys in memory.
      share_layers: draw once for all layers; False in both.
      normalise: divide each output's coefficients by their sum (the paper's pseudo-code, not the
        code). Sums near 0 give very large tables.
      drop_zero: do not mix zero frequencies; True in both. If kept, they add constants, and every
        pair of the head gets a series.
      outputs: how many pairs get a series when zero frequencies are removed. ``official``: as many
        as frequencies are mixed, at most H/4 (code). ``surviving``: as many as RoPE has above the
        floor (paper). ``quarter`` (old configs): ``official`` with ``clip``, else H/2.
      zero_sine: sine of zero-frequency pairs: 1 (code, intended by its authors) or 0 (Eq. 13).
      identity: position of the dominant terms when D > d. ``step``: see ``step_identity`` (code).
        ``own``: each output at its RoPE frequency (paper), or the nearest on a ``grid``.
      scaling: a tuple of scalings of RoPE's frequencies, applied in order; training_length is then
        the new length. The code's YaRN has no temperature: ``YaRN(.., attention_factor=1.0)``. An
        attention factor multiplies all cosines and sines.
      scaling_order: ``before_clip`` scales, then clips; ``after_clip`` clips first ("yarn_after").
      learnable: train the coefficients; weight decay pulls them to 0. False in both.

    Reference: Hua et al. 2025, "Fourier Position Embedding: Enhancing Attention's Periodic
    Extension for Length Generalization", Eq. 11-13, and the released code.
    """

    kind: ClassVar[str] = "rotation"
    extends: ClassVar[str] = "claimed; better with a scaling"

    training_length: int
    theta: float = 10_000.0
    floor_ratio: float = 1.0
    clip: bool = True
    series: bool = True
    sigma: float = 0.3
    sigma_convention: str = "xavier"
    frequencies_from: str = "rope"
    num_frequencies: int | None = None
    separate_sine: bool = True
    heads: str = "key_value"
    share_layers: bool = False
    normalise: bool = False
    drop_zero: bool = True
    outputs: str = "official"
    zero_sine: float = 1.0
    identity: str = "step"
    learnable: bool = False
    scaling: tuple[Scaling, ...] = ()
    scaling_order: str = "before_clip"

    def __post_init__(self) -> None:
        floor_frequency(self.training_length)
        check_above_zero("floor_ratio", self.floor_ratio, "periods that a frequency needs")
        check_theta(self.theta)
        check_switches(self)
        check_spread("sigma", self.sigma)
        check_finite("zero_sine", self.zero_sine, "the sine of zero-frequency pairs")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.outputs == "quarter" and (self.clip or not self.drop_zero):
            object.__setattr__(self, "outputs", "official")  # synonyms must compare equal
        object.__setattr__(self, "scaling", check_chain(self.scaling))
        for step in self.scaling:
            if step.follows_length:
                raise ValueError(
                    f"scaling={type(step).__name__} with length=None: FoPE mixes a fixed set of "
                    "frequencies; give the scaling a length"
                )
            if isinstance(step, ClipFloor):
                raise ValueError(
                    "scaling holds ClipFloor: FoPE clips by itself and would do it twice; use "
                    "training_length and floor_ratio"
                )
        if self.num_frequencies is not None:
            check_whole("num_frequencies", self.num_frequencies, 1, "frequencies that are mixed")
        if self.learnable and self.share_layers:
            raise ValueError(
                "learnable=True, share_layers=True: each layer trains its own coefficients, so "
                "what the layers share would drift apart; choose one"
            )
        if self.num_frequencies is not None and self.frequencies_from == "rope":
            raise ValueError(
                f"num_frequencies={self.num_frequencies}: frequencies_from='rope' has its own; "
                "choose 'grid' or 'uniform' to mix more"
            )
        if not (self.clip or self.series):
            raise ValueError("clip=False, series=False: nothing of FoPE is left, use RoPE")

    @classmethod
    def official(cls, training_length: int, **knobs: Any) -> FoPE:
        """The released code's method: the defaults."""
        return cls(training_length, **knobs)

    @classmethod
    def equations(cls, training_length: int, **knobs: Any) -> FoPE:
        """Eq. 11-13 of the paper, with D = head_dim frequencies unless given."""
        text = {
            "sigma_convention": "normal",
            "frequencies_from": "uniform",
            "outputs": "surviving",
            "zero_sine": 0.0,
            "identity": "own",
        }
        return cls(training_length, **(text | knobs))

    def frequencies(self, head_dim: int) -> np.ndarray:
        """``[D]`` radians per token: what is mixed, without the random frequencies.

        Without the series, RoPE's ``[H/2]`` with zeros below the floor.
        """
        if not self.series:
            return self.pairs(head_dim).inv_freq
        return self._mixed(self._grid_size(head_dim))

    def origins(self, head_dim: int) -> np.ndarray:
        """``[D]`` radians per token: ``frequencies`` before scaling."""
        size = self._grid_size(head_dim)
        grid = inverse_frequencies(size, self.theta)
        return grid[self.pairs(size).inv_freq > 0] if self.drop_zero else grid

    def dominant_terms(self, head_dim: int) -> np.ndarray:
        """``[D, d]`` float32: the coefficients without noise, at most one 1 per column."""
        num_outputs, num_mixed = self.num_outputs(head_dim), self._num_mixed(head_dim)
        if self.identity == "step":
            return step_identity(num_mixed, num_outputs)
        terms = np.zeros((num_mixed, num_outputs), np.float32)
        basis = self.frequencies(head_dim)
        terms[: len(basis)] = own_identity(basis, self._mixed(head_dim)[:num_outputs])
        return terms

    def num_outputs(self, head_dim: int) -> int:
        """d, the number of pairs of dimensions with a series."""
        if not self.drop_zero or self.outputs == "quarter":
            return head_dim // 2
        if self.outputs == "surviving":
            return len(self._mixed(head_dim))
        return min(self._num_mixed(head_dim), head_dim // 4)

    def check(self, shape: ModelShape) -> None:
        head_dim = shape.head_dim
        check_head_dim(head_dim)
        surviving = self.pairs(head_dim).inv_freq
        if not surviving.any():
            raise ValueError(
                f"training_length={self.training_length}: no frequency completes "
                f"{self.floor_ratio:g} periods within it; {self._least_length(head_dim)} tokens or "
                "more keep one"
            )
        if not self.series:
            return
        kept = len(self._mixed(head_dim))
        size = self.num_frequencies
        if size is not None and self.frequencies_from == "uniform" and size < kept:
            raise ValueError(
                f"num_frequencies={size}: RoPE alone has {kept} above the floor for "
                f"head_dim={head_dim}; expected {kept} or more"
            )
        if size is not None and self.frequencies_from == "grid" and size < head_dim // 2:
            raise ValueError(
                f"num_frequencies={size}: a grid finer than RoPE's has at least "
                f"{head_dim // 2} frequencies for head_dim={head_dim}"
            )
        if self.num_outputs(head_dim) < 1:
            raise ValueError(
                f"head_dim={head_dim}: outputs='official' leaves no pair with a series; "
                "head_dim must be 4 or more"
            )
        if self.identity == "own" and self.drop_zero and self.num_outputs(head_dim) > kept:
            raise ValueError(
                f"identity='own': outputs={self.outputs!r} makes {self.num_outputs(head_dim)} "
                f"pairs, RoPE has {kept} frequencies above the floor; choose outputs='surviving'"
            )

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        """``cos_coef``, and ``sin_coef`` if separate: ``[L, N, D, d]`` or ``[L, D, d]``."""
        if not self.series:
            return PositionVariables()
        frequency_key, coefficient_key = jax.random.split(key)
        head_dim, num_mixed = shape.head_dim, self._num_mixed(shape.head_dim)
        model_constants: Variables = {}
        if self.frequencies_from == "uniform":
            extra = num_mixed - len(self.frequencies(head_dim))
            drawn = jax.random.uniform(frequency_key, (extra,), jnp.float32, 0.0, np.pi)
            model_constants["extra_frequencies"] = drawn
        heads = {"query": shape.num_heads, "key_value": shape.num_kv_heads, "shared": None}
        draw = functools.partial(
            fourier_coefficients,
            num_heads=heads[self.heads],
            num_frequencies=num_mixed,
            num_outputs=self.num_outputs(head_dim),
            sigma=self.sigma,
            convention=self.sigma_convention,
            separate_sine=self.separate_sine,
            identity=self.dominant_terms(head_dim),
        )
        keys = jax.random.split(coefficient_key, 1 if self.share_layers else shape.num_layers)
        cos_coef, sin_coef = (
            jnp.broadcast_to(coef, (shape.num_layers, *coef.shape[1:]))
            for coef in jax.vmap(draw)(keys)
        )
        coefficients = {"cos_coef": cos_coef}
        if self.separate_sine:
            coefficients["sin_coef"] = sin_coef
        group = "layer_params" if self.learnable else "layer_constants"
        return PositionVariables(model_constants=model_constants, **{group: coefficients})

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> tuple[Array, Array]:
        phase = angles(positions, self.frequencies(head_dim))
        if "extra_frequencies" in variables:
            extra = angles(positions, variables["extra_frequencies"])
            phase = jnp.concatenate([phase, extra], axis=-1)
        return jnp.cos(phase), jnp.sin(phase)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return ("heads",) if name != "extra_frequencies" and self.heads != "shared" else ()

    def rotate(
        self, variables: Variables, tables: tuple[Array, Array], q: Array, k: Array
    ) -> tuple[Array, Array]:
        head_dim = q.shape[-1]
        factor = np.float32(self.pairs(head_dim).attention_factor)
        if not self.series:
            cos, sin = (factor * table for table in tables)
            return rotate(q, cos, sin), rotate(k, cos, sin)
        cos_coef = variables["cos_coef"]
        sin_coef = variables.get("sin_coef", cos_coef)
        if self.normalise:
            cos_coef, sin_coef = normalise_columns(cos_coef), normalise_columns(sin_coef)
        cos, sin = mix_tables(
            *tables, cos_coef, sin_coef, head_dim=head_dim, zero_sine=self.zero_sine
        )
        if factor != 1:
            cos, sin = factor * cos, factor * sin
        groups = q.shape[2] // k.shape[2]
        if self.heads == "query" and groups > 1:
            k = jnp.repeat(k, groups, axis=2)
        rotated_k = rotate(k, cos, sin)
        if self.heads == "key_value" and groups > 1:
            cos, sin = jnp.repeat(cos, groups, axis=2), jnp.repeat(sin, groups, axis=2)
        return rotate(q, cos, sin), rotated_k

    def pairs(self, size: int) -> RotaryFrequencies:
        """RoPE's ``size / 2`` frequencies, scaled and clipped in ``scaling_order``, zeros kept."""
        clip = (ClipFloor(self.training_length, self.floor_ratio),) if self.clip else ()
        before = self.scaling_order == "before_clip"
        chain = self.scaling + clip if before else clip + self.scaling
        return scaled_frequencies(size, self.theta, chain)

    def _grid_size(self, head_dim: int) -> int:
        """Twice the number of frequencies in the grid, before any is dropped."""
        if self.series and self.frequencies_from == "grid":
            return 2 * (self.num_frequencies or head_dim)
        return head_dim

    def _mixed(self, size: int) -> np.ndarray:
        """The frequencies of ``pairs`` that the series mixes."""
        inv_freq = self.pairs(size).inv_freq
        return inv_freq[inv_freq > 0] if self.drop_zero else inv_freq

    def _least_length(self, head_dim: int) -> int:
        """The shortest training length, tokens, that keeps a frequency."""
        unclipped = self.scaling if self.scaling_order == "before_clip" else ()
        fastest = scaled_frequencies(head_dim, self.theta, unclipped).inv_freq.max()
        return math.ceil(2 * math.pi * self.floor_ratio / fastest)

    def _num_mixed(self, head_dim: int) -> int:
        """D, the rows of the mixing matrix."""
        if self.frequencies_from == "uniform":
            if self.num_frequencies is not None:
                return self.num_frequencies
            return max(head_dim, len(self.frequencies(head_dim)))
        return len(self.frequencies(head_dim))
