"""Which attention runs: chosen from the platform, the methods and the shapes, or forced.

  reference  any platform; holds ``[B, N, T, S]``
  chunked    any platform; a loop over blocks, the bias computed inside each block
  splash     TPU; the Pallas kernel that comes with jax, for methods without a bias
  pallas     TPU; our own kernel, which computes the bias inside (``bias_kernel.py``)
  cudnn      GPU; cuDNN's fused kernel through ``jax.nn.dot_product_attention``, without a bias, for
             even numbers of tokens

Splash takes no bias. ALiBi as extra dimensions of the heads would be one, but not an exact one:
products with positions of 10^5 tokens and more are summed with the logits in float32, whose steps
there are larger than a hundredth. In our kernel it is the product of a slope and a whole number.
CoPE needs whole rows of scores and is chunked everywhere, as every bias is on GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fope_jax.position.base import PositionEmbedding, has_hook

BACKENDS = ("auto", "reference", "chunked", "splash", "pallas", "cudnn")
# Backends that are one kernel, and the platform that each runs on.
FUSED_BACKENDS = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}
LANES = 128  # kernels for TPU work on blocks of tokens that are multiples of it
CUDNN_MAX_LENGTH = 8192  # cudnn is given a mask of a byte a pair of tokens


class BackendChoice(NamedTuple):
    """A backend that can run, and why it is this one."""

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
    """The backend for one program, decided before anything is computed.

    Args:
      requested: one of ``BACKENDS``; "auto" takes the fastest that can run.
      platform: "cpu", "tpu" or "gpu", of the devices that the program is for.
      methods: position embeddings of all layers that the program is for.
      length: tokens of a row.
      head_dim: of a head.
      dtype: of queries and keys.
      context: devices that share the tokens of a row.
      compute_capability: of a GPU, such as "9.0"; None where it is not known.
      derivatives: "reverse", or "all" where forward mode is wanted too.

    Raises:
      ValueError: the requested backend cannot run here, with every reason.

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
    against = {
        "splash": _against_splash(platform, methods, length, context),
        "pallas": _against_pallas(platform, methods, length, context),
        "cudnn": _against_cudnn(
            platform, methods, length, head_dim, dtype, context, compute_capability
        ),
    }
    if derivatives == "all":
        against = {
            name: [*found, "derivatives='all': its gradient is written out, for reverse mode"]
            for name, found in against.items()
        }
    if requested != "auto":
        if against[requested]:
            raise ValueError(
                f"attention={requested!r} cannot run: {'; '.join(against[requested])}. "
                "attention='auto' takes what can"
            )
        return BackendChoice(requested, "as configured")
    candidates = {"tpu": ("splash", "pallas"), "gpu": ("cudnn",)}.get(platform, ())
    if not candidates:
        return BackendChoice("chunked", f"platform {platform} has no fused kernel")
    passed = []
    for name in candidates:
        if not against[name]:
            return BackendChoice(
                name, "; ".join([f"the fused kernel of platform {platform}", *passed])
            )
        passed.append(f"{name} cannot run: {', '.join(against[name])}")
    return BackendChoice("chunked", "; ".join(passed))


def gpu_compute_capability(device: Any) -> str | None:
    """The compute capability of a GPU, such as "9.0"; None of other devices."""
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def _against_splash(
    platform: str, methods: Sequence[PositionEmbedding], length: int, context: int
) -> list[str]:
    found = _against_biases("tpu", platform, methods)
    found += _against_context(context)
    return found + _against_lanes(length, context)


def _against_pallas(
    platform: str, methods: Sequence[PositionEmbedding], length: int, context: int
) -> list[str]:
    found = _against_platform("tpu", platform)
    contextual = {type(m).__name__ for m in methods if has_hook(m, "contextual_bias")}
    found += [f"{name} needs whole rows of scores" for name in sorted(contextual)]
    return found + _against_lanes(length, context)


def _against_cudnn(
    platform: str,
    methods: Sequence[PositionEmbedding],
    length: int,
    head_dim: int,
    dtype: str,
    context: int,
    compute_capability: str | None,
) -> list[str]:
    found = _against_biases("gpu", platform, methods)
    found += _against_context(context)
    largest = 128
    if compute_capability is not None:
        generation = _generation(compute_capability)
        if generation is None:  # of AMD, such as "gfx942"
            found.append(f"it needs a GPU of NVIDIA, this is {compute_capability}")
        elif generation < 8:
            found.append(f"it needs compute capability 8.0, this is {compute_capability}")
        elif generation >= 9:
            largest = 256
    if dtype not in ("bfloat16", "float16"):
        found.append(f"{dtype}: it computes in bfloat16 or float16")
    if head_dim > largest or head_dim % 8:
        found.append(f"head_dim={head_dim}: it takes multiples of 8 up to {largest}")
    if length % 2:
        found.append(f"{length} tokens a row: it takes even numbers, for the gradient of a mask")
    if length > CUDNN_MAX_LENGTH:
        found.append(f"the mask of {length} tokens is quadratic; up to {CUDNN_MAX_LENGTH}")
    return found


def _generation(compute_capability: str) -> int | None:
    """The part before the point; None where it is no number."""
    major = compute_capability.partition(".")[0]
    return int(major) if major.isdecimal() else None


def _against_platform(needed: str, platform: str) -> list[str]:
    return [] if platform == needed else [f"it needs platform {needed}, this is {platform}"]


def _against_biases(needed: str, platform: str, methods: Sequence[PositionEmbedding]) -> list[str]:
    found = _against_platform(needed, platform)
    hooks = ("bias", "contextual_bias")
    biased = {type(m).__name__ for m in methods if any(has_hook(m, hook) for hook in hooks)}
    return found + [f"{name} adds a bias to the logits" for name in sorted(biased)]


def _against_context(context: int) -> list[str]:
    if context == 1:
        return []
    return [f"mesh.context={context}: queries and keys begin at different tokens"]


def _against_lanes(length: int, context: int) -> list[str]:
    if length % (LANES * context) == 0:
        return []
    own = f" on each of mesh.context={context} devices" if context > 1 else ""
    return [f"{length} tokens a row are no multiple of {LANES}{own}"]
