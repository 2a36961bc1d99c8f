"""The shape of the transformer and its runtime settings."""

from __future__ import annotations

from dataclasses import dataclass

from fope_jax.model.backends import BACKENDS
from fope_jax.model.layers import DERIVATIVES
from fope_jax.position.base import ModelShape
from fope_jax.position.checks import (
    check_above_zero,
    check_spread,
    check_switches,
    check_tokens,
    check_whole,
)

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
NORMS = ("pre", "post")
QK_NORMS = ("none", "head", "width")
# Fields that may change after training.
RUNTIME_FIELDS = (
    "scan_layers",
    "remat",
    "attention",
    "attention_block",
    "derivatives",
    "dtype",
    "init_std",
)
_CHOICES = {
    "norm": NORMS,
    "qk_norm": QK_NORMS,
    "attention": BACKENDS,
    "remat": REMAT,
    "derivatives": DERIVATIVES,
    "dtype": DTYPES,
    "param_dtype": DTYPES,
}


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of the transformer and its runtime settings; position knobs belong to the method.

    Attributes:
      vocab_size: rows of the embedding, V.
      d_model: model width, D.
      num_layers: layers, L.
      num_heads: query heads, N.
      mlp_dim: hidden width of each SwiGLU branch.
      num_kv_heads: key-value heads K, a divisor of N; None means N.
      head_dim: H; None means ``d_model // num_heads``.
      norm: "pre" normalises the input of attention and MLP (Llama), "post" their output (OLMo 2).
      qk_norm: RMS norm of q and k before the rotation: "none"; "head", each head by itself with one
        scale shared by the heads of a layer (Qwen 3); "width", all heads together with a scale per
        dimension (OLMo 2). True and False, from older configurations, mean "head" and "none".
      qkv_bias: adds a learned bias to queries, keys and values, before any norm and the rotation
        (Qwen 2); no other matrix has one.
      windows: a pattern over the layers, repeated, of tokens that a query sees, its own included
        (``position/windows.py``); None is a layer that sees the whole context. ``(4096, 4096, 4096,
        None)`` is OLMo 3's. Empty: no layer has a window.
      attention_sinks: a learned logit a layer and query head that takes part in the softmax and has
        no value, so that a head may attend to nothing (gpt-oss).
      tie_embeddings: uses the transposed embedding as the unembedding.
      norm_eps: added to the mean square in every norm, above 0.
      init_std: standard deviation of the initial matrices, before truncation.
      scan_layers: compiles one layer and scans it instead of unrolling L; the same results.
      remat: what the backward pass recomputes: "none"; "dots", all but matrix products with
        parameters; "full", each layer from its input.
      attention: backend, see ``model/backends.py``; "auto" takes the fastest that can run.
      attention_block: block size of chunked attention; None means ``attention.default_block()``.
      derivatives: "reverse" for training; "all" adds ``jax.jvp`` and second derivatives. Matrix
        products and attention then use JAX's gradients, which take more time and, on a mesh,
        memory. Pass the same value to ``loss_sums``.
      dtype: of activations and matrix products. Norms, softmax and logits are always float32.
      param_dtype: of the weights. Position variables, gradients and Adam's moments are always
        float32. bfloat16 halves the memory of the weights, but with 8 significant bits an update
        below 1/512 to 1/256 of a weight rounds away, as most do late in training. To train to the
        end, keep float32 and set ``dtype`` alone.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "pre"
    qk_norm: bool | str = "none"
    qkv_bias: bool = False
    windows: tuple[int | None, ...] = ()
    attention_sinks: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    attention_block: int | None = None
    derivatives: str = "reverse"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.qk_norm, bool):
            object.__setattr__(self, "qk_norm", "head" if self.qk_norm else "none")
        check_switches(self)
        counts = ("vocab_size", "d_model", "num_layers", "num_heads", "mlp_dim", "attention_block")
        for name in (*counts, "num_kv_heads", "head_dim"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1, "a size of the model")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model}: expected a multiple of num_heads={self.num_heads}, "
                "or a head_dim"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: expected a divisor of "
                f"num_heads={self.num_heads}"
            )
        object.__setattr__(self, "windows", tuple(self.windows))
        for index, window in enumerate(self.windows):
            if window is not None:
                check_tokens(f"windows[{index}]", window, "tokens that a query sees (None for all)")
        # Without it a row of zeros, as padding has after attention, would be 0 / 0.
        check_above_zero("norm_eps", self.norm_eps, "what is added to the mean square")
        check_spread("init_std", self.init_std)
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(accepted)}"
                )

    @property
    def shape(self) -> ModelShape:
        """The sizes that a position embedding may depend on."""
        return ModelShape(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.d_model // self.num_heads,
        )
