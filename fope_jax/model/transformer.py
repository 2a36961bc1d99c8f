"""The decoder-only transformer of the paper in Flax NNX, with any position embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fope_jax.model.backends import FUSED_BACKENDS, choose_backend, gpu_compute_capability
from fope_jax.model.config import TransformerConfig
from fope_jax.model.context_parallel import sharded_attention
from fope_jax.model.fused import is_stored_in_order
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.model.layers import (
    LINEAR_OUTPUT,
    lookup_embedding,
    project_from_heads,
    project_to_heads,
    rms_norm,
    swiglu,
    truncated_normal,
)
from fope_jax.model.losses import compute_logits
from fope_jax.model.running_sums import running_sums
from fope_jax.model.sharding import active_mesh, constrain
from fope_jax.position.base import (
    Layer,
    PositionEmbedding,
    PositionVariables,
    Variables,
    embed_tokens,
    has_hook,
)
from fope_jax.position.rotation import real_positions
from fope_jax.typing import Array

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class PositionConstant(nnx.Variable):
    """An array of the position embedding that is saved and never trained."""


class Activations(NamedTuple):
    """The inputs of a layer's attention, for the observer of ``Transformer.forward``.

    Attributes:
      position: the layer's method and logit scale.
      variables: position variables of the layer and of the model.
      x: ``[B, T, D]``, the layer's input.
      q, k: ``[B, T, N, H]`` and ``[B, T, K, H]``, before the rotation, after any norm of q and k.
      rotated_q: ``[B, T, N, E]``, E = H unless the method widens q and k.
      rotated_k: ``[B, T, K or N, E]``.
      v: ``[B, T, K or N, H]``.
      sums: ``[B, T, N, 2]`` running sums of the method's bias; None if it has none.
      sinks: ``[N]``, a further logit a head; None if there is none.
    """

    position: Layer
    variables: Variables
    x: Array
    q: Array
    k: Array
    rotated_q: Array
    rotated_k: Array
    v: Array
    sums: Array | None
    sinks: Array | None


Observer = Callable[[Activations], Any]


class Transformer(nnx.Module):
    """Decoder with RMSNorm and SwiGLU; arrays of layers have a leading axis L."""

    def __init__(
        self, config: TransformerConfig, position: PositionEmbedding, *, rngs: nnx.Rngs
    ) -> None:
        position.check(config.shape)
        layer_pattern(config, position)  # raises if it does not fill the layers
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
            is_shared = config.qk_norm == "head"  # by all heads of a layer
            self.layers["query_norm"] = ones(layers, head_dim * (1 if is_shared else heads))
            self.layers["key_norm"] = ones(layers, head_dim * (1 if is_shared else kv_heads))
        if config.qkv_bias:
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
                zeros = jnp.zeros((layers, count, head_dim), config.param_dtype)
                self.layers[f"{name}_bias"] = nnx.Param(zeros)
        if config.attention_sinks:
            self.layers["sinks"] = nnx.Param(jnp.zeros((layers, heads), config.param_dtype))
        self.final_norm = ones(d_model)
        if not config.tie_embeddings:
            self.unembedding = normal(d_model, config.vocab_size)
        # Drawn last, so that a seed gives the same weights under every method.
        variables = position.init(rngs.params(), config.shape)
        self.position_model = nnx_variables(variables.model_params, variables.model_constants)
        self.position_layers = nnx_variables(variables.layer_params, variables.layer_constants)
        clash = sorted(self.position_model.keys() & self.position_layers.keys())
        if clash:
            raise ValueError(f"position variables {clash}: both of the model and of the layers")

    def __call__(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """Logits ``[B, T, V]`` float32; see ``forward``."""
        return self.unembed(self.hidden(tokens, positions, segments))

    def hidden(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """Activations after the final norm, ``[B, T, D]``; see ``forward``."""
        return self.forward(tokens, positions, segments)[0]

    def forward(
        self, tokens: Array, positions: Array, segments: Array, observer: Observer | None = None
    ) -> tuple[Array, Any]:
        """The forward pass up to the final norm.

        Args:
          tokens: ``[B, T]`` int32; one outside the vocabulary gives NaN (see ``check_batch``).
          positions: ``[B, T]``, tokens since the start of the segment, integers or float32;
            ``[1, T]`` if all rows share them, which computes tables, masks and biases once.
          segments: ``[B, T]`` or ``[1, T]`` int32, counted from 1; 0 is padding.
          observer: a pure function of each layer's ``Activations`` with the same output shapes for
            every layer; only its output is kept.

        Returns ``[B, T, D]`` in the compute dtype, and the observer's output, leaves ``[L, ...]``.
        Raises ValueError for more tokens than the position embedding is defined for.
        """
        config, limit = self.config, self.position.limits.max_length
        if limit is not None and tokens.shape[1] > limit:
            raise ValueError(
                f"a window of {tokens.shape[1]} tokens: {type(self.position).__name__} is defined "
                f"for at most {limit}"
            )
        positions = real_positions(positions)
        x = self.embed(tokens, positions)
        tables = self.tables(positions)

        def run_layer(index, weights, trained, constants, x):
            position, trained, constants = self.layer_position(index, trained, constants)
            arrays = (weights, trained, constants, tables[index], x, positions, segments)
            return layer(config, position, *arrays, observer)

        if config.remat != "none":
            # Without scan, common-subexpression elimination would undo the recomputation.
            run_layer = jax.checkpoint(
                run_layer,
                prevent_cse=not config.scan_layers,
                static_argnums=0,
                policy=_REMAT_POLICIES[config.remat],
            )

        def run_period(x, arrays):
            weights, trained, constants = arrays
            observed = []
            for index, layer_weights in enumerate(split_period(weights, len(tables))):
                x, values = run_layer(index, layer_weights, trained, constants, x)
                observed.append(values)
            return x, _stack_trees(observed)

        periods = self.period_arrays()
        if config.scan_layers:
            x, observed = jax.lax.scan(run_period, x, periods)
        else:
            observed = []
            for index in range(config.num_layers // len(tables)):
                x, values = run_period(x, jax.tree.map(lambda leaf, i=index: leaf[i], periods))
                observed.append(values)
            observed = _stack_trees(observed)
        observed = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), observed)
        return rms_norm(x, self.final_norm[...], config.norm_eps), observed

    def embed(self, tokens: Array, positions: Array) -> Array:
        """The input of the first layer, ``[B, T, D]`` in the compute dtype."""
        x = lookup_embedding(self.embedding[...], tokens).astype(self.config.dtype)
        x = embed_tokens(self.position, variable_values(self.position_model), x, positions)
        return constrain(x.astype(self.config.dtype), ("batch", "length", None))

    def tables(self, positions: Array) -> list[Any]:
        """The method's tables for each layer of a period."""
        tables = [self.layer_tables(i, positions) for i in range(len(self.position.layers()))]
        return tables * (len(self.pattern) // len(tables))

    def layer_tables(self, index: int, positions: Array) -> Any:
        """The method's tables for layer ``index`` of a period."""
        layer, head_dim = self.pattern[index], self.config.shape.head_dim
        return layer.method.tables(
            layer.select(variable_values(self.position_model)), positions, head_dim
        )

    @property
    def pattern(self) -> tuple[Layer, ...]:
        """The layers of one period P; see ``layer_pattern``."""
        return layer_pattern(self.config, self.position)

    def period_arrays(self) -> tuple[dict[str, Array], Variables, Variables]:
        """Weights ``[L / P, P, ...]`` of the layers (``[L, ...]`` if the period P is 1), and the
        trained and constant position variables ``[L / P, ...]``.

        Where the method repeats R times within the period, its variables are ``[L / P, R, ...]``.
        """
        period = len(self.pattern)
        repeats = period // len(self.position.layers())

        def split(arrays: dict[str, Array], count: int) -> dict[str, Array]:
            if count == 1:
                return arrays
            return {name: x.reshape(-1, count, *x.shape[1:]) for name, x in arrays.items()}

        trained, constants = _by_training(self.position_layers)
        return (
            split(variable_values(self.layers), period),
            split(trained, repeats),
            split(constants, repeats),
        )

    def layer_position(
        self, index: int, trained: Variables, constants: Variables
    ) -> tuple[Layer, Variables, Variables]:
        """Layer ``index`` of a period, with its variables, those of the model included."""
        position, period = self.pattern[index], len(self.position.layers())
        if len(self.pattern) > period:
            trained, constants = jax.tree.map(lambda x: x[index // period], (trained, constants))
        model_trained, model_constants = _by_training(self.position_model)
        return (
            position,
            position.select({**trained, **model_trained}),
            position.select({**constants, **model_constants}),
        )

    def unembed(self, hidden: Array) -> Array:
        """Logits ``[B, T, V]`` float32 of ``hidden [B, T, D]``."""
        return compute_logits(hidden, self.unembedding_matrix())

    def unembedding_matrix(self) -> Array:
        """``[D, V]``: the unembedding, or the transposed embedding if they are tied."""
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
    """One layer: attention and MLP with residuals, normalised before or after.

        pre    x + f(norm(x))
        post   x + norm(f(x))

    Args:
      config: the model's.
      position: the layer's method and logit scale.
      weights: of this layer, named as in ``Transformer``.
      trained, constants: position variables of the layer and the model, with and without gradients.
      tables: the method's tables for ``positions``.
      x: ``[B, T, D]``, the shape of the result too.
      positions, segments: ``[B, T]`` or ``[1, T]``. With a running bias a row that is not stored by
        position is NaN.
      observer: see ``Transformer.forward``; its output is returned too, or None.
    """
    y = attention_input(config, weights, x)
    q, k, v = project_qkv(config, weights, y)
    variables = {**trained, **constants}
    rotated_q, rotated_k = position.method.rotate(variables, tables, q, k)
    v = repeat_heads(v, rotated_k)
    sums, observed = None, None
    if has_hook(position.method, "running_bias"):
        sums = running_sums(bias_increments(position, variables, y))
        # Another order would sum over other tokens than those between key and query.
        is_in_order = is_stored_in_order(positions, segments)
        sums = jnp.where(is_in_order[:, None, None, None], sums, jnp.nan)
        sums = constrain(sums, ("batch", "length", "heads", None))
    if observer is not None:
        arrays = (x, q, k, rotated_q, rotated_k, v, sums, weights.get("sinks"))
        observed = observer(Activations(position, variables, *arrays))
    attended = sharded_attention(
        rotated_q,
        rotated_k,
        v,
        positions=positions,
        segments=segments,
        variables=trained,
        constants=constants,
        position=position,
        sums=sums,
        sinks=weights.get("sinks"),
        backend=_choose_backend(config, position, x.shape[1]),
        block=config.attention_block,
        derivatives=config.derivatives,
    )
    return attention_to_output(config, weights, x, attended), observed


def attention_input(config: TransformerConfig, weights: dict[str, Array], x: Array) -> Array:
    """What queries, keys and values are projected from, ``[B, T, D]``."""
    return _norm_if(config, "pre", x, weights["attention_norm"])


def project_qkv(
    config: TransformerConfig, weights: dict[str, Array], y: Array
) -> tuple[Array, Array, Array]:
    """q ``[B, T, N, H]``, k and v ``[B, T, K, H]`` of ``attention_input``, before any rotation."""

    def project(name: str) -> Array:
        projected = project_to_heads(y, weights[name], config.derivatives)
        if not config.qkv_bias:
            return projected
        return projected + weights[f"{name}_bias"].astype(projected.dtype)[None, None]

    q, k, v = project("query"), project("key"), project("value")
    if config.qk_norm != "none":
        q = _norm_heads(q, weights["query_norm"], config.norm_eps)
        k = _norm_heads(k, weights["key_norm"], config.norm_eps)
    return q, k, v


def bias_increments(position: Layer, variables: Variables, y: Array) -> Array:
    """The method's ``running_bias`` for ``attention_input``, ``[B, T, N]``, whole rows a device."""
    increments = position.method.running_bias(variables, y)
    return constrain(increments.astype(jnp.float32), ("batch", None, "heads"))


def repeat_heads(v: Array, k: Array) -> Array:
    """Repeats the heads of ``v`` if the method made more key heads, so that both have as many."""
    return v if k.shape[2] == v.shape[2] else jnp.repeat(v, k.shape[2] // v.shape[2], axis=2)


def attention_to_output(
    config: TransformerConfig, weights: dict[str, Array], x: Array, attended: Array
) -> Array:
    """The layer's output, from its input ``x [B, T, D]`` and ``attended [B, T, N, H]``."""
    y = project_from_heads(attended, weights["out"], config.derivatives)
    x = x + _norm_if(config, "post", y, weights["attention_norm"])
    y = _norm_if(config, "pre", x, weights["mlp_norm"])
    y = swiglu(y, weights["gate"], weights["up"], weights["down"], config.derivatives)
    return x + _norm_if(config, "post", y, weights["mlp_norm"])


def _norm_if(config: TransformerConfig, norm: str, x: Array, scale: Array) -> Array:
    return rms_norm(x, scale, config.norm_eps) if config.norm == norm else x


def _norm_heads(x: Array, scale: Array, eps: float) -> Array:
    """RMS norm per head or, with a scale of ``[N * H]``, over all heads."""
    if scale.shape[-1] == x.shape[-1]:
        return rms_norm(x, scale, eps)
    flat = x.reshape(*x.shape[:2], scale.shape[-1])
    return rms_norm(flat, scale, eps).reshape(x.shape)


def _choose_backend(config: TransformerConfig, position: Layer, length: int) -> str:
    """The configured backend, or "auto" for the default platform; ValueError if it cannot run."""
    mesh = active_mesh()
    return choose_backend(
        config.attention,
        platform=FUSED_BACKENDS.get(config.attention, jax.default_backend()),
        layers=[position],
        length=length,
        shape=config.shape,
        dtype=config.dtype,
        sinks=config.attention_sinks,
        context=1 if mesh is None else mesh.shape["context"],
        compute_capability=gpu_compute_capability(jax.devices()[0]),
        derivatives=config.derivatives,
    ).name


def split(model: Transformer) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """The graphdef, static and hashable, and nested dicts of trained parameters and constants."""
    graphdef, params, constants = nnx.split(model, nnx.Param, PositionConstant)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(constants)


def merge(graphdef: nnx.GraphDef, params: dict[str, Any], constants: dict[str, Any]) -> Transformer:
    """The inverse of ``split``."""
    return nnx.merge(graphdef, params, constants)


def position_variables(params: dict[str, Any], constants: dict[str, Any]) -> PositionVariables:
    """The position embedding's variables among the two trees of ``split``."""
    return PositionVariables(
        model_params=dict(params.get("position_model", {})),
        model_constants=dict(constants.get("position_model", {})),
        layer_params=dict(params.get("position_layers", {})),
        layer_constants=dict(constants.get("position_layers", {})),
    )


def check_batch(tokens: Any, vocab_size: int) -> None:
    """Raises ValueError for token ids outside the vocabulary; runs on the host, not in jit.

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


def nnx_variables(params: Variables, constants: Variables) -> nnx.Dict:
    """Parameters and constants of a position embedding as NNX variables; ValueError for a clash."""
    clash = sorted(params.keys() & constants.keys())
    if clash:
        raise ValueError(f"position variables {clash}: both parameter and constant")
    return nnx.Dict(
        {name: nnx.Param(x) for name, x in params.items()}
        | {name: PositionConstant(x) for name, x in constants.items()}
    )


def variable_values(variables: nnx.Dict) -> dict[str, Array]:
    """The arrays of `nnx_variables`."""
    return {name: variable[...] for name, variable in variables.items()}


def _by_training(variables: nnx.Dict) -> tuple[Variables, Variables]:
    trained = {name: x[...] for name, x in variables.items() if isinstance(x, nnx.Param)}
    return trained, {name: x[...] for name, x in variables.items() if name not in trained}


def _stack_trees(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def split_period(weights: dict[str, Array], period: int) -> list[dict[str, Array]]:
    """The weights of each layer of a period, from axis 0 of ``[P, ...]``."""
    if period == 1:
        return [weights]
    # The gradient of a split is one concatenation; that of P slices sums P padded arrays.
    slices = {name: jnp.split(x, period) for name, x in weights.items()}
    return [{name: x[index][0] for name, x in slices.items()} for index in range(period)]
