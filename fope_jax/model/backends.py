"""The choice of the attention program, from the platform, the methods and the shapes.

  reference  any platform; holds ``[B, N, T, S]``
  chunked    any platform; a loop over blocks, the bias computed inside each block
  splash     TPU; jax's Pallas kernel, for methods without a bias
  pallas     TPU; ``bias_kernel.py``, which computes the bias inside the kernel
  cudnn      GPU; ``jax.nn.dot_product_attention``, no bias, an even number of tokens

All take windows, chunks and wide q and k. ALiBi could reach splash as extra head dimensions, but
not exactly: in float32, products with positions of 10^5 round by more than 0.01. CoPE needs whole
rows of scores and is always chunked, and so are on GPU every bias and attention sinks.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fope_jax.position.base import Layer, ModelShape, has_hook

BACKENDS = ("auto", "reference", "chunked", "splash", "pallas", "cudnn")
# Backends that are a single kernel, and the platform of each.
FUSED_BACKENDS = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}
LANES = 128  # TPU kernels take blocks of tokens that are multiples of it
CUDNN_MAX_LENGTH = 8192  # the mask for cuDNN takes a byte per pair of tokens


class BackendChoice(NamedTuple):
    """A backend and the reason for it."""

    name: str
    reason: str


def choose_backend(
    requested: str,
    *,
    platform: str,
    layers: Sequence[Layer],
    length: int,
    shape: ModelShape,
    dtype: str,
    sinks: bool = False,
    context: int = 1,
    compute_capability: str | None = None,
    derivatives: str = "reverse",
) -> BackendChoice:
    """The attention backend of a program; ValueError with every reason if ``requested`` cannot run.

    Args:
      requested: one of ``BACKENDS``; "auto" takes the fastest that can run.
      platform: "cpu", "tpu" or "gpu", of the devices that will run the program.
      layers: one period of the model's layers, from ``layer_pattern``.
      length: tokens of a row, shared by ``context`` devices.
      shape: of the model; head_dim is that of values, and of q and k before a method widens them.
      dtype: of values, queries and keys.
      sinks: whether the model has attention sinks.
      compute_capability: of a GPU, such as "9.0"; None if unknown.
      derivatives: "reverse", or "all" for forward mode as well.

    >>> from fope_jax.position import ALiBi, ByLayer, FoPE
    >>> shape = ModelShape(512, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=64)
    >>> shapes = {"length": 4096, "shape": shape, "dtype": "bfloat16"}
    >>> choose_backend("auto", platform="tpu", layers=FoPE(512).layers(), **shapes).name
    'splash'
    >>> pattern = ByLayer((FoPE(512), ALiBi())).layers()
    >>> choose_backend("auto", platform="tpu", layers=pattern, **shapes).name
    'pallas'
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention={requested!r}: expected one of {', '.join(BACKENDS)}")
    if requested in ("reference", "chunked"):
        return BackendChoice(requested, "as configured")
    reasons_against = functools.partial(
        _reasons_against,
        platform=platform,
        layers=layers,
        length=length,
        shape=shape,
        dtype=dtype,
        sinks=sinks,
        context=context,
        compute_capability=compute_capability,
        derivatives=derivatives,
    )
    if requested != "auto":
        if reasons := reasons_against(requested):
            raise ValueError(
                f"attention={requested!r} cannot run: {'; '.join(reasons)}. "
                "attention='auto' takes what can"
            )
        return BackendChoice(requested, "as configured")
    candidates = [name for name, needed in FUSED_BACKENDS.items() if needed == platform]
    if not candidates:
        return BackendChoice("chunked", f"platform {platform} has no fused kernel")
    excluded = []
    for name in candidates:
        if not (reasons := reasons_against(name)):
            kernel = f"the fused kernel of platform {platform}"
            return BackendChoice(name, "; ".join([kernel, *excluded]))
        excluded.append(f"{name} cannot run: {', '.join(reasons)}")
    return BackendChoice("chunked", "; ".join(excluded))


def gpu_compute_capability(device: Any) -> str | None:
    """The compute capability of a GPU, such as "9.0"; None for other devices."""
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def reasons_against_layer(name: str, layer: Layer) -> list[str]:
    """Why the fused kernel ``name`` cannot compute a layer's logits, on any platform."""
    method, label = layer.method, type(layer.method).__name__
    if name == "pallas":
        return [f"{label} needs whole rows of scores"] * has_hook(method, "contextual_bias")
    reasons = []
    if has_hook(method, "bias") or has_hook(method, "contextual_bias"):
        reasons.append(f"{label} adds a bias to the logits")
    if has_hook(method, "running_bias"):
        reasons.append(f"{label} adds a running sum to the logits")
    if layer.far_from is not None:
        reasons.append(f"{label} has other logits for keys {layer.far_from} tokens back or further")
    return reasons


def splash_has_sinks() -> bool:
    """Whether the splash of the installed jax takes attention sinks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return "sinks" in inspect.signature(splash_attention_kernel.attention_reference).parameters


def query_width(layer: Layer, shape: ModelShape) -> int:
    """E, the dimensions of a query head after ``rotate``.

    >>> from fope_jax.position import RoPE
    >>> query_width(RoPE().layers()[0], ModelShape(128, 1, 2, 2, 64))
    64
    """

    def rotated(key: jax.Array) -> jax.Array:
        variables = layer.method.init(key, shape).at_layer(0)
        tables = layer.method.tables(variables, jnp.zeros((1, 1), jnp.int32), shape.head_dim)
        q, k = (
            jnp.zeros((1, 1, heads, shape.head_dim))
            for heads in (shape.num_heads, shape.num_kv_heads)
        )
        return layer.method.rotate(variables, tables, q, k)[0]

    return jax.eval_shape(rotated, jax.random.key(0)).shape[-1]


def visited_blocks(
    num_blocks: int, block: int, window: int | None = None, chunk: int | None = None
) -> int:
    """How many blocks of scores are computed for a row of one document, ``num_blocks`` long.

    >>> visited_blocks(4, 512), visited_blocks(4, 512, chunk=1024)
    (10, 6)
    >>> visited_blocks(64, 512, window=512)
    127
    """
    total = 0
    for index in range(num_blocks):
        first = 0 if window is None else max(0, index * block - window + 1)
        if chunk is not None:
            first = max(first, index * block // chunk * chunk)
        total += index - first // block + 1
    return total


def range_scope(window: int | None, chunk: int | None) -> str:
    """The name in profiles of attention with this window and chunk, which `fope plan` reads.

    >>> range_scope(512, None), range_scope(None, None)
    ('window_512', 'all_tokens')
    """
    limits = {"window": window, "chunk": chunk}
    return "_".join(f"{name}_{n}" for name, n in limits.items() if n is not None) or "all_tokens"


def range_of_scope(names: str) -> tuple[int | None, int | None]:
    """Window and chunk in a name stack.

    >>> range_of_scope("jit(step)/transpose(jvp(window_512))/while")
    (512, None)
    """
    found = [re.search(rf"{name}_(\d+)", names) for name in ("window", "chunk")]
    window, chunk = (int(match[1]) if match else None for match in found)
    return window, chunk


def _reasons_against(
    name: str,
    *,
    platform: str,
    layers: Sequence[Layer],
    length: int,
    shape: ModelShape,
    dtype: str,
    sinks: bool,
    context: int,
    compute_capability: str | None,
    derivatives: str,
) -> list[str]:
    """Why the fused kernel ``name`` cannot run the program; empty if it can."""
    reasons = []
    needed = FUSED_BACKENDS[name]
    if platform != needed:
        reasons.append(f"it needs platform {needed}, this is {platform}")
    of_layers = [reason for layer in layers for reason in reasons_against_layer(name, layer)]
    reasons += sorted(set(of_layers))
    if sinks and (name == "cudnn" or (name == "splash" and not splash_has_sinks())):
        reasons.append("it takes no attention sinks")
    if context > 1 and name != "pallas":
        reasons.append(f"mesh.context={context}: queries and keys begin at different tokens")
    if needed == "tpu" and length % (LANES * context):
        share = f" on each of mesh.context={context} devices" if context > 1 else ""
        reasons.append(f"{length} tokens a row are no multiple of {LANES}{share}")
    if name == "cudnn":
        width = max(query_width(layer, shape) for layer in layers)
        reasons += _reasons_against_cudnn(length, shape.head_dim, width, dtype, compute_capability)
    if derivatives == "all":
        reasons.append("derivatives='all': its gradient is written out, for reverse mode")
    return reasons


def _reasons_against_cudnn(
    length: int, head_dim: int, width: int, dtype: str, compute_capability: str | None
) -> list[str]:
    reasons = []
    largest_head = 128
    if compute_capability is not None:
        major = compute_capability.partition(".")[0]
        if not major.isdecimal():  # AMD, such as "gfx942"
            reasons.append(f"it needs a GPU of NVIDIA, this is {compute_capability}")
        elif int(major) < 8:
            reasons.append(f"it needs compute capability 8.0, this is {compute_capability}")
        elif int(major) >= 9:
            largest_head = 256
    if dtype not in ("bfloat16", "float16"):
        reasons.append(f"{dtype}: it computes in bfloat16 or float16")
    if width > largest_head or width % 8:
        widened = f", of queries {width}" if width != head_dim else ""
        reasons.append(
            f"head_dim={head_dim}{widened}: it takes multiples of 8 up to {largest_head}"
        )
    if length % 2:
        reasons.append(f"{length} tokens a row: it takes even numbers, for the gradient of a mask")
    if length > CUDNN_MAX_LENGTH:
        reasons.append(f"the mask of {length} tokens is quadratic; up to {CUDNN_MAX_LENGTH}")
    return reasons
