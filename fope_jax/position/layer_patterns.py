"""Patterns of layers as published models have them, each a ``ByLayer`` by its name.

    make("by_layer", preset="gemma3", num_layers=26, window=512)

A preset says where each layer looks and how it knows positions, and nothing else of its model.
Kinds of layers, order and bases are the defaults of transformers' configuration classes; a
checkpoint's own config.json may state other numbers. ``num_layers`` is needed where the model's
layers are no multiple of the pattern: it is then written out, cut after the last layer.
"""

from __future__ import annotations

from fope_jax.position.base import NoPE, PositionEmbedding
from fope_jax.position.checks import check_whole
from fope_jax.position.logit_scaling import LogitScaling
from fope_jax.position.mixing import ByLayer
from fope_jax.position.rope import RoPE
from fope_jax.position.scaling import Llama3, PositionInterpolation, YaRN
from fope_jax.position.windows import LocalChunks, SlidingWindow


def fill_layers(period: tuple[PositionEmbedding, ...], num_layers: int | None = None) -> ByLayer:
    """The pattern that repeats ``period``, cut after ``num_layers``.

    A number of layers that the period divides gives one period. Raises ValueError for fewer layers
    than 1.

    >>> pattern = (SlidingWindow(RoPE(), 512),) * 5 + (RoPE(),)
    >>> [len(fill_layers(pattern, n).methods) for n in (None, 48, 26)]
    [6, 6, 26]
    """
    if num_layers is None:
        return ByLayer(period)
    check_whole("num_layers", num_layers, 1, "layers of the model")
    if num_layers % len(period) == 0:
        return ByLayer(period)
    return ByLayer(tuple(period[index % len(period)] for index in range(num_layers)))


def gemma2(
    *, num_layers: int | None = None, window: int = 4096, theta: float = 10_000.0
) -> ByLayer:
    """Layers with a window and full ones in turn, with one base.

    Reference: Gemma Team 2024, "Gemma 2"; transformers 5.24.0, Gemma2Config.
    """
    rope = RoPE(theta=theta)
    return fill_layers((SlidingWindow(rope, window), rope), num_layers)


def gemma3(
    *,
    num_layers: int | None = None,
    window: int = 1024,
    local_theta: float = 10_000.0,
    theta: float = 1_000_000.0,
    factor: float = 8.0,
) -> ByLayer:
    """Five layers with a window and a small base, then a full one with a large base.

    The full layers' positions are divided by ``factor``. The model of 1B has ``window=512``,
    ``factor=1.0`` and 26 layers, the others 1,024 and 8.

    Reference: Gemma Team 2025, "Gemma 3 Technical Report"; transformers 5.24.0,
    Gemma3TextConfig.
    """
    local = SlidingWindow(RoPE(theta=local_theta), window)
    scaling = () if factor == 1 else (PositionInterpolation(factor),)
    return fill_layers((local,) * 5 + (RoPE(theta=theta, scaling=scaling),), num_layers)


def olmo3(
    *,
    num_layers: int | None = None,
    window: int = 4096,
    theta: float = 500_000.0,
    factor: float = 8.0,
    original_length: int = 8192,
) -> ByLayer:
    """Three layers with a window, then a full one; YaRN on the full ones alone.

    ``factor=1.0`` is the model before its extension.

    Reference: Team OLMo 2025, "Olmo 3"; transformers 5.24.0, Olmo3Config.
    """
    scaling = () if factor == 1 else (YaRN(factor, original_length),)
    local = SlidingWindow(RoPE(theta=theta), window)
    return fill_layers((local,) * 3 + (RoPE(theta=theta, scaling=scaling),), num_layers)


def gpt_oss(
    *,
    num_layers: int | None = None,
    window: int = 128,
    theta: float = 150_000.0,
    factor: float = 32.0,
    original_length: int = 4096,
) -> ByLayer:
    """Layers with a window and full ones in turn, YaRN in all, with a ramp between real numbers.

    The model also has a learned sink a head: ``model.attention_sinks``.

    Reference: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card"; transformers 5.24.0,
    GptOssConfig.
    """
    rope = RoPE(theta=theta, scaling=(YaRN(factor, original_length, truncate=False),))
    return fill_layers((SlidingWindow(rope, window), rope), num_layers)


def smollm3(*, num_layers: int | None = None, theta: float = 2_000_000.0) -> ByLayer:
    """Three layers with RoPE, then one without positions; all see the whole context.

    The base is transformers' default; that of a released checkpoint, extended in stages, stands in
    its config.json, which `fope import` reads.

    Reference: Hugging Face 2025, "SmolLM3"; transformers 5.24.0, SmolLM3Config.
    """
    return fill_layers((RoPE(theta=theta),) * 3 + (NoPE(),), num_layers)


def llama4(
    *,
    num_layers: int | None = None,
    chunk: int = 8192,
    theta: float = 500_000.0,
    factor: float = 16.0,
    original_length: int = 8192,
    floor_scale: int = 8192,
) -> ByLayer:
    """Three layers with RoPE in chunks, then a full one without positions and with a temperature.

    Frequencies with fewer turns than one in ``original_length`` are divided by ``factor`` (1 leaves
    all). The full layers' logits grow at every multiple of ``floor_scale``, see ``LogitScaling``.

    Reference: Meta 2025, Llama 4 Scout; transformers 5.24.0, Llama4TextConfig.
    """
    scaling = () if factor == 1 else (Llama3(factor, original_length, 1.0, 1.0),)
    rope = RoPE(theta=theta, interleaved=True, scaling=scaling)
    full = LogitScaling(NoPE(), form="llama4", training_length=floor_scale)
    return fill_layers((LocalChunks(rope, chunk),) * 3 + (full,), num_layers)


def rnope_swa(
    *, num_layers: int | None = None, window: int = 4096, theta: float = 10_000.0
) -> ByLayer:
    """Three layers with RoPE and a window, then a full one without positions.

    Reference: Yang et al. 2025, "Rope to Nope and Back Again: A New Hybrid Attention Strategy";
    transformers 5.24.0, Cohere2Config.
    """
    local = SlidingWindow(RoPE(theta=theta, interleaved=True), window)
    return fill_layers((local,) * 3 + (NoPE(),), num_layers)


def swan(
    *, training_length: int, window: int, num_layers: int | None = None, theta: float = 10_000.0
) -> ByLayer:
    """A full layer without positions, then three with RoPE and a window; far logits grow.

    The logits of the full layers are multiplied by ln(n) / ln(L) beyond L, ``training_length``
    (``LogitScaling``). The paper scales by a logarithm of the length as well. Two things could not
    be checked against it: its coefficient, and that the full layer comes first.

    Reference: Puvvada et al. 2025, "SWAN-GPT: An Efficient and Scalable Approach for Long-Context
    Language Modeling".
    """
    full = LogitScaling(NoPE(), training_length=training_length)
    local = SlidingWindow(RoPE(theta=theta), window)
    return fill_layers((full, *(local,) * 3), num_layers)


LAYER_PATTERNS = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "olmo3": olmo3,
    "gpt_oss": gpt_oss,
    "smollm3": smollm3,
    "llama4": llama4,
    "rnope_swa": rnope_swa,
    "swan": swan,
}
