"""The shape of the transformer and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from fope_jax.model.backends import BACKENDS
from fope_jax.model.layers import DERIVATIVES
from fope_jax.position.base import ModelShape

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
    """The shape of the transformer and how it is computed; position knobs belong to the method.

    Attributes:
      vocab_size: rows of the embedding, V.
      d_model: D.
      num_layers: L.
      num_heads: query heads, N.
      mlp_dim: hidden width of each SwiGLU branch.
      num_kv_heads: key-value heads K, a divisor of N; None means N.
      head_dim: H; None means ``d_model // num_heads``.
      norm: where a layer normalises: "pre", what goes into attention and MLP (Llama); "post", what
        comes out of them (OLMo 2).
      qk_norm: RMS-normalises q and k before the rotation: "none"; "head", each head by itself, with
        one scale that all heads of a layer share (Qwen 3); "width", all heads together, each
        dimension with a scale of its own (OLMo 2). True and False, as older configurations have it,
        are "head" and "none".
      tie_embeddings: the embedding, transposed, is the unembedding too.
      norm_eps: added to the mean square in every norm.
      init_std: spread of the truncated normal that all matrices start from.
      scan_layers: compiles one layer and scans it, rather than L layers in a row. The parameters
        and the results are the same.
      remat: what the backward pass computes again instead of keeping it: "none"; "dots", all but
        the matrix products with parameters; "full", each layer from its input.
      attention: which program computes it, see ``model/backends.py``; "auto" takes the fastest that
        can run on the default platform.
      attention_block: queries and keys in a block of the chunked attention; None takes what suits
        the default platform (``attention.default_block``).
      derivatives: "reverse", what training needs; "all": ``jax.jvp``, Hessian-vector products and
        other second derivatives work as well. Products with weights and the attention then leave
        their gradients to JAX, which takes more time and, on a mesh, memory. ``loss_sums`` has the
        same argument.
      dtype: of the activations and matrix products, "float32" or "bfloat16". Norms, softmax and
        logits are float32 always.
      param_dtype: of the weights, "float32" or "bfloat16"; position variables are float32 always.
        Weights are drawn in float32 and rounded, and gradients, their sums and Adam's moments are
        float32 whatever it is. A bfloat16 weight has 8 significant bits: an update below 1/512 to
        1/256 of its size rounds away, which late in training most do. It halves the memory of the
        weights; to train to the end, keep float32 and set ``dtype`` alone.
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
        counts = ("vocab_size", "d_model", "num_layers", "num_heads", "mlp_dim", "attention_block")
        for name in (*counts, "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
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
        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(accepted)}"
                )

    @property
    def shape(self) -> ModelShape:
        """What a position embedding may know of the model."""
        return ModelShape(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.d_model // self.num_heads,
        )
