"""Attention by existing kernels: splash on TPU, cuDNN on GPU.

Both mask by a token's index in the row. The mask equals that of ``attention.attend`` only if tokens
are stored by segment and position, as the loader stores them (``is_stored_in_order``). A window
also needs that no position is left out: keys by index would be too many.
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


def fused_attention(
    backend: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    positions: Array,
    segments: Array,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention of whole rows by splash or cudnn, ``[B, T, N, H]`` in the dtype of q.

    A row that the kernel would mask otherwise than ``attend`` is NaN.

    Args:
      backend: "splash" or "cudnn".
      q, k, v: ``[B, T, N, E]``, ``[B, T, K, E]`` and ``[B, T, K, H]``.
      positions, segments: ``[B, T]`` or ``[1, T]`` int32.
      window, chunk: see ``position.base.Layer``.
      sinks: ``[N]``, a further logit a head; splash alone takes it.
    """
    is_in_order = is_stored_in_order(positions, segments, without_gaps=window is not None)
    if chunk is not None:
        # Chunks are documents of their own, and none is longer than a window of as many tokens.
        segments = chunk_segments(positions, segments, chunk)
        window = min(chunk, window or chunk)
    out = _KERNELS[backend](q, k, v, segments, window=window, sinks=sinks)
    return jnp.where(is_in_order[:, None, None, None], out, jnp.nan)


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None = None,
    sinks: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments by jax's splash kernel; ``[B, T, N, H]`` in the dtype of q.

    ``q [B, T, N, E]``, ``k [B, T, K, E]``, ``v [B, T, K, H]``, ``segments`` ``[B, T]`` or
    ``[1, T]`` int32; padding, segment 0, gives zeros. A query sees the last ``window`` tokens of
    the row, its own included; blocks of keys before them are not visited. ``sinks`` ``[N]`` are
    logits of a further key with value 0. ``interpret`` emulates the kernel on any platform,
    slowly. ValueError if T is not a multiple of 128.

    Reference: Dao et al. 2022, "FlashAttention".
    """
    batch, length, num_heads, width = q.shape
    head_dim = v.shape[-1]
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
    mask: masks.Mask = masks.CausalMask((length, length))
    if window is not None and window < length:
        mask = masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = q * jnp.asarray(1 / math.sqrt(head_dim), q.dtype)

    # The kernel needs head dimensions in whole lanes. Zeros change no logit, and no output before
    # the cut below.
    def padded(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % LANES)])

    ids = kernel.SegmentIds(q=segments, kv=segments)
    arguments = {} if sinks is None else {"sinks": sinks}
    out: Any = jax.vmap(lambda *x: attend(*x, **arguments))(padded(q), padded(k), padded(v), ids)
    out = out[..., :head_dim].swapaxes(1, 2)
    return jnp.where(segments[:, :, None, None] == 0, 0, out).astype(q.dtype)


def is_stored_in_order(positions: Array, segments: Array, *, without_gaps: bool = False) -> Array:
    """Whether a row can be masked by stored order, ``[B]`` or ``[1]`` bool.

    Segments must increase along the row, positions within a segment (by 1 ``without_gaps``), and
    padding (segment 0) may stand only between segments.
    """
    positions, segments = jnp.broadcast_arrays(positions, segments)

    def previous(x: Array) -> Array:
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))

    is_new_segment = segments > previous(jax.lax.cummax(segments, axis=1))
    step = positions - previous(positions)
    is_next = (segments == previous(segments)) & ((step == 1) if without_gaps else (step > 0))
    return jnp.all((segments == 0) | is_new_segment | is_next, axis=1)


def chunk_segments(positions: Array, segments: Array, chunk: int) -> Array:
    """Numbers the chunks of all segments of rows in stored order, from 1; padding stays 0.

    >>> import jax.numpy as jnp
    >>> chunk_segments(jnp.array([[2, 3, 4, 0, 1, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]]), 4)
    Array([[1, 1, 2, 3, 3, 0]], dtype=int32)
    """
    positions, segments = jnp.broadcast_arrays(positions, segments)
    chunks = positions // chunk
    is_new = (segments[:, 1:] != segments[:, :-1]) | (chunks[:, 1:] != chunks[:, :-1])
    numbers = 1 + jnp.cumsum(jnp.pad(is_new, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return jnp.where(segments == 0, 0, numbers)


def cudnn_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None = None,
    sinks: None = None,
    implementation: Any = "cudnn",
) -> Array:
    """Causal attention within segments by cuDNN, with a mask ``[B or 1, 1, T, T]``.

    Arguments and result are as for ``splash_attention``, in bfloat16 or float16; the
    ``implementation`` "xla" runs on any platform. ValueError if T is odd, because cuDNN has no
    gradient then, and for sinks.
    """
    if q.shape[1] % 2:
        raise ValueError(f"{q.shape[1]} tokens: cudnn takes even numbers of them")
    if sinks is not None:
        raise ValueError("cudnn takes no attention sinks: attention='chunked' does")
    mask = segments[:, :, None] == segments[:, None, :]
    mask &= jnp.tri(q.shape[1], dtype=bool)[None]
    if window is not None:
        mask &= ~jnp.tri(q.shape[1], k=-window, dtype=bool)[None]
    # The kernel has one head dimension for q, k and v.
    head_dim = v.shape[-1]
    v = jnp.pad(v, [(0, 0), (0, 0), (0, 0), (0, q.shape[-1] - head_dim)])
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=head_dim**-0.5, implementation=implementation
    )[..., :head_dim]
    return jnp.where(segments[:, :, None, None] == 0, 0, out).astype(q.dtype)


_KERNELS = {"splash": splash_attention, "cudnn": cudnn_attention}
