"""The decoder-only transformer of the paper in Flax NNX, with any position embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fope_jax.model.backends import BACKENDS, FUSED_BACKENDS, choose_backend, gpu_compute_capability
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.layers import (
    DERIVATIVES,
    LINEAR_OUTPUT,
    lookup_embedding,
    project_from_heads,
    project_to_heads,
    rms_norm,
    swiglu,
    truncated_normal,
)
from fope_jax.model.losses import compute_logits
from fope_jax.model.sharding import active_mesh, constrain
from fope_jax.position.base import (
    Layer,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    embed_tokens,
)
from fope_jax.position.rotation import token_positions
from fope_jax.typing import Array

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
# Fields of TransformerConfig that say how a model with weights is computed, not what it computes.
HOW = ("scan_layers", "remat", "attention", "attention_block", "derivatives", "dtype", "init_std")
NORMS = ("pre", "post")
QK_NORMS = ("none", "head", "width")


_KEPT = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class PositionConstant(nnx.Variable):
    """An array of the position embedding that is saved with the model and never trained."""


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
      attention_block: queries and keys in a block of the chunked attention. Not 256: blocks a power
        of two long compete for the same cache lines of a CPU (benchmarks/README.md).
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
    attention_block: int = 280
    derivatives: str = "reverse"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.qk_norm, bool):
            object.__setattr__(self, "qk_norm", "head" if self.qk_norm else "none")
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "mlp_dim"):
            _at_least_one(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        _at_least_one("attention_block", self.attention_block)
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
        for name, accepted in (
            ("norm", NORMS),
            ("qk_norm", QK_NORMS),
            ("attention", BACKENDS),
            ("remat", REMAT),
            ("derivatives", DERIVATIVES),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
        ):
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


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: expected 1 or more")


class Activations(NamedTuple):
    """What a layer has at hand when it attends, for ``Transformer.observe``.

    Attributes:
      position: this layer's method and the scale of its logits.
      variables: its variables and the model's.
      x: ``[B, T, D]``, what the layer reads.
      q: ``[B, T, N, H]``, before the rotation and after a norm of q.
      k: ``[B, T, K, H]``, likewise.
      turned_q: ``[B, T, N, H]``, after the rotation.
      turned_k: ``[B, T, K or N, H]``, likewise.
      v: ``[B, T, K or N, H]``.
    """

    position: Layer
    variables: Variables
    x: Array
    q: Array
    k: Array
    turned_q: Array
    turned_k: Array
    v: Array


Observer = Callable[[Activations], Any]


class Transformer(nnx.Module):
    """Decoder with RMSNorm, SwiGLU and no biases.

    The module holds arrays; what is done with them are the functions of ``model/``. Arrays of the
    layers have a leading axis L, whether the layers are scanned or not.
    """

    def __init__(
        self, config: TransformerConfig, position: PositionEmbedding, *, rngs: nnx.Rngs
    ) -> None:
        position.check(config.shape)
        period = len(position.layers())
        if config.num_layers % period:
            raise ValueError(
                f"{type(position).__name__} repeats after {period} layers: "
                f"num_layers={config.num_layers} is not a multiple of it"
            )
        self.config = config
        self.position = position

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(
                truncated_normal(rngs.params(), shape, config.init_std, config.param_dtype)
            )

        def ones(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.ones(shape, config.param_dtype))

        d_model, layers, heads, kv_heads, head_dim = config.shape
        self.embedding = normal(config.vocab_size, d_model)
        self.layers = nnx.Dict(
            attention_norm=ones(layers, d_model),
            query=normal(layers, d_model, heads, head_dim),
            key=normal(layers, d_model, kv_heads, head_dim),
            value=normal(layers, d_model, kv_heads, head_dim),
            out=normal(layers, heads, head_dim, d_model),
            mlp_norm=ones(layers, d_model),
            gate=normal(layers, d_model, config.mlp_dim),
            up=normal(layers, d_model, config.mlp_dim),
            down=normal(layers, config.mlp_dim, d_model),
        )
        if config.qk_norm != "none":
            alone = config.qk_norm == "head"
            self.layers["query_norm"] = ones(layers, head_dim if alone else heads * head_dim)
            self.layers["key_norm"] = ones(layers, head_dim if alone else kv_heads * head_dim)
        self.final_norm = ones(d_model)
        if not config.tie_embeddings:
            self.unembedding = normal(d_model, config.vocab_size)
        # Drawn last, so that models of one seed start from the same weights under every method.
        variables = position.init(rngs.params(), config.shape)
        self.position_model = _wrap(variables.model_params, variables.model_constants)
        self.position_layers = _wrap(variables.layer_params, variables.layer_constants)
        clash = sorted(self.position_model.keys() & self.position_layers.keys())
        if clash:
            raise ValueError(f"position variables {clash}: both of the model and of the layers")

    def __call__(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """Logits ``[B, T, V]`` float32; the arguments are those of ``hidden``."""
        return self.unembed(self.hidden(tokens, positions, segments))

    def hidden(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """Activations after the final norm.

        Args:
          tokens: ``[B, T]`` int32. One outside the vocabulary gives NaN (``check_batch`` finds it
            on the host).
          positions: ``[B, T]`` integers, tokens since the start of the segment; ``[1, T]`` where
            all rows share them, whose tables, masks and biases are then computed and kept once.
          segments: ``[B, T]`` or ``[1, T]`` int32, counted from 1; 0 is padding.

        Returns:
          ``[B, T, D]`` in the compute dtype.

        Raises:
          ValueError: the window is longer than the position embedding is defined for.
        """
        return self._run(tokens, positions, segments, None)[0]

    def observe(
        self, tokens: Array, positions: Array, segments: Array, observer: Observer
    ) -> tuple[Array, Any]:
        """``hidden``, and what ``observer`` makes of each layer's activations on the way.

        Args:
          tokens: as in ``hidden``, and the next two.
          positions: see ``hidden``.
          segments: see ``hidden``.
          observer: a pure function of ``Activations``, the same shapes for every layer. Of what it
            leaves out nothing is kept.

        Returns:
          ``hidden [B, T, D]``, and the pytree that ``observer`` gives, its leaves stacked
          ``[L, ...]``.
        """
        return self._run(tokens, positions, segments, observer)

    def _run(
        self, tokens: Array, positions: Array, segments: Array, observer: Observer | None
    ) -> tuple[Array, Any]:
        """The one forward pass, observed or not."""
        config, position = self.config, self.position
        limit = position.limits.max_length
        if limit is not None and tokens.shape[1] > limit:
            raise ValueError(
                f"a window of {tokens.shape[1]} tokens: {type(position).__name__} is defined for "
                f"at most {limit}"
            )
        positions = token_positions(positions)
        x = self.embed(tokens, positions)
        tables = self.tables(positions)
        period = len(tables)

        def run(index, weights, trained, constants, x):
            own, trained, constants = self.of_layer(index, trained, constants)
            return layer(
                config,
                own,
                weights,
                trained,
                constants,
                tables[index],
                x,
                positions,
                segments,
                observer,
            )

        if config.remat != "none":
            # The loop form needs the barrier, or common subexpressions undo the recomputation.
            run = jax.checkpoint(
                run,
                prevent_cse=not config.scan_layers,
                static_argnums=0,
                policy=_KEPT[config.remat],
            )

        def body(x, group):
            weights, trained, constants = group
            seen = []
            for index, own in enumerate(unstacked(weights, period)):
                x, told = run(index, own, trained, constants, x)
                seen.append(told)
            return x, _all_stacked(seen)

        groups = self.groups()
        if config.scan_layers:
            x, seen = jax.lax.scan(body, x, groups)
        else:
            told = []
            for index in range(config.num_layers // period):
                x, own = body(x, jax.tree.map(lambda leaf, i=index: leaf[i], groups))
                told.append(own)
            seen = _all_stacked(told)
        seen = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen)
        return rms_norm(x, self.final_norm[...], config.norm_eps), seen

    def embed(self, tokens: Array, positions: Array) -> Array:
        """What the first layer reads, ``[B, T, D]`` in the compute dtype."""
        x = lookup_embedding(self.embedding[...], tokens).astype(self.config.dtype)
        x = embed_tokens(self.position, self.model_variables(), x, positions)
        x = x.astype(self.config.dtype)
        return constrain(x, ("batch", "length", None))

    def tables(self, positions: Array) -> list[Any]:
        """The tables of each layer of a period."""
        variables, head_dim = self.model_variables(), self.config.shape.head_dim
        return [
            layer.method.tables(layer.select(variables), positions, head_dim)
            for layer in self.position.layers()
        ]

    def model_variables(self) -> Variables:
        """The position variables that exist once a model."""
        return _values(self.position_model)

    def groups(self) -> tuple[dict[str, Array], Variables, Variables]:
        """Weights ``[L / P, P, ...]`` of the layers (``[L, ...]`` where the period P is 1), and
        the position variables ``[L / P, ...]`` that are trained and those that are not."""
        return (
            _stacked(_values(self.layers), len(self.position.layers())),
            _trained(self.position_layers),
            _constant(self.position_layers),
        )

    def of_layer(
        self, index: int, trained: Variables, constants: Variables
    ) -> tuple[Layer, Variables, Variables]:
        """Layer ``index`` of a period, its trained position variables and its constants.

        ``trained`` and ``constants`` are those of one period; the model's are added.
        """
        own = self.position.layers()[index]
        trained = {**trained, **_trained(self.position_model)}
        constants = {**constants, **_constant(self.position_model)}
        return own, own.select(trained), own.select(constants)

    def unembed(self, hidden: Array) -> Array:
        """Logits ``[B, T, V]`` float32 of ``hidden [B, T, D]``."""
        return compute_logits(hidden, self.unembedding_matrix())

    def unembedding_matrix(self) -> Array:
        """``[D, V]``: the unembedding, or the embedding transposed where they are tied."""
        if self.config.tie_embeddings:
            return self.embedding[...].T
        return self.unembedding[...]


def layer(
    config: TransformerConfig,
    position: Layer,
    weights: dict[str, Array],
    trained: Variables,
    constants: Variables,
    tables: Any,
    x: Array,
    positions: Array,
    segments: Array,
    observer: Observer | None = None,
) -> tuple[Array, Any]:
    """One layer: attention and MLP, each added to its input, normalised before or after.

        pre    x + f(norm(x))
        post   x + norm(f(x))

    Args:
      config: the model's.
      position: this layer's.
      weights: one layer's, under the names that ``Transformer`` gives them.
      trained: the position variables of this layer and of the model that have gradients.
      constants: those that have none.
      tables: the method's, of these positions.
      x: ``[B, T, D]``.
      positions: ``[B, T]`` or ``[1, T]``.
      segments: ``[B, T]`` or ``[1, T]``.
      observer: see ``Transformer.observe``.

    Returns:
      ``[B, T, D]``, and what ``observer`` gives, None without one.
    """
    q, k, v = to_attention(config, weights, x)
    before, variables = (q, k), {**trained, **constants}
    method = position.method
    q, k = method.rotate(variables, tables, q, k)
    v = repeat_heads(v, k)
    seen = None
    if observer is not None:
        seen = observer(Activations(position, variables, x, *before, q, k, v))
    attended = sharded_attention(
        q,
        k,
        v,
        positions=positions,
        segments=segments,
        variables=trained,
        constants=constants,
        position=position,
        backend=_backend(config, method, q.shape[1]),
        block=config.attention_block,
        derivatives=config.derivatives,
    )
    return from_attention(config, weights, x, attended), seen


def to_attention(
    config: TransformerConfig, weights: dict[str, Array], x: Array
) -> tuple[Array, Array, Array]:
    """q ``[B, T, N, H]``, k and v ``[B, T, K, H]`` of a layer, before any rotation."""
    y = _normed(config, "pre", x, weights["attention_norm"])
    q, k, v = (
        project_to_heads(y, weights[name], config.derivatives) for name in ("query", "key", "value")
    )
    if config.qk_norm != "none":
        q = _heads_normed(q, weights["query_norm"], config.norm_eps)
        k = _heads_normed(k, weights["key_norm"], config.norm_eps)
    return q, k, v


def repeat_heads(v: Array, k: Array) -> Array:
    """``v`` with each head repeated where the method has made more key heads of one."""
    return v if k.shape[2] == v.shape[2] else jnp.repeat(v, k.shape[2] // v.shape[2], axis=2)


def from_attention(
    config: TransformerConfig, weights: dict[str, Array], x: Array, attended: Array
) -> Array:
    """What a layer makes of its input ``x [B, T, D]`` and its heads' ``attended [B, T, N, H]``."""
    y = project_from_heads(attended, weights["out"], config.derivatives)
    x = x + _normed(config, "post", y, weights["attention_norm"])
    y = _normed(config, "pre", x, weights["mlp_norm"])
    y = swiglu(y, weights["gate"], weights["up"], weights["down"], config.derivatives)
    return x + _normed(config, "post", y, weights["mlp_norm"])


def _normed(config: TransformerConfig, place: str, x: Array, scale: Array) -> Array:
    """``x`` normalised, where ``place`` is the one at which this model normalises."""
    return rms_norm(x, scale, config.norm_eps) if config.norm == place else x


def _heads_normed(x: Array, scale: Array, eps: float) -> Array:
    """``x [B, T, N, H]`` normalised by heads or, with a scale of ``[N * H]``, as a whole."""
    if scale.shape[-1] == x.shape[-1]:
        return rms_norm(x, scale, eps)
    return rms_norm(x.reshape(*x.shape[:2], -1), scale, eps).reshape(x.shape)


def _backend(config: TransformerConfig, position: PositionEmbedding, length: int) -> str:
    """The configured backend; for "auto", what suits the default platform and this length.

    Training names its backend before it compiles, for devices that may not be here.

    Raises:
      ValueError: the configured one cannot run at this length.
    """
    mesh = active_mesh()
    return choose_backend(
        config.attention,
        platform=FUSED_BACKENDS.get(config.attention, jax.default_backend()),
        methods=[position],
        length=length,
        head_dim=config.shape.head_dim,
        dtype=config.dtype,
        context=1 if mesh is None else mesh.shape["context"],
        compute_capability=gpu_compute_capability(jax.devices()[0]),
        derivatives=config.derivatives,
    ).name


def split(model: Transformer) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """Takes the model apart into its definition, its trained parameters and its constants.

    Returns:
      graphdef: static and hashable.
      params: nested dict of arrays, what the optimizer sees.
      constants: nested dict of arrays, empty for most position embeddings.
    """
    graphdef, params, constants = nnx.split(model, nnx.Param, PositionConstant)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(constants)


def merge(graphdef: nnx.GraphDef, params: dict[str, Any], constants: dict[str, Any]) -> Transformer:
    """Puts together what ``split`` took apart."""
    return nnx.merge(graphdef, params, constants)


def position_variables(params: dict[str, Any], constants: dict[str, Any]) -> PositionVariables:
    """What of the two trees of ``split`` belongs to the position embedding."""
    return PositionVariables(
        model_params=dict(params.get("position_model", {})),
        model_constants=dict(constants.get("position_model", {})),
        layer_params=dict(params.get("position_layers", {})),
        layer_constants=dict(constants.get("position_layers", {})),
    )


def check_batch(tokens: Any, vocab_size: int) -> None:
    """Raises ValueError where a token id has no row in the embedding; on the host, not in jit.

    >>> check_batch([[3, 9]], vocab_size=8)
    Traceback (most recent call last):
        ...
    ValueError: token ids 3 to 9: vocab_size=8 accepts 0 to 7
    """
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"token ids {tokens.min()} to {tokens.max()}: vocab_size={vocab_size} accepts "
            f"0 to {vocab_size - 1}"
        )


def _wrap(params: Variables, constants: Variables) -> nnx.Dict:
    clash = sorted(params.keys() & constants.keys())
    if clash:
        raise ValueError(f"position variables {clash}: both parameter and constant")
    return nnx.Dict(
        {name: nnx.Param(x) for name, x in params.items()}
        | {name: PositionConstant(x) for name, x in constants.items()}
    )


def _values(variables: nnx.Dict) -> dict[str, Array]:
    return {name: variable[...] for name, variable in variables.items()}


def _trained(variables: nnx.Dict) -> dict[str, Array]:
    return {name: x[...] for name, x in variables.items() if isinstance(x, nnx.Param)}


def _constant(variables: nnx.Dict) -> dict[str, Array]:
    return {name: x[...] for name, x in variables.items() if not isinstance(x, nnx.Param)}


def _all_stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _stacked(weights: dict[str, Array], period: int) -> dict[str, Array]:
    """``[L, ...]`` as ``[L / P, P, ...]``, or as it is where P is 1."""
    if period == 1:
        return weights
    return {name: x.reshape(-1, period, *x.shape[1:]) for name, x in weights.items()}


def unstacked(weights: dict[str, Array], period: int) -> list[dict[str, Array]]:
    """The weights of each layer of a group, ``[P, ...]`` taken apart."""
    if period == 1:
        return [weights]
    # The gradient of a split is one concatenation, that of P slices a sum of P padded arrays.
    parts = {name: jnp.split(x, period) for name, x in weights.items()}
    return [{name: part[index][0] for name, part in parts.items()} for index in range(period)]
