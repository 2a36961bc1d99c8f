"""Attention to nearby tokens only, with any method: a sliding window, or chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fope_jax.position.base import Layer, Limits, PositionEmbedding
from fope_jax.position.checks import check_tokens
from fope_jax.position.mixing import Wrapper


class _NearTokens(Wrapper):
    """Base of what hides far keys; how far is counted back from the query."""

    @property
    def limits(self) -> Limits:
        return self.inner.limits._replace(needs_causal_mask=True)


@dataclass(frozen=True)
class SlidingWindow(_NearTokens):
    """A query sees its own token and those less than ``window`` tokens before it.

        query at i sees keys at j with i - w < j <= i, in its own document

    Layers above reach further: n layers see n (w - 1) tokens back. In a pattern with full layers it
    is written in ``ByLayer``; a window in all layers is ``model.windows`` too.

    Knobs:
      inner: the position embedding inside the window.
      window: w, tokens, the query's own included.

    Raises ValueError for a window below 1, and where a layer has a window already.

    >>> from fope_jax.position import NoPE, RoPE, ByLayer
    >>> [layer.window for layer in ByLayer((SlidingWindow(RoPE(), 512), NoPE())).layers()]
    [512, None]

    Reference: Beltagy et al. 2020, "Longformer", Section 3.1; Jiang et al. 2023, "Mistral 7B",
    Section 2.
    """

    extends: ClassVar[str] = "distances beyond the window do not occur"

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tokens("window", self.window, self.inner)

    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer._replace(window=self.window) for layer in self.inner.layers())


@dataclass(frozen=True)
class LocalChunks(_NearTokens):
    """A query sees the tokens of its own chunk, up to itself.

        query at i sees keys at j <= i with floor(j / c) = floor(i / c), in its own document

    Knobs:
      inner: the position embedding inside a chunk.
      chunk: c, tokens.

    Raises ValueError for a chunk below 1, and where a layer has a chunk already.

    >>> from fope_jax.position import RoPE
    >>> LocalChunks(RoPE(), 8192).layers()[0].chunk
    8192

    Reference: the local layers of Llama 4, in Hugging Face transformers 5.24.0 (Llama4TextModel).
    """

    extends: ClassVar[str] = "distances beyond the chunk do not occur"

    chunk: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tokens("chunk", self.chunk, self.inner)

    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer._replace(chunk=self.chunk) for layer in self.inner.layers())


def _check_tokens(name: str, value: int, inner: PositionEmbedding) -> None:
    check_tokens(name, value, "tokens that a query sees, its own included")
    for layer in inner.layers():
        if (stated := getattr(layer, name)) is not None:
            raise ValueError(f"{name}={value}: inner has {name}={stated} already; state it once")
