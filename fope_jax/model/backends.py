"""The choice of the attention program, from the platform, the methods and the shapes.

  reference  any platform; holds ``[B, N, T, S]``
  chunked    any platform; a loop over blocks, the bias computed inside each block
  splash     TPU; jax's Pallas kernel, for methods without a bias
  pallas     TPU; ``bias_kernel.py``, which computes the bias inside the kernel
  cudnn      GPU; ``jax.nn.dot_product_attention``, no bias, an even number of tokens

ALiBi could reach splash as extra head dimensions, but not exactly: in float32, products with
positions of 10^5 round by more than 0.01. CoPE needs whole rows of scores and is always chunked,
and so is every bias on GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fope_jax.position.base import PositionEmbedding, has_hook

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
    methods: Sequence[PositionEmbedding],
    length: int,
    head_dim: int,
    dtype: str,
    context: int = 1,
    compute_capability: str | None = None,
    derivatives: str = "reverse",
) -> BackendChoice:
    """Chooses the attention backend of a program before it is compiled.

    Args:
      requested: one of ``BACKENDS``; "auto" takes the fastest that can run.
      platform: "cpu", "tpu" or "gpu", of the devices that will run the program.
      methods: position embeddings of all layers.
      length: tokens of a row.
      head_dim: H.
      dtype: of queries and keys.
      context: devices that share the tokens of a row.
      compute_capability: of a GPU, such as "9.0"; None if unknown.
      derivatives: "reverse", or "all" for forward mode as well.

    Raises:
      ValueError: the requested backend cannot run, with every reason.

    >>> from fope_jax.position import ALiBi, FoPE
    >>> shapes = {"length": 4096, "head_dim": 64, "dtype": "bfloat16"}
    >>> choose_backend("auto", platform="tpu", methods=[FoPE(512)], **shapes).name
    'splash'
    >>> choose_backend("auto", platform="tpu", methods=[FoPE(512), ALiBi()], **shapes).name
    'pallas'
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention={requested!r}: expected one of {', '.join(BACKENDS)}")
    if requested in ("reference", "chunked"):
        return BackendChoice(requested, "as configured")
    reasons_against = functools.partial(
        _reasons_against,
        platform=platform,
        methods={type(method).__name__: method for method in methods},
        length=length,
        head_dim=head_dim,
        dtype=dtype,
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


def _reasons_against(
    name: str,
    *,
    platform: str,
    methods: dict[str, PositionEmbedding],
    length: int,
    head_dim: int,
    dtype: str,
    context: int,
    compute_capability: str | None,
    derivatives: str,
) -> list[str]:
    """Why the fused kernel ``name`` cannot run the program; empty if it can."""
    reasons = []
    needed = FUSED_BACKENDS[name]
    if platform != needed:
        reasons.append(f"it needs platform {needed}, this is {platform}")
    for label, method in sorted(methods.items()):
        is_contextual = has_hook(method, "contextual_bias")
        if name == "pallas" and is_contextual:
            reasons.append(f"{label} needs whole rows of scores")
        elif name != "pallas" and (is_contextual or has_hook(method, "bias")):
            reasons.append(f"{label} adds a bias to the logits")
    if context > 1 and name != "pallas":
        reasons.append(f"mesh.context={context}: queries and keys begin at different tokens")
    if needed == "tpu" and length % (LANES * context):
        share = f" on each of mesh.context={context} devices" if context > 1 else ""
        reasons.append(f"{length} tokens a row are no multiple of {LANES}{share}")
    if name == "cudnn":
        reasons += _reasons_against_cudnn(length, head_dim, dtype, compute_capability)
    if derivatives == "all":
        reasons.append("derivatives='all': its gradient is written out, for reverse mode")
    return reasons


def _reasons_against_cudnn(
    length: int, head_dim: int, dtype: str, compute_capability: str | None
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
    if head_dim > largest_head or head_dim % 8:
        reasons.append(f"head_dim={head_dim}: it takes multiples of 8 up to {largest_head}")
    if length % 2:
        reasons.append(f"{length} tokens a row: it takes even numbers, for the gradient of a mask")
    if length > CUDNN_MAX_LENGTH:
        reasons.append(f"the mask of {length} tokens is quadratic; up to {CUDNN_MAX_LENGTH}")
    return reasons
