"""The drop-ins with windows, far versions, wide q and k, and running sums, beside the model."""

import dataclasses
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.interop import linen
from fope_jax.interop import nnx as interop_nnx
from fope_jax.model import attention
from fope_jax.model.running_sums import running_sums
from fope_jax.position import (
    ALiBi,
    Cable,
    CoPE,
    FoX,
    LocalChunks,
    LogitScaling,
    PoPE,
    PositionEmbedding,
    RoPE,
    SlidingWindow,
)
from fope_jax.position.base import Layer, has_hook
from fope_jax.position.mixing import Wrapper

HEADS, HEAD_DIM, WIDTH, LENGTH = 4, 8, 20, 12


@dataclasses.dataclass(frozen=True)
class Doubled(PositionEmbedding):
    """The inner method for near keys, and twice its product for far ones."""

    inner: PositionEmbedding = RoPE(theta=100.0)
    contextual: bool = False

    def tables(self, variables, positions, head_dim):
        return self.inner.tables(variables, positions, head_dim)

    def rotate(self, variables, tables, q, k):
        q, k = self.inner.rotate(variables, tables, q, k)
        return jnp.concatenate([q, 2 * q], axis=-1), jnp.concatenate([k, k], axis=-1)

    def layers(self):
        return (Layer(self, far_from=4),)


@dataclasses.dataclass(frozen=True)
class Counted(Doubled):
    """A bias made of the logits too."""

    def contextual_bias(self, variables, q, logits):
        return jnp.where(jnp.isfinite(logits), jnp.sin(logits), 0.0)


@dataclasses.dataclass(frozen=True)
class Sharpened(Wrapper):
    """Logits of the inner method times 1.5."""

    def layers(self):
        return tuple(
            layer._replace(logit_scale=lambda positions: jnp.full((1, 1), 1.5))
            for layer in self.inner.layers()
        )


POPE = PoPE(theta=100.0, phase="uniform")
CASES = {
    "pope": POPE,
    "fox-pope": FoX(init_std=0.5, rotation=POPE),
    "cable-window": SlidingWindow(Cable(init_std=0.5), 5),
    "chunks": LocalChunks(ALiBi(), 5),
    "far": Doubled(),
    "far-scaled": Sharpened(Doubled(PoPE(theta=100.0, phase="none"))),
    "far-counted": Sharpened(SlidingWindow(Counted(), 7)),
    "cope-window-scaled": LogitScaling(
        SlidingWindow(CoPE(max_position=4, init_std=0.5), 5), training_length=4
    ),
}
FAST = ("fox-pope", "cable-window", "far-scaled", "far-counted")
POSITIONS = jnp.asarray(np.concatenate([np.arange(7), np.arange(5)])[None], jnp.int32)
SEGMENTS = jnp.asarray(np.repeat([1, 2], [7, 5])[None], jnp.int32)
SAME = SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]
MASK = SAME & (POSITIONS[:, None, :, None] >= POSITIONS[:, None, None, :])


def slow_but(fast):
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in CASES]


@cache
def inputs():
    return jax.random.normal(jax.random.key(5), (3, LENGTH, WIDTH))


@partial(jax.jit, static_argnums=0)
def expected(method, variables, x, q, k, v):
    """The model's reference attention, of packed rows."""
    (layer,) = method.layers()
    tables = layer.method.tables(variables, POSITIONS, HEAD_DIM)
    q, k = layer.method.rotate(variables, tables, q, k)
    sums = None
    if has_hook(layer.method, "running_bias"):
        sums = running_sums(layer.method.running_bias(variables, x))
    return attention.attend(
        *(q, k, v),
        q_positions=POSITIONS,
        k_positions=POSITIONS,
        q_segments=SEGMENTS,
        k_segments=SEGMENTS,
        q_sums=sums,
        k_sums=sums,
        bias_variables=variables,
        backend="reference",
        **attention.layer_arguments(layer),
    )


class Block(nn.Module):
    method: PositionEmbedding

    @nn.compact
    def __call__(self, x):
        inner = linen.PositionAttention(self.method, positions=POSITIONS, inputs=x)
        return nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD_DIM, attention_fn=inner
        )(x, mask=MASK)


@pytest.mark.fast("far-counted")
@pytest.mark.parametrize("name", slow_but(FAST))
def test_linen_equals_the_model(name):
    method, x = CASES[name], inputs()
    block = Block(method)
    out, variables = jax.jit(block.init_with_output)(jax.random.key(1), x)
    params = variables["params"]["MultiHeadDotProductAttention_0"]
    groups = (group.get("PositionAttention_0", {}) for group in variables.values())
    own = {key: value for group in groups for key, value in group.items()}
    heads = (
        jnp.einsum("btd,dnh->btnh", x, params[part]["kernel"]) for part in ("query", "key", "value")
    )
    right = expected(method, own, x, *heads)
    right = jnp.einsum("btnh,nhd->btd", right, params["out"]["kernel"])
    np.testing.assert_allclose(out, right, atol=2e-5)


@pytest.mark.fast("chunks")
@pytest.mark.parametrize("name", slow_but(("pope", "fox-pope", "chunks")))
def test_nnx_equals_the_model_and_keeps_no_inputs(name):
    method, x = CASES[name], inputs()
    rngs = nnx.Rngs(0)
    inner = interop_nnx.PositionAttention(
        method, num_heads=HEADS, head_dim=HEAD_DIM, d_model=WIDTH, positions=POSITIONS, rngs=rngs
    )
    layer = nnx.MultiHeadAttention(
        HEADS,
        WIDTH,
        qkv_features=HEADS * HEAD_DIM,
        decode=False,
        attention_fn=inner,
        use_bias=False,
        rngs=rngs,
    )
    leaves = len(jax.tree.leaves(nnx.state(layer)))

    @nnx.jit
    def run(layer, x):
        layer.attention_fn.set_inputs(x)
        return layer(x, mask=MASK)

    @nnx.jit
    def gradient(layer, x):
        return nnx.grad(lambda layer: jnp.sum(jnp.square(run(layer, x))))(layer)

    out = run(layer, x)
    assert len(jax.tree.leaves(nnx.state(layer))) == leaves and inner.inputs is None
    heads = (
        jnp.einsum("btd,dnh->btnh", x, part.kernel[...])
        for part in (layer.query, layer.key, layer.value)
    )
    variables = {key: value[...] for key, value in inner.variables.items()}
    right = jnp.einsum(
        "btnh,nhd->btd", expected(method, variables, x, *heads), layer.out.kernel[...]
    )
    np.testing.assert_allclose(out, right, atol=2e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient(layer, x)))
    if name == "fox-pope":
        with pytest.raises(ValueError, match=r"pass it: .*set_inputs\(x\) before the call in NNX"):
            layer(x, mask=MASK)


def attend(method, mask=MASK, **settings):
    """Linen's module on heads of zeros."""
    q = jnp.zeros((3, LENGTH, HEADS, HEAD_DIM))
    return linen.PositionAttention(method, **settings).init(jax.random.key(0), q, q, q, mask=mask)


LATER = jnp.ones((1, 1, LENGTH, LENGTH), bool)
Q = jnp.zeros((3, LENGTH, HEADS, HEAD_DIM))
ERRORS = {
    "no inputs": (lambda: attend(FoX()), r"FoX\(.*pass it: PositionAttention\(.., inputs=x\)"),
    "other inputs": (
        lambda: attend(FoX(), inputs=inputs()[:, :5]),
        r"inputs have shape \(3, 5, 20\): expected \(3, 12, 'D'\)",
    ),
    "other keys": (
        lambda: attend(FoX(), inputs=inputs(), positions=POSITIONS + 1, key_positions=POSITIONS),
        "sums over the tokens between key and query, so both must be of the same tokens",
    ),
    "a key cache": (
        lambda: attend(FoX(), inputs=inputs(), decode=True),
        "a key cache is not supported",
    ),
    "keys after the query": (lambda: attend(SlidingWindow(RoPE(), 3), LATER), "a causal mask"),
    "keys after a gate": (lambda: attend(FoX(), LATER, inputs=inputs()), "a causal mask"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_missing_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


ROTARY = {
    "pope": (PoPE(), "makes q and k 16 dimensions wide.*root of head_dim=8; use PositionAttention"),
    "fox": (FoX(), "has a bias, which rotating q and k would leave out"),
    "window": (SlidingWindow(RoPE(), 3), "hides keys"),
    "chunk": (LocalChunks(RoPE(), 3), "hides keys"),
    "far": (Doubled(), "rotates near and far keys differently"),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_refuses_what_is_more_than_a_rotation(name):
    method, message = ROTARY[name]
    with pytest.raises(ValueError, match=message):
        linen.Rotary(method).init(jax.random.key(0), Q, Q)


def test_set_inputs_names_both_widths():
    inner = interop_nnx.PositionAttention(
        FoX(), num_heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"shape \(3, 12, 20\): d_model=32 was declared"):
        inner.set_inputs(inputs())
