"""The hooks of every method: axes of variables, the kernel's form of a bias, identities."""

import dataclasses
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.gallery.examples import EXAMPLES
from fope_jax.position import (
    FIRE,
    ALiBi,
    FoPE,
    Kerple,
    LogitScaling,
    ModelShape,
    NoPE,
    PositionVariables,
    RoPE,
    T5Bias,
)
from fope_jax.position.base import PositionEmbedding, bias_of_heads, has_hook
from fope_jax.position.scaling import DynamicNTK, PositionInterpolation

SHAPE = ModelShape(d_model=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=12)
SIZES = {"heads": (SHAPE.num_heads, SHAPE.num_kv_heads), "embed": (SHAPE.d_model,)}


METHODS = EXAMPLES | {"log-n": LogitScaling(ALiBi(), training_length=8)}


@pytest.mark.parametrize("name", METHODS)
def test_named_axes_have_the_sizes_of_the_model(name):
    """A mesh cuts variables along the axes that ``variable_axes`` names."""
    method = METHODS[name]
    drawn = jax.eval_shape(lambda key: method.init(key, SHAPE), jax.random.key(0))
    model = {**drawn.model_params, **drawn.model_constants}
    layers = {**drawn.layer_params, **drawn.layer_constants}
    sizes = {key: x.shape for key, x in model.items()} | {k: x.shape[1:] for k, x in layers.items()}
    for key, size in sizes.items():
        axes = method.variable_axes(key)
        assert len(axes) <= len(size), (key, axes, size)
        for axis, length in zip(axes, size, strict=False):
            assert axis is None or length in SIZES[axis], (key, axes, size)


@pytest.mark.fast(
    "ALiBi(slopes=None)",
    "Kerple(form='log')",
    "T5Bias(num_buckets=8, max_distance=32, share_layers=True, init_std=1.0, bidirectional=False)",
    "T5Bias(num_buckets=8, max_distance=32, share_layers=True, init_std=1.0, bidirectional=True)",
)
@pytest.mark.parametrize(
    "method",
    [
        ALiBi(),
        Kerple(),
        Kerple(form="power"),
        T5Bias(num_buckets=8, max_distance=32, init_std=1.0),
        T5Bias(num_buckets=8, max_distance=32, init_std=1.0, bidirectional=True),
        FIRE(init_length=16.0),
    ],
    ids=repr,
)
def test_the_kernel_s_form_of_a_bias_is_the_bias(method):
    """In a kernel a variable is a number, or a tuple of numbers for a vector."""
    variables = method.init(jax.random.key(1), SHAPE).at_layer(1)
    positions = np.arange(40, dtype=np.int32)[None]
    expected = bias_of_heads(method, variables, positions, positions)
    for head in range(SHAPE.num_heads):
        numbers = {}
        for name, value in variables.items():
            axes = method.variable_axes(name)
            value = jnp.take(value, head, axes.index("heads")) if "heads" in axes else value
            numbers[name] = tuple(value) if value.ndim else value
        bias = method.bias(numbers, positions[0, :, None], positions[0, None, :])
        causal = np.tril(np.ones((40, 40), bool)) | (not method.limits.needs_causal_mask)
        bias = jnp.broadcast_to(bias, causal.shape)
        chex.assert_trees_all_close(
            np.where(causal, bias, 0), np.where(causal, expected[0, head], 0), rtol=1e-6, atol=1e-6
        )


def test_hooks_that_are_not_overridden_are_identities():
    method, positions = NoPE(), np.arange(5, dtype=np.int32)[None]
    q, k = jnp.ones((1, 5, 4, 12)), jnp.ones((1, 5, 2, 12))
    x = jnp.ones((1, 5, 48))
    assert method.embed({}, x, positions) is x
    assert method.tables({}, positions, 12) is None
    assert method.rotate({}, None, q, k) == (q, k)
    bias = bias_of_heads(method, {}, positions, positions)
    assert bias.shape == (1, 1, 5, 5) and not bias.any()
    logits = jnp.zeros((1, 4, 5, 5))
    assert not method.contextual_bias({}, q, logits).any()
    assert not method.running_bias({}, q[:, :, 0]).any()
    assert method.variable_axes("anything") == ()
    hooks = ("embed", "tables", "rotate", "bias", "contextual_bias")
    assert not any(has_hook(method, hook) for hook in hooks)
    assert has_hook(RoPE(), "rotate") and not has_hook(PositionEmbedding(), "rotate")


def test_origins_are_the_frequencies_before_scaling():
    scaled = FoPE(40, theta=100.0, scaling=(PositionInterpolation(2.0),))
    plain = FoPE(40, theta=100.0)
    np.testing.assert_allclose(plain.origins(12), plain.frequencies(12), rtol=1e-12)
    assert not set(scaled.frequencies(12)) <= set(plain.frequencies(12))
    assert set(scaled.origins(12)) <= set(plain.origins(12))
    wrapped = LogitScaling(plain, training_length=40)
    np.testing.assert_array_equal(wrapped.frequencies(12), plain.frequencies(12))


@dataclass(frozen=True)
class AllHeads(PositionEmbedding):
    """A bias of all heads at once, where that of one is asked for."""

    def bias(self, variables, q_positions, k_positions):
        return jnp.zeros((1, 4, 8, 8))


@dataclass(frozen=True)
class Slopes(PositionEmbedding):
    """A slope a head, whose axis ``variable_axes`` does not name."""

    def init(self, key, shape):
        return PositionVariables(layer_params={"slope": jnp.ones((shape.num_layers, 4))})

    def bias(self, variables, q_positions, k_positions):
        return -variables["slope"] * (q_positions - k_positions).astype(jnp.float32)


def test_heads_that_variable_axes_leaves_out_are_named():
    variables = Slopes().init(jax.random.key(0), SHAPE).at_layer(0)
    message = r"Slopes.bias, .* and slope \(4,\) of one head: .*variable_axes says which"
    for length in (8, 4):  # as many tokens as heads are no heads either
        positions = jnp.arange(length)[None]
        with pytest.raises(ValueError, match=message):
            bias_of_heads(Slopes(), variables, positions, positions)


def test_a_variable_that_is_missing_is_told_beside_those_given():
    positions = jnp.arange(4)[None]
    with pytest.raises(KeyError, match="slopes") as caught:
        bias_of_heads(ALiBi(), {}, positions, positions)
    assert "ALiBi.bias was given no variables; method.init" in caught.value.__notes__[0]


@dataclass(frozen=True)
class SlowerRoPE(RoPE):
    """RoPE with frequencies of its own."""

    slower: float = 2.0

    def frequencies(self, head_dim):
        return super().frequencies(head_dim) / self.slower


@pytest.mark.parametrize("learnable", [False, True])
def test_a_rotary_method_turns_by_the_frequencies_that_it_states(learnable):
    """The fingerprint and the log show ``frequencies``: ``tables`` may not use others."""
    method, positions = SlowerRoPE(learnable=learnable), jnp.arange(6)[None]
    variables = method.init(jax.random.key(0), SHAPE).at_layer(0)
    twice = method.tables(variables, 2 * positions, 12)
    chex.assert_trees_all_close(twice, RoPE().tables({}, positions, 12), rtol=1e-6, atol=1e-6)


def test_frequencies_of_ones_own_are_not_replaced_by_a_scaling():
    method = SlowerRoPE(scaling=(DynamicNTK(2.0, 8),))
    with pytest.raises(ValueError, match="DynamicNTK with length=None.*SlowerRoPE.frequencies"):
        method.check(SHAPE)
    SlowerRoPE(scaling=(DynamicNTK(2.0, 8, length=16),)).check(SHAPE)


def switches():
    for name, method in EXAMPLES.items():
        for field in dataclasses.fields(method):
            if isinstance(field.default, bool):
                yield pytest.param(method, field.name, id=f"{name}.{field.name}")


@pytest.mark.parametrize(("method", "name"), list(switches()))
def test_a_switch_is_true_or_false(method, name):
    """Any text is true: ``interleaved="false"`` would interleave."""
    with pytest.raises(ValueError, match=f"{name}='false': expected True or False"):
        dataclasses.replace(method, **{name: "false"})


def test_a_bias_of_another_shape_is_named_with_what_is_expected():
    positions = jnp.arange(8)[None]
    message = (
        r"AllHeads.bias has shape \(1, 4, 8, 8\) .* broadcasts to \(1, 8, 8\), the bias of one"
    )
    with pytest.raises(ValueError, match=message):
        bias_of_heads(AllHeads(), {}, positions, positions)
