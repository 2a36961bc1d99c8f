"""Several position embeddings in one model: by layer, or by dimension of a head."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    GROUPS,
    Layer,
    Limits,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    has_hook,
    select,
    with_scope,
)
from fope_jax.position.checks import as_tuple, check_number
from fope_jax.typing import Array


class WithoutHooks:
    """Hooks that raise, for methods used through ``layers``; the base class's would do nothing."""

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} has no hooks of its own: call those of the methods that "
            "layers() gives"
        )

    embed = tables = rotate = bias = contextual_bias = running_bias = _raise


@dataclass(frozen=True)
class Wrapper(WithoutHooks, PositionEmbedding, abc.ABC):
    """Base of what changes the layers of another method, ``inner``, and shares its variables."""

    kind: ClassVar[str] = "composition"
    inner_kind: ClassVar[str] = "a method"  # what messages call ``inner``

    inner: PositionEmbedding

    def __post_init__(self) -> None:
        if not isinstance(self.inner, PositionEmbedding):
            raise ValueError(f"inner={self.inner!r}: expected {self.inner_kind} such as RoPE()")

    def check(self, shape: ModelShape) -> None:
        self.inner.check(shape)

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        return self.inner.frequencies(head_dim)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        return self.inner.init(key, shape)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return self.inner.variable_axes(name)

    @abc.abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """The inner method's layers, changed."""


@dataclass(frozen=True)
class _Mixture(PositionEmbedding, abc.ABC):
    """Base of the mixtures: method i serves ``shapes(shape)[i]``, its variables are "i.name"."""

    kind: ClassVar[str] = "composition"
    extends: ClassVar[str] = "as its methods"

    methods: tuple[PositionEmbedding, ...]

    def __post_init__(self) -> None:
        methods = as_tuple("methods", self.methods, "methods such as RoPE()")
        object.__setattr__(self, "methods", methods)
        if not self.methods:
            raise ValueError("methods=(): at least one is needed")
        for method in self.methods:
            if not isinstance(method, PositionEmbedding):
                raise ValueError(f"methods holds {method!r}: expected methods such as RoPE()")
            if any(has_hook(layer.method, "embed") for layer in method.layers()):
                raise ValueError(
                    f"methods holds {type(method).__name__}: it changes the token embeddings, "
                    "which no layer and no dimension of a head has to itself"
                )

    @abc.abstractmethod
    def shapes(self, shape: ModelShape) -> list[ModelShape]:
        """The shape that each method serves; ValueError if the model cannot be divided so."""

    def check(self, shape: ModelShape) -> None:
        for method, method_shape in zip(self.methods, self.shapes(shape), strict=True):
            method.check(method_shape)

    @property
    def limits(self) -> Limits:
        lengths, causal, following = zip(*(method.limits for method in self.methods), strict=True)
        known = [length for length in lengths if length is not None]
        return Limits(min(known, default=None), any(causal), any(following))

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        merged: dict[str, Variables] = {group: {} for group in GROUPS}
        for index, (method, method_shape) in enumerate(
            zip(self.methods, self.shapes(shape), strict=True)
        ):
            drawn = method.init(jax.random.fold_in(key, index), method_shape)
            drawn = with_scope(drawn, f"{index}.")
            for group in GROUPS:
                merged[group] |= getattr(drawn, group)
        return PositionVariables(**merged)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        index, name = name.split(".", 1)
        return self.methods[int(index)].variable_axes(name)


def _join(frequencies: list[np.ndarray | None]) -> np.ndarray | None:
    known = [values for values in frequencies if values is not None]
    return np.concatenate(known) if known else None


@dataclass(frozen=True)
class ByLayer(WithoutHooks, _Mixture):
    """A pattern of methods that repeats over the layers.

        layer l uses methods[l mod P],  P = len(methods)

    ``ByLayer((RoPE(), RoPE(), RoPE(), NoPE()))`` leaves every fourth layer without positions;
    ``(RoPE(theta=10_000.0),) * 5 + (RoPE(theta=1_000_000.0),)`` has local and global bases.

    Knobs:
      methods: one method per layer of the pattern; their number divides the model's layers. Methods
        that change token embeddings are refused, because those belong to no layer.

    Reference: Yang et al. 2025, "Rope to Nope and Back Again: A New Hybrid Attention Strategy";
    Gemma Team 2025, "Gemma 3 Technical Report", Section 2, for two bases.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            if any(layer.scope for layer in method.layers()):
                raise ValueError(
                    f"methods holds a {type(method).__name__}: write one pattern in place of two"
                )

    def shapes(self, shape: ModelShape) -> list[ModelShape]:
        period = len(self.methods)
        if shape.num_layers % period:
            raise ValueError(
                f"methods has {period} entries: num_layers={shape.num_layers} is not a multiple "
                "of it; a pattern that ends within a period is written out with an entry for each "
                f"layer, as a preset does with num_layers={shape.num_layers}"
            )
        return [shape._replace(num_layers=shape.num_layers // period)] * period

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        return _join([method.frequencies(head_dim) for method in self.methods])

    def layers(self) -> tuple[Layer, ...]:
        return tuple(
            method.layers()[0]._replace(scope=f"{index}.")
            for index, method in enumerate(self.methods)
        )


@dataclass(frozen=True)
class ByShare(_Mixture):
    """The dimensions of each head, divided among methods.

        q = [q_1, q_2, ..],  k = [k_1, k_2, ..],  q.k = sum_i rotate_i(q_i).rotate_i(k_i)

    ``ByShare((RoPE(), NoPE()), (0.25, 0.75))`` is partial rotary on a quarter of the head. A
    method's temperature (YaRN) scales its own term only.

    Knobs:
      methods: rotations, and NoPE for dimensions without position.
      shares: the share of head_dim of each; they sum to 1.

    Reference: Black et al. 2022, "GPT-NeoX-20B", Section 2.1.1 (partial rotary).
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shares", as_tuple("shares", self.shares, "numbers above 0"))
        for index, share in enumerate(self.shares):
            check_number(f"shares[{index}]", share, "a share of head_dim")
        for method in self.methods:
            hooks = ("bias", "contextual_bias", "running_bias")
            if any(has_hook(method, hook) for hook in hooks) or method.layers() != (Layer(method),):
                raise ValueError(
                    f"methods holds {type(method).__name__}: only a method that rotates dimensions "
                    "has a share of them"
                )
        if len(self.shares) != len(self.methods):
            raise ValueError(
                f"shares has {len(self.shares)} entries: methods has {len(self.methods)}"
            )
        if not all(share > 0 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares={self.shares}: expected numbers above 0 that sum to 1")

    def dims(self, head_dim: int) -> list[int]:
        """The number of dimensions of each method; ValueError if a share is not a whole number."""
        dims = [share * head_dim for share in self.shares]
        if any(abs(dim - round(dim)) > 1e-6 or round(dim) < 1 for dim in dims):
            raise ValueError(
                f"shares={self.shares}: {[float(f'{d:.10g}') for d in dims]} of "
                f"head_dim={head_dim} dimensions; expected whole numbers, 1 or more"
            )
        return [round(dim) for dim in dims]

    def shapes(self, shape: ModelShape) -> list[ModelShape]:
        return [shape._replace(head_dim=dim) for dim in self.dims(shape.head_dim)]

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        pairs = zip(self.methods, self.dims(head_dim), strict=True)
        return _join([method.frequencies(dim) for method, dim in pairs])

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> tuple[Any, ...]:
        pairs = enumerate(zip(self.methods, self.dims(head_dim), strict=True))
        return tuple(
            method.tables(select(variables, f"{index}."), positions, dim)
            for index, (method, dim) in pairs
        )

    def rotate(
        self, variables: Variables, tables: tuple[Any, ...], q: Array, k: Array
    ) -> tuple[Array, Array]:
        edges = np.cumsum(self.dims(q.shape[-1]))[:-1]
        slices = zip(jnp.split(q, edges, axis=-1), jnp.split(k, edges, axis=-1), strict=True)
        rotated = [
            method.rotate(select(variables, f"{index}."), tables[index], *q_and_k)
            for index, (method, q_and_k) in enumerate(zip(self.methods, slices, strict=True))
        ]
        # A method with a matrix per query head repeats k to N heads; the other slices must match.
        heads = max(k.shape[2] for _, k in rotated)
        keys = [jnp.repeat(k, heads // k.shape[2], axis=2) for _, k in rotated]
        return jnp.concatenate([q for q, _ in rotated], axis=-1), jnp.concatenate(keys, axis=-1)
