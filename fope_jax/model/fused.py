"""Attention by existing kernels: splash on TPU, cuDNN on GPU.

Both mask by a token's index in the row. The mask equals that of ``attention.attend`` only if tokens
are stored by segment and position, as the loader stores them (``is_stored_in_order``).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from fope_jax.model.backends import LANES
from fope_jax.typing import Array

_BLOCK = 512  # tokens, if the length is a multiple of it


def splash_attention(
    q: Array, k: Array, v: Array, segments: Array, *, interpret: bool = False
) -> Array:
    """Causal attention within segments by the splash kernel.

    Args:
      q: ``[B, T, N, H]``, T a multiple of 128.
      k: ``[B, T, K, H]``.
      v: ``[B, T, K, H]``.
      segments: ``[B, T]`` or ``[1, T]`` int32; 0 is padding and gives zeros.
      interpret: emulates the kernel on any platform, slowly.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``q``.

    Raises:
      ValueError: T is not a multiple of 128.

    Reference: Dao et al. 2022, "FlashAttention"; the kernel is jax's.
    """
    batch, length, num_heads, head_dim = q.shape
    if length % LANES:
        raise ValueError(f"{length} tokens: splash takes multiples of {LANES}")
    segments = jnp.broadcast_to(segments, (batch, length))
    block = _BLOCK if length % _BLOCK == 0 else LANES
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads)
    attend = kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q = q * jnp.asarray(1 / math.sqrt(head_dim), q.dtype)
    # The kernel needs head_dim in whole lanes. Zero dimensions change no logit; they are cut off
    # below.
    lanes = [(0, 0), (0, 0), (0, 0), (0, -head_dim % LANES)]
    q, k, v = (jnp.pad(x.swapaxes(1, 2), lanes) for x in (q, k, v))
    ids = kernel.SegmentIds(q=segments, kv=segments)
    out: Any = jax.vmap(attend)(q, k, v, segment_ids=ids)
    out = out[..., :head_dim].swapaxes(1, 2)
    return jnp.where(segments[:, :, None, None] == 0, 0, out).astype(q.dtype)


def is_stored_in_order(positions: Array, segments: Array) -> Array:
    """Whether a row can be masked by stored order, ``[B]`` or ``[1]`` bool.

    Segments must increase along the row, positions within a segment, and padding (segment 0) may
    stand only between segments.
    """
    positions, segments = jnp.broadcast_arrays(positions, segments)

    def previous(x: Array) -> Array:
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))

    is_new_segment = segments > previous(jax.lax.cummax(segments, axis=1))
    is_next = (segments == previous(segments)) & (positions > previous(positions))
    return jnp.all((segments == 0) | is_new_segment | is_next, axis=1)


def cudnn_attention(
    q: Array, k: Array, v: Array, segments: Array, *, implementation: Any = "cudnn"
) -> Array:
    """Causal attention within segments by cuDNN, with a mask ``[B or 1, 1, T, T]``.

    Args:
      q: ``[B, T, N, H]`` bfloat16 or float16.
      k: ``[B, T, K, H]``.
      v: ``[B, T, K, H]``.
      segments: ``[B, T]`` or ``[1, T]`` int32; 0 is padding and gives zeros.
      implementation: "xla" runs the same call on any platform.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``q``.

    Raises:
      ValueError: T is odd, for which cuDNN has no gradient.
    """
    if q.shape[1] % 2:
        raise ValueError(f"{q.shape[1]} tokens: cudnn takes even numbers of them")
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tri(q.shape[1], dtype=bool)[None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=(same & causal)[:, None], implementation=implementation
    )
    return jnp.where(segments[:, :, None, None] == 0, 0, out).astype(q.dtype)
