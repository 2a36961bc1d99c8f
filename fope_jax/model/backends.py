"""Which attention runs: chosen from the platform, the method and the shapes, or forced.

  reference  any platform; holds ``[B, N, T, S]``
  chunked    any platform; a loop over blocks, the bias computed inside each block
  splash     TPU; the Pallas kernel that comes with jax, for methods without a bias
  cudnn      GPU; cuDNN's fused kernel through ``jax.nn.dot_product_attention``, without a bias

A method with a bias (ALiBi, T5, KERPLE, FIRE, CoPE) is chunked on every platform: the fused kernels
take none, or only one that is there as ``[N, T, S]``, which is what chunked attention is there to
avoid. (ALiBi as extra dimensions of the heads cannot be exact in such a kernel: products with
positions of 10^5 tokens and more would be summed with the logits in float32, whose steps there are
larger than a hundredth.)
"""

from __future__ import annotations

from typing import NamedTuple

from fope_jax.position.base import PositionEmbedding

BACKENDS = ("auto", "reference", "chunked", "splash", "cudnn")
LANES = 128  # splash works on blocks of tokens that are multiples of it
FULL_MASK_TOKENS = 8192  # cudnn is given a mask of a byte a pair of tokens


class Choice(NamedTuple):
    """A backend that can run, and why it is this one."""

    name: str
    reason: str


def choose_backend(
    requested: str,
    *,
    platform: str,
    position: PositionEmbedding,
    length: int,
    head_dim: int,
    dtype: str,
    context: int = 1,
) -> Choice:
    """The backend for one program, decided before anything is computed.

    Args:
      requested: one of ``BACKENDS``; "auto" takes the fastest that can run.
      platform: "cpu", "tpu" or "gpu", of the devices that the program is for.
      position: the model's.
      length: tokens of a row.
      head_dim: of a head.
      dtype: of queries and keys.
      context: devices that share the tokens of a row.

    Raises:
      ValueError: the requested backend cannot run here, with every reason.

    >>> from fope_jax.position import ALiBi, FoPE
    >>> shapes = {"length": 4096, "head_dim": 64, "dtype": "bfloat16"}
    >>> choose_backend("auto", platform="tpu", position=FoPE(512), **shapes).name
    'splash'
    >>> choose_backend("auto", platform="tpu", position=ALiBi(), **shapes).name
    'chunked'
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention={requested!r}: expected one of {', '.join(BACKENDS)}")
    if requested in ("reference", "chunked"):
        return Choice(requested, "as configured")
    against = {
        "splash": _against_splash(platform, position, length, context),
        "cudnn": _against_cudnn(platform, position, length, head_dim, dtype, context),
    }
    if requested != "auto":
        if against[requested]:
            raise ValueError(
                f"attention={requested!r} cannot run: {'; '.join(against[requested])}. "
                "attention='auto' takes what can"
            )
        return Choice(requested, "as configured")
    fused = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if fused is None:
        return Choice("chunked", f"platform {platform} has no fused kernel")
    if against[fused]:
        return Choice("chunked", f"{fused} cannot run: {'; '.join(against[fused])}")
    return Choice(fused, f"the fused kernel of platform {platform}")


def _against_splash(
    platform: str, position: PositionEmbedding, length: int, context: int
) -> list[str]:
    found = _against_fused("tpu", platform, position, context)
    if length % LANES:
        found.append(f"{length} tokens a row are no multiple of {LANES}")
    return found


def _against_cudnn(
    platform: str,
    position: PositionEmbedding,
    length: int,
    head_dim: int,
    dtype: str,
    context: int,
) -> list[str]:
    found = _against_fused("gpu", platform, position, context)
    if dtype not in ("bfloat16", "float16"):
        found.append(f"{dtype}: it computes in bfloat16 or float16")
    if head_dim > 128 or head_dim % 8:
        found.append(f"head_dim={head_dim}: it takes multiples of 8 up to 128")
    if length > FULL_MASK_TOKENS:
        found.append(f"the mask of {length} tokens is quadratic; up to {FULL_MASK_TOKENS}")
    return found


def _against_fused(
    needed: str, platform: str, position: PositionEmbedding, context: int
) -> list[str]:
    found = []
    if platform != needed:
        found.append(f"it needs platform {needed}, this is {platform}")
    if position.has_bias or position.has_contextual_bias:
        found.append(f"{type(position).__name__} adds a bias to the logits")
    if context > 1:
        found.append(f"mesh.context={context}: queries and keys begin at different tokens")
    return found
