"""Self-Extend and ReRoPE: a trained rotation reads further, with far distances made smaller."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    Layer,
    Limits,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    has_hook,
)
from fope_jax.position.checks import MOST_TOKENS, check_tokens, check_whole
from fope_jax.position.mixing import Wrapper
from fope_jax.position.rope import RoPE
from fope_jax.position.rotation import token_positions
from fope_jax.position.scaling import RotaryFrequencies, Scaling
from fope_jax.typing import Array

_OTHER_HOOKS = ("embed", "bias", "contextual_bias", "running_bias")


@dataclass(frozen=True)
class _FarDistances(Wrapper):
    """Base of what shows a rotation other positions where a key is ``window`` back or further."""

    inner_kind: ClassVar[str] = "a rotation"

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("window", self.window, "tokens with distances as trained")
        layers = self.inner.layers()
        for layer in layers:
            self._check_layer(layer)
        if not any(self._has_far_keys(layer) for layer in layers):
            raise ValueError(
                f"inner={type(self.inner).__name__}: no layer of it rotates keys "
                f"{self.window} tokens back, so that there is nothing to change"
            )

    def _check_layer(self, layer: Layer) -> None:
        name = type(layer.method).__name__
        hooks = [hook for hook in _OTHER_HOOKS if has_hook(layer.method, hook)]
        if hooks:
            raise ValueError(
                f"inner holds {name}: it has the hook {hooks[0]}, which sees true distances; "
                "expected rotations, such as RoPE or FoPE, and NoPE"
            )
        if layer.method.limits.follows_length:
            raise ValueError(
                f"inner holds {name} whose frequencies follow the length of each sequence: "
                "together they would shorten distances twice; give the scaling a length"
            )
        if layer.far_from is not None:
            raise ValueError(
                f"window={self.window}: inner has other distances from {layer.far_from} tokens on "
                "already; state it once"
            )

    def _has_far_keys(self, layer: Layer) -> bool:
        reach = [tokens for tokens in (layer.window, layer.chunk) if tokens is not None]
        return has_hook(layer.method, "rotate") and all(r > self.window for r in reach)

    @property
    def limits(self) -> Limits:
        # Keys after the query are never far.
        return self.inner.limits._replace(needs_causal_mask=True)

    def layers(self) -> tuple[Layer, ...]:
        return tuple(
            layer._replace(method=self._far_method(layer.method), far_from=self.window)
            if self._has_far_keys(layer)
            else layer
            for layer in self.inner.layers()
        )

    @abc.abstractmethod
    def _far_method(self, method: PositionEmbedding) -> _TwoVersions:
        """The method of a layer, with its second version."""


@dataclass(frozen=True)
class _TwoVersions(PositionEmbedding, abc.ABC):
    """A rotation at true positions and, beside it, one at the positions of far keys."""

    near: PositionEmbedding
    far: PositionEmbedding

    @abc.abstractmethod
    def far_positions(self, positions: Array) -> tuple[Array, Array]:
        """Where queries and keys stand for far keys, int32."""

    @property
    def limits(self) -> Limits:
        return self.near.limits

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        return self.near.init(key, shape)

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        return self.near.frequencies(head_dim)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return self.near.variable_axes(name)

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> tuple[Any, Any, Any]:
        positions = token_positions(positions)
        q_positions, k_positions = self.far_positions(positions)
        return (
            self.near.tables(variables, positions, head_dim),
            self.far.tables(variables, q_positions, head_dim),
            self.far.tables(variables, k_positions, head_dim),
        )

    def rotate(
        self, variables: Variables, tables: tuple[Any, Any, Any], q: Array, k: Array
    ) -> tuple[Array, Array]:
        near, of_q, of_k = tables
        near_q, near_k = self.near.rotate(variables, near, q, k)
        far_q, _ = self.far.rotate(variables, of_q, q, k)
        _, far_k = self.far.rotate(variables, of_k, q, k)
        return jnp.concatenate([near_q, far_q], -1), jnp.concatenate([near_k, far_k], -1)


# ---------------------------------------------------------------------------- Self-Extend


@dataclass(frozen=True)
class SelfExtend(_FarDistances):
    """A trained model reads further without training: far keys share positions in groups.

        distance(i, j) = i - j                                          i - j < w
                       = floor(i / g) + w - floor(w / g) - floor(j / g)   otherwise

    No distance of more than L tokens occurs up to ``(L - w) g + w`` tokens, L the length trained
    on. It has no variables: any checkpoint of a rotation can be read so. Keys are stored in both
    versions, so a cache of keys takes twice the memory. In a pattern the layers without rotation,
    and those that see no key w tokens back, stay as they are.

    FoPE is accepted as well: its positions stay in the range that was trained, though its logits
    depend on more than distances. Frequencies that follow the length (dynamic NTK) and biases are
    refused.

    Knobs:
      inner: the rotation, as trained.
      window: w, tokens with distances as trained; less than L.
      group: g, tokens that share a position beyond the window.

    Raises ValueError for a window or group below 1, and methods that do not only rotate.

    >>> from fope_jax.position import RoPE
    >>> SelfExtend(RoPE(), window=1024, group=8).layers()[0].far_from
    1024

    Reference: Jin et al. 2024, "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning",
    and its code (github.com/datamllab/LongLM).
    """

    extends: ClassVar[str] = "yes, without training; to about g times the training length"

    group: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("group", self.group, "tokens that share a position")

    def _far_method(self, method: PositionEmbedding) -> _TwoVersions:
        return _Grouped(method, method, self.window, self.group)


@dataclass(frozen=True)
class _Grouped(_TwoVersions):
    window: int
    group: int

    def far_positions(self, positions: Array) -> tuple[Array, Array]:
        keys = positions // self.group
        return keys + (self.window - self.window // self.group), keys


# ---------------------------------------------------------------------------- ReRoPE


@dataclass(frozen=True)
class ReRoPE(_FarDistances):
    """A trained model reads further without training: distances stop growing at a window.

        distance(i, j) = i - j               i - j < w
                       = w                   otherwise
                       = w + (i - j - w) / k   otherwise, with ``leak`` k ("leaky ReRoPE")

    As ``SelfExtend`` it has no variables and stores each key twice. Its author multiplies the
    logits by ln(n) / ln(L) as well: ``LogitScaling(ReRoPE(..), training_length=L)``.

    Knobs:
      inner: the rotation, as trained; RoPE with ``leak``.
      window: w, tokens with distances as trained; less than L.
      leak: k, a whole number by which distances beyond the window are divided; None holds them.

    Raises ValueError for a window below 1, a leak below 2, and methods that do not only rotate.

    >>> from fope_jax.position import RoPE
    >>> ReRoPE(RoPE(), window=512, leak=16).layers()[0].far_from
    512

    Reference: Su 2023, "Rectified Rotary Position Embeddings", github.com/bojone/rerope.
    """

    extends: ClassVar[str] = "yes, without training; distances end at the window"

    leak: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leak is None:
            return
        check_whole("leak", self.leak, 2, "the divisor of distances beyond the window")
        if self.window * (self.leak - 1) > MOST_TOKENS:  # what queries are moved by
            raise ValueError(
                f"leak={self.leak}, window={self.window}: expected window * (leak - 1) of at most "
                f"{MOST_TOKENS}, as positions are int32"
            )
        for layer in self.inner.layers():
            kind = type(layer.method)
            # Frequencies of a subclass of its own are not slowed by a scaling.
            is_rope = getattr(kind, "frequencies", None) is RoPE.frequencies
            if self._has_far_keys(layer) and not is_rope:
                raise ValueError(
                    f"leak={self.leak}, inner holds {kind.__name__}: only RoPE has angles between "
                    "whole positions; leave leak out"
                )

    def _far_method(self, method: PositionEmbedding) -> _TwoVersions:
        if self.leak is None:
            return _Held(method, method, self.window)
        return _Leaky(method, _slower(method, self.leak), self.window, self.leak)


@dataclass(frozen=True)
class _Held(_TwoVersions):
    window: int

    def far_positions(self, positions: Array) -> tuple[Array, Array]:
        keys = jnp.zeros_like(positions)
        return keys + self.window, keys


@dataclass(frozen=True)
class _Leaky(_TwoVersions):
    """With frequencies k times slower, k w - w tokens more are w - w / k at the true ones."""

    window: int
    leak: int

    def far_positions(self, positions: Array) -> tuple[Array, Array]:
        return positions + self.window * (self.leak - 1), positions


@dataclass(frozen=True)
class _Slower(Scaling):
    """All frequencies divided by ``factor``; beside any other scaling, which is as trained."""

    factor: int

    def __call__(self, rotary: RotaryFrequencies, length: Any = None) -> RotaryFrequencies:
        return rotary._replace(inv_freq=rotary.inv_freq / self.factor)


def _slower(method: PositionEmbedding, factor: int) -> RoPE:
    assert isinstance(method, RoPE)
    return dataclasses.replace(method, scaling=(*method.scaling, _Slower(factor)))
