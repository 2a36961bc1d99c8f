"""Forget gates: a bias that falls by what the tokens between key and query say (FoX, Cable)."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import (
    Layer,
    Limits,
    ModelShape,
    NoPE,
    PositionEmbedding,
    PositionVariables,
    Variables,
    has_hook,
    select,
    with_scope,
)
from fope_jax.position.checks import check_finite, check_spread
from fope_jax.typing import Array

_ROTATION = "rotation."  # prefix of its variables


def log_forget_gate(x: Array, weight: Array, bias: Array) -> Array:
    """The logarithm of each token's forget gate, one a head.

        a = log sigmoid(x.w + b) = -log(1 + exp(-(x.w + b)))

    ``x [B, T, D]``, ``weight [N, D]``, ``bias [N]``; returns ``[B, T, N]`` float32, 0 or below: 0
    forgets nothing. The product is in the dtype of x, summed in float32.

    >>> gate = log_forget_gate(jnp.ones((1, 1, 2)), jnp.ones((1, 2)), jnp.zeros(1))
    >>> gate.round(4).item()
    -0.12690000236034393

    Reference: Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate".
    """
    weight = weight.astype(x.dtype)
    logits = jnp.einsum("btd,nd->btn", x, weight, preferred_element_type=jnp.float32)
    return jax.nn.log_sigmoid(logits + bias.astype(jnp.float32)[None, None])


@dataclass(frozen=True)
class _ForgetGates(PositionEmbedding, abc.ABC):
    """Base of methods with a gate a token and head, from the layer's input."""

    kind: ClassVar[str] = "contextual"
    extends: ClassVar[str] = "yes: each token says how much is forgotten"

    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_spread("init_std", self.init_std)

    @property
    def limits(self) -> Limits:
        # Later keys would gain what earlier ones lose.
        return Limits(needs_causal_mask=True)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        size = (shape.num_layers, shape.num_heads, shape.d_model)
        weight = jax.random.normal(key, size, jnp.float32) * np.float32(self.init_std)
        bias = jnp.zeros(size[:2], jnp.float32)
        return PositionVariables(layer_params={"gate_weight": weight, "gate_bias": bias})

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        return {"gate_weight": ("heads", "embed"), "gate_bias": ("heads",)}[name]

    @abc.abstractmethod
    def running_bias(self, variables: Variables, x: Array) -> Array:
        """The logarithm of the gates."""


@dataclass(frozen=True)
class FoX(_ForgetGates):
    """Forgetting attention: each token's gate says how much of what came before it stays.

        f[l] = sigmoid(w.x[l] + b)
        bias[i, j] = log f[j + 1] + log f[j + 2] + .. + log f[i]

    A gate of 1 forgets nothing, so with all gates open it is NoPE, or the rotation alone; gates
    that are the same at every token give ALiBi's straight line. w and b belong to a layer and a
    head, x is what queries and keys are projected from. As drawn, gates are near 1/2: a head starts
    with a reach of two or three tokens. Sums run within a document, so attention must be causal.
    The "Pro" block of the paper (output gates, shifted keys and values) is no part of it.

    Knobs:
      init_std: standard deviation of the draw of w.
      bias_init: the start of b; the authors' code has 0, larger numbers open the gates: with 4.0 a
        head starts with a reach of about fifty tokens. A short training that has to look further
        back than a few tokens may need it.
      rotation: how q and k are rotated beside the bias, such as ``RoPE(theta=500_000.0)``; the
        paper recommends none.

    Reference: Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate".
    """

    bias_init: float = 0.0
    rotation: PositionEmbedding = NoPE()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("bias_init", self.bias_init, "the start of b")
        rotation = self.rotation
        if not isinstance(rotation, PositionEmbedding):
            raise ValueError(f"rotation={rotation!r}: expected a method such as RoPE()")
        hooks = ("embed", "bias", "contextual_bias", "running_bias")
        if rotation.layers() != (Layer(rotation),) or any(has_hook(rotation, h) for h in hooks):
            raise ValueError(
                f"rotation={type(rotation).__name__}: expected a method that only rotates q and k, "
                "the same in all layers; a window or a logit scaling is put around FoX"
            )

    def check(self, shape: ModelShape) -> None:
        self.rotation.check(shape)

    @property
    def limits(self) -> Limits:
        return self.rotation.limits._replace(needs_causal_mask=True)

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        return self.rotation.frequencies(head_dim)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        gates = super().init(key, shape).layer_params
        gates["gate_bias"] = gates["gate_bias"] + np.float32(self.bias_init)
        drawn = with_scope(self.rotation.init(jax.random.fold_in(key, 1), shape), _ROTATION)
        return dataclasses.replace(drawn, layer_params=drawn.layer_params | gates)

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        if name.startswith(_ROTATION):
            return self.rotation.variable_axes(name.removeprefix(_ROTATION))
        return super().variable_axes(name)

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> Any:
        return self.rotation.tables(select(variables, _ROTATION), positions, head_dim)

    def rotate(self, variables: Variables, tables: Any, q: Array, k: Array) -> tuple[Array, Array]:
        return self.rotation.rotate(select(variables, _ROTATION), tables, q, k)

    def running_bias(self, variables: Variables, x: Array) -> Array:
        return log_forget_gate(x, variables["gate_weight"], variables["gate_bias"])


@dataclass(frozen=True)
class Cable(_ForgetGates):
    """Context-aware biases: ALiBi whose slope each token sets anew.

        bias[i, j] = -(s[j + 1] + s[j + 2] + .. + s[i]),  s[l] = softplus(w.x[l] + b)

    Since -softplus(z) = log sigmoid(-z), this is FoX with w and b negated; the two, found apart,
    can express the same. The authors' code leaves q.k undivided; here it is divided by sqrt(H) as
    in all methods. Attention must be causal.

    Knobs:
      init_std: standard deviation of the draw of w; b starts at 0.

    Reference: Veisi et al. 2025, "Context-aware Biases for Length Extrapolation".
    """

    def running_bias(self, variables: Variables, x: Array) -> Array:
        return log_forget_gate(x, -variables["gate_weight"], -variables["gate_bias"])
