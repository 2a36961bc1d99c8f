"""Logit scaling: keeps attention sharp as the number of keys grows; wraps any method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import Layer, Limits, ModelShape, PositionEmbedding, has_hook
from fope_jax.position.checks import check_choice, check_switches, check_tokens
from fope_jax.position.mixing import Wrapper
from fope_jax.position.rotation import position_values, whole_positions
from fope_jax.position.scaling import Scaling, yarn_temperature
from fope_jax.typing import Array

KINDS = ("log_n", "yarn", "llama4")


def log_n_scale(positions: Array, training_length: int, *, within: bool = False) -> Array:
    """The factor on the logits of a query that sees n keys.

        s(p) = ln(n) / ln(L),  n = max(p, 0) + 1;   1 for n <= L unless ``within``

    Positions are integer tokens; L is in tokens, a whole number of 2 or more, else ValueError.
    ``within`` scales queries within L too, for models trained that way. The first token then gets
    0, which changes nothing because it sees one key. Returns float32 in the shape of ``positions``.

    >>> log_n_scale(np.array([0, 99, 9_999]), training_length=100).round(6).tolist()
    [1.0, 1.0, 2.0]

    Reference: Chiang and Cholak 2022, "Overcoming a Theoretical Limitation of Self-Attention",
    Section 5.3; Su 2021, "Attention's scale operation from the invariance of entropy".
    """
    check_tokens("training_length", training_length, "the trained length in tokens", least=2)
    count = jnp.maximum(position_values(positions), 0) + 1
    scale = jnp.log(count) / np.float32(math.log(training_length))
    return scale if within else jnp.maximum(scale, 1.0)


def llama4_scale(positions: Array, training_length: int) -> Array:
    """The factor on the logits of a query at p: it grows at every multiple of a length.

        s(p) = 1 + 0.1 ln(1 + floor((p + 1) / L)),  and 1 for p < 0

    Positions are integer tokens, else TypeError; L is in tokens, a whole number of 1 or more, else
    ValueError. Returns float32 in the shape of ``positions``.

    >>> llama4_scale(np.array([0, 98, 99, 299]), training_length=100).round(4).tolist()
    [1.0, 1.0, 1.0692999362945557, 1.1385999917984009]

    Reference: transformers 5.24.0, Llama4TextAttention, with its published numbers.
    """
    check_tokens("training_length", training_length, "the length of a step in tokens")
    positions = jnp.maximum(whole_positions(positions), 0)
    length = positions.dtype.type(training_length)
    # A float32 quotient just below a whole number would put off the step by a token.
    is_last = (positions % length == length - 1).astype(jnp.float32)
    steps = (positions // length).astype(jnp.float32) + is_last
    return 1 + np.float32(0.1) * jnp.log1p(steps)


@dataclass(frozen=True)
class LogitScaling(Wrapper):
    """Multiplies the attention logits of another method by a factor that grows with length.

        log_n:  q.k -> s(p) q.k,  s as in ``log_n_scale``, p the position of the query
        yarn:   q.k -> (0.1 ln s + 1) ** 2 q.k  at every position
        llama4: q.k -> s(p) q.k,  s as in ``llama4_scale``
        logits[i, j] = s(i) q_i.k_j / sqrt(H) + bias[i, j]

    Only q.k is scaled; the method's bias is added afterwards. A contextual bias is computed from
    logits without the factor, so CoPE's counts do not change with length. A temperature of the
    inner scaling (YaRN, LongRoPE) is refused because it would sharpen the logits twice for the same
    length; disable it with ``attention_factor=1.0``. With ``within`` both are allowed: the factor
    was trained, and the temperature extends it.

    Knobs:
      inner: the position embedding whose logits are scaled.
      form: ``log_n``, ``llama4``, or ``yarn`` for YaRN's temperature without its frequencies.
      training_length: L, tokens, for ``log_n`` and ``llama4``.
      within: for ``log_n``: scale within the training length too.
      factor: s, the new length over the trained one, for ``yarn``.

    Reference: Chiang and Cholak 2022, Section 5.3; Peng et al. 2023, "YaRN", Eq. 21-22.
    """

    extends: ClassVar[str] = "helps the method it wraps"

    form: str = "log_n"
    training_length: int | None = None
    within: bool = False
    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, KINDS)
        check_switches(self)
        needed, other = "training_length", "factor"
        if self.form == "yarn":
            needed, other = other, needed
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}=None: form={self.form!r} needs it")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}={getattr(self, other)}: form={self.form!r} does not use it")
        self.scale(np.zeros((1, 1), np.int32))  # raises if the number is out of range
        for component in (self.inner, *_components(self.inner)):
            if isinstance(component, LogitScaling):
                where = "is" if component is self.inner else "holds"
                raise ValueError(
                    f"inner {where} a LogitScaling itself: logits would be scaled twice"
                )
            if isinstance(component, PositionEmbedding):
                layer = component.layers()[0]
                if layer.method is component and layer.logit_scale is not None:
                    raise ValueError(
                        f"inner holds {type(component).__name__}, which scales its logits by "
                        "itself: logits would be scaled twice"
                    )
            if not isinstance(component, Scaling) or self.within:
                continue
            factor = component.effective_attention_factor
            if factor != 1:
                raise ValueError(
                    f"inner holds {type(component).__name__}, whose temperature multiplies cosine "
                    f"and sine by {factor:g}: logits would be scaled twice; give it "
                    "attention_factor=1.0, or leave LogitScaling out"
                )

    def check(self, shape: ModelShape) -> None:
        self.inner.check(shape)
        for layer in self.inner.layers():
            method = layer.method
            if has_hook(method, "bias") and has_hook(method, "contextual_bias"):
                raise ValueError(
                    f"inner={type(method).__name__}: it has a bias and a contextual bias, whose "
                    "logits hold the bias, so that the product of q and k cannot be scaled alone"
                )

    @property
    def limits(self) -> Limits:
        # log_n and llama4 count a query's keys by its position, wrong without a causal mask.
        causal = self.form != "yarn" or self.inner.limits.needs_causal_mask
        return self.inner.limits._replace(needs_causal_mask=causal)

    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer._replace(logit_scale=self.scale) for layer in self.inner.layers())

    def scale(self, positions: Array) -> Array:
        """The factor ``[1 or B, 1 or T]`` on the logits of queries at ``positions [B, T]``."""
        if self.form == "yarn":
            temperature = yarn_temperature(cast(float, self.factor))
            return jnp.full((1, 1), temperature**2, jnp.float32)
        training_length = cast(int, self.training_length)
        if self.form == "llama4":
            return llama4_scale(positions, training_length)
        return log_n_scale(positions, training_length, within=self.within)


def _components(method: Any) -> Iterator[PositionEmbedding | Scaling]:
    """Yields all methods and scalings nested in ``method``."""
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        for component in value if isinstance(value, tuple) else (value,):
            if isinstance(component, (PositionEmbedding, Scaling)):
                yield component
                yield from _components(component)
